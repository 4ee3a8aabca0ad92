// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
)

// server answers on every port. The zero value of a port means that it is not served.
type server struct {
	place   Place
	bind    string        // address to listen on, "" means all
	http    uint16        // HTTP/1.1, HTTP/2 without TLS, WebSocket on /ws, control
	grpc    uint16        // gRPC alone
	tcp     uint16        // lines are answered; after EOF of the client, a last answer
	first   uint16        // the answer is sent before anything is read
	tls     uint16        // HTTP over TLS with a certificate of its own
	grace   time.Duration // serve on after SIGTERM, so that callers learn of the end
	control control
}

func serveCommand() *cobra.Command {
	s := &server{place: here()}
	cmd := &cobra.Command{
		Use: "serve", Short: "answer in every protocol", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&s.bind, "bind", "", "address to listen on; empty means all")
	f.Uint16Var(&s.http, "http", 8080, "port for HTTP/1.1, HTTP/2 without TLS, WebSocket (/ws), control")
	f.Uint16Var(&s.grpc, "grpc", 8082, "port for gRPC")
	f.Uint16Var(&s.tcp, "tcp", 8083, "port for TCP, the client speaks first")
	f.Uint16Var(&s.first, "first", 8084, "port for TCP, the server speaks first")
	f.Uint16Var(&s.tls, "tls", 8443, "port for HTTP over TLS")
	f.DurationVar(&s.grace, "grace", 0, "how long to serve on after SIGTERM")
	f.StringVar(&s.place.Cluster, "cluster", s.place.Cluster, "cluster to answer with")
	f.StringVar(&s.place.Version, "version", s.place.Version, "version to answer with")
	return cmd
}

// run serves until ctx ends, then for the grace, then finishes what is in flight.
func (s *server) run(ctx context.Context) error {
	serving, stop := context.WithCancel(context.Background())
	defer stop()
	group, serving := errgroup.WithContext(serving)
	for _, port := range []struct {
		number uint16
		serve  func(context.Context, net.Listener) error
	}{
		{s.http, s.serveHTTP}, {s.grpc, s.serveGRPC}, {s.tcp, s.serveTCP}, {s.first, s.serveFirst}, {s.tls, s.serveTLS},
	} {
		if port.number == 0 {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort(s.bind, strconv.Itoa(int(port.number))))
		if err != nil {
			return err
		}
		group.Go(func() error { return port.serve(serving, l) })
	}
	slog.Info("serving", "place", s.place)
	select {
	case <-ctx.Done():
	case <-serving.Done():
		return group.Wait()
	}
	select {
	case <-time.After(s.grace):
	case <-serving.Done():
	}
	stop()
	return group.Wait()
}

// handler answers plain requests and WebSockets.
func (s *server) handler(protocol string) http.Handler {
	mux := http.NewServeMux()
	s.control.handle(mux)
	mux.HandleFunc("/ws", s.webSocket)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.control.count(protocol)
		s.control.pause(r)
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		status := http.StatusOK
		if code, ok := strings.CutPrefix(r.URL.Path, "/status/"); ok {
			if n, err := strconv.Atoi(code); err == nil && n >= 200 && n <= 599 {
				status = n
			}
		}
		if s.control.failing() {
			status = http.StatusServiceUnavailable
		}
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		w.Write(Answer{
			Place: s.place, Protocol: r.Proto, Remote: r.RemoteAddr, Local: fmt.Sprint(local), Method: r.Method,
			Host: r.Host, Path: r.URL.RequestURI(), Headers: r.Header, Peer: peerOf(r.Header), Body: string(body),
		}.line())
	})
	return mux
}

func (s *server) serveHTTP(ctx context.Context, l net.Listener) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return serveUntil(ctx, &http.Server{Handler: s.handler("http"), Protocols: protocols, ReadHeaderTimeout: 10 * time.Second}, l)
}

func (s *server) serveTLS(ctx context.Context, l net.Listener) error {
	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2", "http/1.1"}}
	h := &http.Server{Handler: s.handler("tls"), TLSConfig: config, ReadHeaderTimeout: 10 * time.Second}
	return serveUntil(ctx, h, tls.NewListener(l, config))
}

// serveUntil lets requests finish for up to 10 s after ctx has ended.
func serveUntil(ctx context.Context, h *http.Server, l net.Listener) error {
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		finish, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		done <- h.Shutdown(finish)
	}()
	if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-done
}

// webSocket answers every message with an Answer that has it as the body.
func (s *server) webSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // Accept has answered
	}
	defer conn.CloseNow()
	s.control.count("ws")
	for {
		_, message, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		a := Answer{Place: s.place, Protocol: "websocket", Remote: r.RemoteAddr, Host: r.Host, Peer: peerOf(r.Header), Body: string(message)}
		if conn.Write(r.Context(), websocket.MessageText, a.line()) != nil {
			return
		}
	}
}

func (s *server) serveGRPC(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(grpc.ForceServerCodecV2(lines{}))
	g.RegisterService(&echoService, s)
	go func() {
		<-ctx.Done()
		hard := time.AfterFunc(10*time.Second, g.Stop)
		defer hard.Stop()
		g.GracefulStop()
	}()
	return g.Serve(l)
}

// serveTCP answers every line, and once more after the client has closed its half: what
// was sent before that must still arrive.
func (s *server) serveTCP(ctx context.Context, l net.Listener) error {
	return s.accept(ctx, l, func(conn net.Conn) {
		s.control.count("tcp")
		lines := bufio.NewScanner(conn)
		for lines.Scan() {
			if _, err := conn.Write(s.connected(conn, "tcp", lines.Text())); err != nil {
				return
			}
		}
		conn.Write(s.connected(conn, "tcp", "EOF"))
	})
}

// serveFirst sends its answer before it reads anything, then answers lines.
func (s *server) serveFirst(ctx context.Context, l net.Listener) error {
	return s.accept(ctx, l, func(conn net.Conn) {
		s.control.count("first")
		if _, err := conn.Write(s.connected(conn, "first", "")); err != nil {
			return
		}
		lines := bufio.NewScanner(conn)
		for lines.Scan() {
			if _, err := conn.Write(s.connected(conn, "first", lines.Text())); err != nil {
				return
			}
		}
	})
}

func (s *server) connected(conn net.Conn, protocol, body string) []byte {
	return Answer{Place: s.place, Protocol: protocol, Remote: conn.RemoteAddr().String(), Local: conn.LocalAddr().String(), Body: body}.line()
}

// accept handles connections until ctx ends; those that are open go on until the process does.
func (s *server) accept(ctx context.Context, l net.Listener, handle func(net.Conn)) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			handle(conn)
		}()
	}
}

// selfSigned is a certificate that only says that TLS reached this process.
func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "echo"}, DNSNames: []string{"echo"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
