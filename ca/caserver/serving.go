// SPDX-License-Identifier: Apache-2.0

package caserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
)

// renewRetry is the pause after a renewal that failed.
const renewRetry = 15 * time.Second

// ServingConfig says under which names meshd is reached.
type ServingConfig struct {
	// Authority issues the certificate. Required.
	Authority *ca.Authority
	// Replica names this meshd: letters, digits, dots and dashes. Required.
	Replica string
	// Names are the host names and addresses that clients dial. At least one.
	Names []string
	// Clock tells the time; time.Now if nil.
	Clock func() time.Time
	// Log takes failed renewals; slog.Default() if nil.
	Log *slog.Logger
}

// Serving keeps meshd's own certificate, which the same authority issues for the names it is advertised under.
type Serving struct {
	cfg     ServingConfig
	request ca.Request
	current atomic.Pointer[tls.Certificate]
}

// NewServing gets the first certificate. Run renews it.
func NewServing(ctx context.Context, cfg ServingConfig) (*Serving, error) {
	if cfg.Authority == nil || cfg.Replica == "" || len(cfg.Names) == 0 {
		return nil, errors.New("caserver: ServingConfig.Authority, Replica and Names are required")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s := &Serving{cfg: cfg, request: ca.Request{
		Subject: ca.Subject{
			Source: ca.SourceMeshd, Instance: cfg.Replica, Namespace: ca.ControlNamespace, ServiceAccount: ca.ControlAccount,
		},
		Credential: ca.Credential{Method: "self"},
	}}
	for _, name := range cfg.Names {
		if addr, err := netip.ParseAddr(name); err == nil {
			s.request.Addresses = append(s.request.Addresses, addr.Unmap().WithZone(""))
		} else {
			s.request.DNSNames = append(s.request.DNSNames, name)
		}
	}
	return s, s.renew(ctx)
}

// TLS is the configuration of meshd's listeners. Client certificates are asked for and not verified here: an
// expired one must not keep a caller from showing a token. Whoever serves looks at them per call, by way of
// package attest. There are no session tickets, because a resumed session would skip that look's TLS part.
func (s *Serving) TLS(nextProtos ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		NextProtos:             nextProtos,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.current.Load(), nil
		},
	}
}

// Certificate is the current one, leaf and intermediate.
func (s *Serving) Certificate() *tls.Certificate { return s.current.Load() }

// Run renews the certificate at half of its life until ctx ends. Failures are logged and tried again.
func (s *Serving) Run(ctx context.Context) error {
	for {
		wait := max(ca.RenewAt(s.current.Load().Leaf).Sub(s.cfg.Clock()), 0)
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		if err := s.renew(ctx); err != nil {
			s.cfg.Log.Error("meshd's own certificate not renewed", "error", err, "valid_until", s.current.Load().Leaf.NotAfter)
			if err := sleep(ctx, renewRetry); err != nil {
				return err
			}
		}
	}
}

func (s *Serving) renew(ctx context.Context) error {
	cert, _, err := selfIssue(ctx, s.cfg.Authority, s.request)
	if err != nil {
		return fmt.Errorf("meshd's own certificate: %w", err)
	}
	s.current.Store(&cert)
	return nil
}

// selfIssue gets a certificate for a fresh key of this process.
func selfIssue(ctx context.Context, authority *ca.Authority, req ca.Request) (tls.Certificate, ca.Issued, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, ca.Issued{}, err
	}
	if req.CSR, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		return tls.Certificate{}, ca.Issued{}, err
	}
	issued, err := authority.Issue(ctx, req)
	if err != nil {
		return tls.Certificate{}, ca.Issued{}, err
	}
	return tls.Certificate{
		Certificate: issued.ChainDER(), PrivateKey: key, Leaf: issued.Leaf,
	}, issued, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
