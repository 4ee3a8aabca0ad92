// SPDX-License-Identifier: Apache-2.0

// Package catest gives tests a real certificate authority that is gone when they end, and Kubernetes clusters
// that sign service account tokens without being there.
package catest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
)

// TrustDomain of every authority made here, unless the test configures another.
const TrustDomain = "cluster.local"

// CA is a throwaway authority: keys on disk in the test's own folder, state in memory, every identity granted.
type CA struct {
	*ca.Authority
	State     *ca.Memory
	AuditPath string
	Audit     *ca.AuditLog
}

// New opens an authority. Options change its configuration before.
func New(t testing.TB, options ...func(*ca.Config)) *CA {
	t.Helper()
	dir := t.TempDir()
	td, err := ca.ParseTrustDomain(TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	sealer, err := ca.NewFileSealer(filepath.Join(dir, "sealing.key"))
	if err != nil {
		t.Fatal(err)
	}
	c := &CA{State: new(ca.Memory), AuditPath: filepath.Join(dir, "audit.jsonl")}
	if c.Audit, err = ca.OpenAudit(c.AuditPath, "test", nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Audit.Close() })
	cfg := ca.Config{
		TrustDomain: td, State: c.State, Sealer: sealer, Audit: c.Audit,
		Grants: ca.GrantFunc(func(ca.Source, string, string) error { return nil }),
		Log:    slog.New(slog.DiscardHandler),
	}
	for _, option := range options {
		option(&cfg)
	}
	if c.Authority, err = ca.Open(t.Context(), cfg); err != nil {
		t.Fatalf("ca.Open: %v", err)
	}
	return c
}

// Subject is a workload of the cluster or network that source names, with default service account.
func Subject(source ca.Source, instance, namespace string) ca.Subject {
	return ca.Subject{Source: source, Instance: instance, Namespace: namespace, ServiceAccount: "default"}
}

// Leaf issues a certificate with a key of its own, as a TLS peer presents it.
func (c *CA) Leaf(t testing.TB, subject ca.Subject) tls.Certificate {
	t.Helper()
	return c.issue(t, ca.Request{Subject: subject})
}

// Serving issues meshd's own certificate for names, which are host names or addresses.
func (c *CA) Serving(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	req := ca.Request{Subject: control(ca.ControlAccount, "meshd-test")}
	for _, name := range names {
		if addr, err := netip.ParseAddr(name); err == nil {
			req.Addresses = append(req.Addresses, addr)
		} else {
			req.DNSNames = append(req.DNSNames, name)
		}
	}
	return c.issue(t, req)
}

// Admin issues an administrator's certificate.
func (c *CA) Admin(t testing.TB) tls.Certificate {
	t.Helper()
	return c.issue(t, ca.Request{Subject: control(ca.AdminAccount, "admin-test")})
}

func control(account, instance string) ca.Subject {
	return ca.Subject{Source: ca.SourceMeshd, Instance: instance, Namespace: ca.ControlNamespace, ServiceAccount: account}
}

func (c *CA) issue(t testing.TB, req ca.Request) tls.Certificate {
	t.Helper()
	key := Key(t)
	req.CSR = CSR(t, key, nil)
	req.Credential = ca.Credential{Method: "test"}
	issued, err := c.Issue(t.Context(), req)
	if err != nil {
		t.Fatalf("issue for %+v: %v", req.Subject, err)
	}
	return tls.Certificate{
		Certificate: issued.ChainDER(), PrivateKey: key, Leaf: issued.Leaf,
	}
}

// ServerTLS is meshd's side: its certificate for names, client certificates asked for and not required.
func (c *CA) ServerTLS(t testing.TB, names ...string) *tls.Config {
	t.Helper()
	return &tls.Config{
		Certificates: []tls.Certificate{c.Serving(t, names...)}, ClientAuth: tls.RequestClientCert,
		MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true,
	}
}

// ClientTLS trusts the authority's roots and presents the given certificates, if any.
func (c *CA) ClientTLS(certificates ...tls.Certificate) *tls.Config {
	return &tls.Config{RootCAs: c.Pool(), Certificates: certificates, MinVersion: tls.VersionTLS12}
}

// Pool is the authority's roots.
func (c *CA) Pool() *x509.CertPool { return c.Bundle().Pool() }

// AuditEntries reads the whole log, and fails the test if its chain is broken.
func (c *CA) AuditEntries(t testing.TB) []ca.AuditEntry {
	t.Helper()
	text, err := os.ReadFile(c.AuditPath)
	if err != nil {
		t.Fatal(err)
	}
	var out []ca.AuditEntry
	_, err = ca.ReadAudit(bytes.NewReader(text), func(e ca.AuditEntry) error { out = append(out, e); return nil })
	if err != nil {
		t.Fatalf("audit log: %v", err)
	}
	return out
}

// Key is a fresh P-256 key.
func Key(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// CSR is a certificate request in PEM, signed by key. A nil template asks for nothing.
func CSR(t testing.TB, key any, template *x509.CertificateRequest) []byte {
	t.Helper()
	if template == nil {
		template = new(x509.CertificateRequest)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// Clock is a clock that a test moves. It starts at the real time.
type Clock struct{ now chan time.Time }

// NewClock starts a clock.
func NewClock() *Clock {
	c := &Clock{now: make(chan time.Time, 1)}
	c.now <- time.Now()
	return c
}

// Now is the time of the clock.
func (c *Clock) Now() time.Time {
	t := <-c.now
	c.now <- t
	return t
}

// Advance moves the clock.
func (c *Clock) Advance(d time.Duration) { c.now <- (<-c.now).Add(d) }
