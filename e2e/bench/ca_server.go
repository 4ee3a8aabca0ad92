// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/caserver"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// authoritySwitch makes this program the certificate service that is measured, apart from who asks it, so that the
// processor time of its process is that of the service alone. Its value is the folder for the audit log.
const authoritySwitch = "ISTHMUS_BENCH_AUTHORITY"

// authorityAccess is what the service tells who measures it, as a line on standard output.
type authorityAccess struct {
	GRPC      string   `json:"grpc"`      // the certificate service, as meshd serves it
	Handshake string   `json:"handshake"` // mutual TLS and nothing else
	Chains    [][]byte `json:"chains"`    // PEM of workloads' certificates, all for one key
	Key       []byte   `json:"key"`
	Roots     []byte   `json:"roots"`
}

// authorityProcess serves until its standard input ends. Each line of that is something to do in process:
// {"do":"bare","times":100}; the answer is a line when it is done.
func authorityProcess(dir string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s, err := newAuthorityService(ctx, dir)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(s.access); err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var order struct {
			Do    string `json:"do"`
			Times int    `json:"times"`
		}
		if err := json.Unmarshal(in.Bytes(), &order); err != nil {
			return err
		}
		if err := s.do(ctx, order.Do, order.Times); err != nil {
			return err
		}
		if err := out.Encode(map[string]int64{"writes": s.writes.Load()}); err != nil {
			return err
		}
	}
	return in.Err()
}

// authorityService is the authority on loopback.
type authorityService struct {
	ca.State
	writes    atomic.Int64
	authority *ca.Authority
	subject   ca.Subject
	csr       []byte
	access    authorityAccess

	bareKey  crypto.Signer
	bareCert *x509.Certificate
}

// Create implements ca.State, and counts.
func (s *authorityService) Create(ctx context.Context, key string, value []byte) (ca.Version, error) {
	s.writes.Add(1)
	return s.State.Create(ctx, key, value)
}

// Replace implements ca.State, and counts.
func (s *authorityService) Replace(ctx context.Context, key string, value []byte, version ca.Version) (ca.Version, error) {
	s.writes.Add(1)
	return s.State.Replace(ctx, key, value, version)
}

func newAuthorityService(ctx context.Context, dir string) (*authorityService, error) {
	s := &authorityService{
		State: new(ca.Memory), subject: ca.Subject{Source: "kube:bench", Instance: "pod-1", Namespace: "shop", ServiceAccount: "reviews"},
	}
	td, err := ca.ParseTrustDomain("cluster.local")
	if err != nil {
		return nil, err
	}
	sealer, err := ca.NewFileSealer(filepath.Join(dir, "sealing.key"))
	if err != nil {
		return nil, err
	}
	audit, err := ca.OpenAudit(filepath.Join(dir, "audit.jsonl"), "bench", nil)
	if err != nil {
		return nil, err
	}
	go audit.Run(ctx)
	quiet := slog.New(slog.DiscardHandler)
	s.authority, err = ca.Open(ctx, ca.Config{
		TrustDomain: td, State: s, Sealer: sealer, Audit: audit, Log: quiet,
		Grants: ca.GrantFunc(func(ca.Source, string, string) error { return nil }),
	})
	if err != nil {
		return nil, err
	}
	if err := s.identify(ctx); err != nil {
		return nil, err
	}
	if err := s.makeBare(); err != nil {
		return nil, err
	}
	return s, s.listen(ctx, quiet)
}

// identify gives workloads their certificates, as many as connect in one round.
func (s *authorityService) identify(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), key)
	if err != nil {
		return err
	}
	s.csr = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	for n := range roundOf {
		subject := s.subject
		subject.Instance = fmt.Sprint("pod-", n)
		issued, err := s.authority.Issue(ctx, ca.Request{Subject: subject, CSR: s.csr})
		if err != nil {
			return err
		}
		s.access.Chains = append(s.access.Chains, issued.ChainPEM())
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	s.access.Roots = s.authority.Bundle().PEM()
	s.access.Key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded})
	return err
}

// makeBare makes an authority that is nothing but a key.
func (s *authorityService) makeBare() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bare"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), SubjectKeyId: []byte("bare"),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	s.bareKey = key
	s.bareCert, err = x509.ParseCertificate(der)
	return err
}

// do repeats something in process.
func (s *authorityService) do(ctx context.Context, what string, times int) error {
	for range times {
		var err error
		switch what {
		case "bare":
			err = s.bare()
		case "issue":
			_, err = s.authority.Issue(ctx, ca.Request{
				Subject: s.subject, CSR: s.csr, Credential: ca.Credential{Method: "certificate", Digest: "bench", Peer: "127.0.0.1:1"},
			})
		case "collect": // so that nobody pays for the rubbish of the one before
			runtime.GC()
		default:
			err = fmt.Errorf("cannot do %q", what)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bare is what no authority can do without: read a request, check that its sender has the key, make the
// certificate of an SVID, and read that back.
func (s *authorityService) bare() error {
	block, _ := pem.Decode(s.csr)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return err
	}
	if err := request.CheckSignature(); err != nil {
		return err
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/shop/sa/reviews"}},
	}, s.bareCert, request.PublicKey, s.bareKey)
	if err != nil {
		return err
	}
	_, err = x509.ParseCertificate(der)
	return err
}

// listen opens the certificate service as meshd has it, and beside it a port that does handshakes only.
func (s *authorityService) listen(ctx context.Context, quiet *slog.Logger) error {
	attestor, err := attest.New(attest.Config{Authority: s.authority})
	if err != nil {
		return err
	}
	// One workload asks for all of it here.
	certificates, err := caserver.New(caserver.Config{Authority: s.authority, Attestor: attestor, Every: time.Nanosecond, Burst: 1 << 20, Log: quiet})
	if err != nil {
		return err
	}
	serving, err := caserver.NewServing(ctx, caserver.ServingConfig{Authority: s.authority, Replica: "bench", Names: []string{"127.0.0.1"}, Log: quiet})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.access.GRPC = l.Addr().String()
	server := grpc.NewServer(append(xdsserver.Options(), grpc.Creds(credentials.NewTLS(serving.TLS("h2"))))...)
	certificates.Register(server)
	go server.Serve(l)
	config := serving.TLS("h2")
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, s.authority.Bundle().Pool()
	bare, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		return err
	}
	s.access.Handshake = bare.Addr().String()
	go shakeHands(bare)
	return nil
}

// shakeHands does the handshake of each connection, says so with a byte, and closes it.
func shakeHands(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			conn.Write([]byte{1})
		}()
	}
}
