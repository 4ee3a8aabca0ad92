// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// httpDialect speaks HTTP/1.1, HTTP/2 without TLS (h2c), or HTTPS without verifying: the
// TLS of a story is between the workloads themselves.
type httpDialect struct {
	c      *caller
	client *http.Client
	url    string
}

func newHTTPDialect(c *caller) *httpDialect {
	protocols := new(http.Protocols)
	u := *c.url
	switch u.Scheme {
	case "h2c":
		u.Scheme = "http"
		protocols.SetUnencryptedHTTP2(true)
	case "https":
		protocols.SetHTTP1(true)
		protocols.SetHTTP2(true)
	default:
		protocols.SetHTTP1(true)
	}
	transport := &http.Transport{
		Protocols: protocols, DisableKeepAlives: c.fresh, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		DialContext: (&net.Dialer{Timeout: c.timeout}).DialContext,
	}
	return &httpDialect{c: c, client: &http.Client{Transport: transport}, url: u.String()}
}

func (d *httpDialect) call(ctx context.Context) (Answer, error) {
	method, body := http.MethodGet, io.Reader(nil)
	if d.c.body != "hello" {
		method, body = http.MethodPost, strings.NewReader(d.c.body)
	}
	req, err := http.NewRequestWithContext(ctx, method, d.url, body)
	if err != nil {
		return Answer{}, err
	}
	req.Header = d.c.header()
	if d.c.host != "" {
		req.Host = d.c.host
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return Answer{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return Answer{}, fmt.Errorf("%s: %.200s", resp.Status, bytes.TrimSpace(b))
	}
	return parseAnswer(b)
}

func (d *httpDialect) Close() error {
	d.client.CloseIdleConnections()
	return nil
}

type grpcDialect struct {
	c    *caller
	conn *grpc.ClientConn
}

func newGRPCDialect(c *caller) (*grpcDialect, error) {
	conn, err := grpc.NewClient(c.url.Host, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(lines{})), grpc.WithDisableServiceConfig())
	return &grpcDialect{c, conn}, err
}

func (c *caller) outgoing(ctx context.Context) context.Context {
	for name, values := range c.header() {
		for _, v := range values {
			ctx = metadata.AppendToOutgoingContext(ctx, name, v)
		}
	}
	return ctx
}

func (d *grpcDialect) call(ctx context.Context) (Answer, error) {
	in, out := []byte(d.c.body), []byte(nil)
	if err := d.conn.Invoke(d.c.outgoing(ctx), callMethod, &in, &out); err != nil {
		return Answer{}, err
	}
	return parseAnswer(out)
}

func (d *grpcDialect) Close() error { return d.conn.Close() }

// heldStream is a bidirectional gRPC stream.
type heldStream struct {
	*grpcDialect
	stream grpc.ClientStream
	cancel context.CancelFunc
}

func dialStream(c *caller) (*heldStream, error) {
	d, err := newGRPCDialect(c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := d.conn.NewStream(c.outgoing(ctx), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, streamMethod)
	if err != nil {
		cancel()
		return nil, errors.Join(err, d.Close())
	}
	return &heldStream{d, stream, cancel}, nil
}

func (h *heldStream) say(_ context.Context, message string) (Answer, error) {
	in, out := []byte(message), []byte(nil)
	if err := h.stream.SendMsg(&in); err != nil {
		return Answer{}, err
	}
	if err := h.stream.RecvMsg(&out); err != nil {
		return Answer{}, err
	}
	return parseAnswer(out)
}

func (h *heldStream) Close() error {
	h.cancel()
	return h.grpcDialect.Close()
}

// heldWebSocket is a WebSocket to /ws unless the URL names a path.
type heldWebSocket struct{ conn *websocket.Conn }

func dialWebSocket(ctx context.Context, c *caller) (heldWebSocket, error) {
	u := *c.url
	if u.Path == "" || u.Path == "/" {
		u.Path = "/ws"
	}
	conn, _, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{HTTPHeader: c.header(), Host: c.host})
	return heldWebSocket{conn}, err
}

func (h heldWebSocket) say(ctx context.Context, message string) (Answer, error) {
	if err := h.conn.Write(ctx, websocket.MessageText, []byte(message)); err != nil {
		return Answer{}, err
	}
	_, b, err := h.conn.Read(ctx)
	if err != nil {
		return Answer{}, err
	}
	return parseAnswer(b)
}

func (h heldWebSocket) Close() error { return h.conn.Close(websocket.StatusNormalClosure, "") }

// heldLines is a TCP connection (tls: with TLS) that carries lines. Where the server
// speaks first, its greeting is read before anything is sent.
type heldLines struct {
	conn  net.Conn
	lines *bufio.Reader
}

func dialLines(ctx context.Context, c *caller) (*heldLines, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.url.Host)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	if c.url.Scheme == "tls" {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: c.url.Hostname()})
	}
	h := &heldLines{conn: conn, lines: bufio.NewReader(conn)}
	if c.url.Scheme == "first" {
		if _, err := h.read(); err != nil {
			conn.Close()
			return nil, fmt.Errorf("the server's greeting: %w", err)
		}
	}
	return h, nil
}

func (h *heldLines) say(ctx context.Context, message string) (Answer, error) {
	deadline, _ := ctx.Deadline()
	if err := h.conn.SetDeadline(deadline); err != nil {
		return Answer{}, err
	}
	if _, err := io.WriteString(h.conn, message+"\n"); err != nil {
		return Answer{}, err
	}
	return h.read()
}

// sayAllAndEnd sends many lines and the end of its half, early (before it reads anything)
// or after the first answer. Every line must be answered, and the end, and then the other
// half ends too.
func (h *heldLines) sayAllAndEnd(ctx context.Context, message string, early bool) (Answer, error) {
	half, ok := h.conn.(*net.TCPConn)
	if !ok {
		return Answer{}, errors.New("only plain TCP can be closed by halves")
	}
	deadline, _ := ctx.Deadline()
	const lines = 100
	if err := errors.Join(h.conn.SetDeadline(deadline), writeLines(half, message, lines)); err != nil {
		return Answer{}, err
	}
	for i := range lines {
		if early && i == 0 || !early && i == 1 {
			if err := half.CloseWrite(); err != nil {
				return Answer{}, err
			}
		}
		if a, err := h.read(); err != nil || a.Body != message {
			return a, fmt.Errorf("answer %d of %d after the end: %q, %w", i+1, lines, a.Body, err)
		}
	}
	last, err := h.read()
	if err != nil || last.Body != "EOF" {
		return last, fmt.Errorf("the answer to the end: %q, %w", last.Body, err)
	}
	if more, err := h.lines.ReadByte(); err != io.EOF {
		return last, fmt.Errorf("after the last answer came %q, %w; want the end", more, err)
	}
	last.Body = message
	return last, nil
}

func writeLines(to io.Writer, line string, n int) error {
	_, err := io.WriteString(to, strings.Repeat(line+"\n", n))
	return err
}

func (h *heldLines) read() (Answer, error) {
	b, err := h.lines.ReadBytes('\n')
	if err != nil {
		return Answer{}, err
	}
	return parseAnswer(b)
}

// Close closes its own half first and, over plain TCP, expects the last answer: what
// crossed before the end of the stream must not be lost.
func (h *heldLines) Close() error {
	defer h.conn.Close()
	half, ok := h.conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	h.conn.SetDeadline(time.Now().Add(2 * time.Second))
	if err := half.CloseWrite(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, h.lines)
	return err
}
