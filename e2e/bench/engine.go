// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"path/filepath"
	"time"
)

// engineServices and enginePairs are the size of the engine's figures: so many services, and
// so many measurements of each subject, in turn.
const (
	engineServices = 1000
	enginePairs    = 30
	loneFlaps      = 300
)

// playEngine measures what the xDS server costs beside the transport that carries it.
func playEngine(ctx context.Context, b *bench) error {
	certificates, err := newCertificates()
	if err != nil {
		return err
	}
	config := subjectConfig{World: engineWorld{Services: engineServices, Proxies: b.proxies, Classes: 1}, CA: certificates.root, Cert: certificates.cert, Key: certificates.key}
	ours, err := b.subject(ctx, subjectOurs, config, certificates)
	if err != nil {
		return err
	}
	defer ours.close()
	if err := b.coldStart(ctx, ours); err != nil {
		return err
	}
	if _, err := ours.flap(ctx); err != nil { // for its bytes
		return err
	}
	config.Message = ours.crowd.capture
	all := []*measuredSubject{ours}
	for _, role := range []string{subjectGRPC, subjectFloor} {
		s, err := b.subject(ctx, role, config, certificates)
		if err != nil {
			return err
		}
		defer s.close()
		if err := s.crowd.connect(ctx, b.proxies, false); err != nil {
			return err
		}
		all = append(all, s)
	}
	if err := b.profiled(ours, "flap", func() error { return b.flaps(ctx, all, len(config.Message)) }); err != nil {
		return err
	}
	return b.loneFlaps(ctx, ours)
}

// coldStart connects everybody at once to a server that has only just started.
func (b *bench) coldStart(ctx context.Context, ours *measuredSubject) error {
	before, err := ours.order("settle")
	if err != nil {
		return err
	}
	start := time.Now()
	if err := b.profiled(ours, "cold-start", func() error {
		if err := ours.crowd.connect(ctx, b.proxies+1, true); err != nil {
			return err
		}
		return ours.crowd.quiet(ctx, time.Second)
	}); err != nil {
		return err
	}
	took := time.Since(start) - time.Second
	after, err := ours.order("usage")
	if err != nil {
		return err
	}
	n := float64(b.proxies + 1)
	c := ours.crowd
	b.report("cold-cpu-ms-per-proxy", (after.CPU-before.CPU)/1000/n,
		"%d proxies, %d services of 10 endpoints, mutual TLS: all in sync after %.1f s; %.0f KiB and %.1f messages a proxy",
		b.proxies, engineServices, took.Seconds(), float64(c.bytes.Load())/1024/n, float64(c.messages.Load())/n)
	if err := pause(ctx, 5*time.Second); err != nil {
		return err
	}
	if _, err := ours.order("settle"); err != nil {
		return err
	}
	settled, err := ours.order("usage")
	if err != nil {
		return err
	}
	b.report("memory-kb-per-proxy", (settled.RSS-before.RSS)/n, "resident, %d proxies, 5 s after they are in sync and freed memory was given back; live heap %.0f KiB a proxy; %.0f MiB in sync",
		b.proxies, (settled.Heap-before.Heap)/n, after.RSS/1024)
	return nil
}

// profiled keeps a profile of what a server does meanwhile, with the logs.
func (b *bench) profiled(s *measuredSubject, name string, do func() error) error {
	if b.keepLogs == "" {
		return do()
	}
	if _, err := s.order("profile " + filepath.Join(b.keepLogs, name+".cpu")); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	_, err := s.order("profile -")
	return err
}

// flaps compares what it costs to tell everybody of one endpoint.
func (b *bench) flaps(ctx context.Context, all []*measuredSubject, size int) error {
	cpu, mallocs := map[string][]float64{}, map[string][]float64{}
	var vsGRPC, vsFloor []float64
	for range enginePairs {
		for _, s := range all {
			u, err := s.flap(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", s.role, err)
			}
			n := float64(b.proxies)
			cpu[s.role], mallocs[s.role] = append(cpu[s.role], u.CPU/n), append(mallocs[s.role], float64(u.Mallocs)/n)
		}
		last := func(role string) float64 { return cpu[role][len(cpu[role])-1] }
		vsGRPC = append(vsGRPC, last(subjectOurs)/last(subjectGRPC))
		vsFloor = append(vsFloor, last(subjectOurs)/last(subjectFloor))
	}
	note := fmt.Sprintf("%d proxies, %d bytes each, medians of %d rounds in turn: ours %.1f µs a proxy, bare grpc-go %.1f, raw TLS %.1f",
		b.proxies, size, enginePairs, quantile(cpu[subjectOurs], .5), quantile(cpu[subjectGRPC], .5), quantile(cpu[subjectFloor], .5))
	b.report("flap-vs-grpc", quantile(vsGRPC, .5), "%s", note)
	b.report("flap-vs-floor", quantile(vsFloor, .5), "%s; bare grpc-go alone %.2f", note, quantile(cpu[subjectGRPC], .5)/quantile(cpu[subjectFloor], .5))
	b.report("allocs-per-push", quantile(mallocs[subjectOurs], .5)-quantile(mallocs[subjectGRPC], .5),
		"allocations a proxy: ours %.1f, of which bare grpc-go's %.1f; the computation of the change included", quantile(mallocs[subjectOurs], .5), quantile(mallocs[subjectGRPC], .5))
	return nil
}

// loneFlaps measures changes that concern one proxy of all.
func (b *bench) loneFlaps(ctx context.Context, ours *measuredSubject) error {
	before, err := ours.order("usage")
	if err != nil {
		return err
	}
	if err := pause(ctx, 2*time.Second); err != nil {
		return err
	}
	start, err := ours.order("usage")
	if err != nil {
		return err
	}
	began := time.Now()
	if err := b.profiled(ours, "unconcerned", func() error {
		for range loneFlaps {
			want := ours.crowd.messages.Load() + 1
			if _, err := ours.order("one"); err != nil {
				return err
			}
			if err := ours.crowd.arrived(ctx, want); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	took := time.Since(began)
	after, err := ours.order("usage")
	if err != nil {
		return err
	}
	idle := (start.CPU - before.CPU) / 2 * took.Seconds()
	b.report("unconcerned-us", (after.CPU-start.CPU-idle)/loneFlaps, "%d changes that 1 of %d proxies sees, less what idling costs; %.2f streams woken a change",
		loneFlaps, b.proxies+1, (after.Woken-start.Woken)/loneFlaps)
	return nil
}

// measuredSubject is a server process and the proxies that are connected to it.
type measuredSubject struct {
	role  string
	crowd *crowd
	*child
}

// subject starts a server.
func (b *bench) subject(ctx context.Context, role string, config subjectConfig, c certificates) (*measuredSubject, error) {
	process, err := newChild(ctx, subjectRole, role)
	if err != nil {
		return nil, err
	}
	s := &measuredSubject{role: role, child: process}
	if err := json.NewEncoder(s.in).Encode(config); err != nil {
		return nil, err
	}
	s.crowd = &crowd{tls: c.client, last: -1}
	if role == subjectOurs {
		s.crowd.last = config.World.Proxies
	}
	if err := s.out.Decode(&s.crowd.hello); err != nil {
		return nil, fmt.Errorf("%s did not start: %w", role, err)
	}
	s.crowd.address = s.crowd.hello.Address
	return s, nil
}

func (s *measuredSubject) close() {
	s.crowd.close()
	_ = s.stop()
}

func (s *measuredSubject) order(what string) (u spent, err error) {
	return u, s.ask(what, &u)
}

// flap tells everybody of one endpoint, and returns what that cost once all have answered.
func (s *measuredSubject) flap(ctx context.Context) (spent, error) {
	before, err := s.order("usage")
	if err != nil {
		return spent{}, err
	}
	want := s.crowd.messages.Load() + int64(len(s.crowd.proxies))
	if _, err := s.order("all"); err != nil {
		return spent{}, err
	}
	if err := s.crowd.arrived(ctx, want); err != nil {
		return spent{}, err
	}
	if err := s.crowd.quiet(ctx, 30*time.Millisecond); err != nil { // the answers are read by now
		return spent{}, err
	}
	after, err := s.order("usage")
	return spent{CPU: after.CPU - before.CPU, Mallocs: after.Mallocs - before.Mallocs}, err
}

// certificates are those of one server and of all its proxies.
type certificates struct {
	root, cert, key []byte
	client          *tls.Config
}

func newCertificates() (c certificates, err error) {
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, err
	}
	now := time.Now()
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	issue := func(template *x509.Certificate, key *ecdsa.PrivateKey) ([]byte, []byte, error) {
		der, err := x509.CreateCertificate(rand.Reader, template, root, &key.PublicKey, rootKey)
		if err != nil {
			return nil, nil, err
		}
		private, err := x509.MarshalECPrivateKey(key)
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}), err
	}
	if c.root, _, err = issue(root, rootKey); err != nil {
		return c, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, err
	}
	c.cert, c.key, err = issue(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "both sides"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, leafKey)
	if err != nil {
		return c, err
	}
	pair, err := tls.X509KeyPair(c.cert, c.key)
	if err != nil {
		return c, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.root)
	c.client = &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	return c, nil
}
