// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"
)

// concurrentAnswers bounds how many probes are answered at a time; answerTime is how long
// one may take. Whoever reaches the gateway can open connections that lead here.
const (
	concurrentAnswers = 32
	answerTime        = 5 * time.Second
)

// Answerer is what probes of a gateway end at: behind its Envoy, which passes the one
// reserved server name (api.ProbeName) on to it. It speaks mutual TLS with the gateway's
// own certificate, tells the peer which SPIFFE ID it saw, and closes. It says nothing to
// who shows no certificate of the mesh, and does nothing else for anybody.
type Answerer struct {
	// TLS returns the workload's certificate (Certificates) and the mesh's roots (RootCAs).
	TLS func() (*tls.Config, error)
	// Protocols to accept, see tls.Config.NextProtos.
	Protocols []string
	// Log gets refused probes at the level of debugging; nil discards.
	Log *slog.Logger
}

// Serve answers on l until ctx ends, and closes it.
func (a *Answerer) Serve(ctx context.Context, l net.Listener) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	slots := make(chan struct{}, concurrentAnswers)
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("answer probes on %s: %w", l.Addr(), err)
		}
		select {
		case slots <- struct{}{}:
		default: // Who keeps them all busy gets no more.
			conn.Close()
			continue
		}
		go func() {
			defer func() { <-slots }()
			defer conn.Close()
			if err := a.answer(ctx, conn); err != nil && a.Log != nil {
				a.Log.Debug("probe not answered", "peer", conn.RemoteAddr(), "error", err)
			}
		}()
	}
}

func (a *Answerer) answer(ctx context.Context, conn net.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if err := conn.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	config, err := a.config()
	if err != nil {
		return err
	}
	secured := tls.Server(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return err
	}
	id, err := spiffeID(secured.ConnectionState())
	if err != nil {
		return err
	}
	if _, err := io.WriteString(secured, id+"\n"); err != nil {
		return err
	}
	return secured.Close()
}

// config is a server's, from the workload's certificate and roots that are current now.
func (a *Answerer) config() (*tls.Config, error) {
	client, err := a.TLS()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: a.Protocols,
		Certificates: client.Certificates, GetCertificate: client.GetCertificate,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: client.RootCAs,
		SessionTicketsDisabled: true, // each probe is to prove the certificates anew
	}, nil
}

// spiffeID is that of the peer, whose chain has been verified.
func spiffeID(state tls.ConnectionState) (string, error) {
	if len(state.PeerCertificates) == 0 {
		return "", errors.New("the peer shows no certificate")
	}
	leaf := state.PeerCertificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != "spiffe" {
		return "", fmt.Errorf("the peer's certificate has %d URI names, want one SPIFFE ID", len(leaf.URIs))
	}
	return leaf.URIs[0].String(), nil
}

// maxAnswer bounds the line in which an Answerer says whom it saw: a SPIFFE ID has at
// most 2048 bytes.
const maxAnswer = 2049

// expectAnswer reads whom the other end saw, which must be us.
func expectAnswer(conn io.Reader, config *tls.Config) error {
	line, err := bufio.NewReader(io.LimitReader(conn, maxAnswer)).ReadString('\n')
	if err != nil {
		return fmt.Errorf("the peer does not say whom it saw: %w", err)
	}
	seen := strings.TrimSuffix(line, "\n")
	for _, own := range config.Certificates {
		if own.Leaf != nil && len(own.Leaf.URIs) == 1 && own.Leaf.URIs[0].String() == seen {
			return nil
		}
	}
	return fmt.Errorf("the peer saw %.200q, which is not this gateway", seen)
}
