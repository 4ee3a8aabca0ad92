// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	mesh "github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// gated is a server behind a gate, over TLS.
type gated struct {
	t       *testing.T
	address string
	client  *tls.Config
}

func newGated(t *testing.T, l xdsserver.Limits) *gated {
	t.Helper()
	certificate, pool := selfSigned(t)
	gate := xdsserver.NewGate(l)
	source := &source{}
	source.set("C a=1")
	server := xdsserver.New(xdsserver.Config{
		Source: source, Gate: gate, Authenticate: func(context.Context) (xdsserver.Peer, error) { return xdsserver.Peer{}, nil },
	})
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	g := grpc.NewServer(append(xdsserver.Options(), grpc.Creds(gate.Credentials(credentials.NewTLS(config))))...)
	server.Register(g)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(gate.Listener(listener)) }()
	t.Cleanup(g.Stop)
	return &gated{t, listener.Addr().String(), &tls.Config{RootCAs: pool, ServerName: "gated", NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}}
}

func (g *gated) dial() net.Conn {
	g.t.Helper()
	conn, err := net.Dial("tcp", g.address)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { conn.Close() })
	return conn
}

// shake dials and shakes hands.
func (g *gated) shake() (net.Conn, error) {
	conn := tls.Client(g.dial(), g.client)
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return nil, err
	}
	return conn, conn.HandshakeContext(g.t.Context())
}

// welcome tells whether the server answers over a connection: it closes those it does not
// want.
func welcome(conn net.Conn) bool {
	_, err := conn.Read(make([]byte, 1))
	return err == nil
}

func TestASilentPeerHoldsUpNoHandshake(t *testing.T) {
	t.Parallel()
	g := newGated(t, xdsserver.Limits{Handshakes: 1})
	for range 5 {
		g.dial()
	}
	conn, err := g.shake()
	if err != nil || !welcome(conn) {
		t.Error(err)
	}
}

func TestOneConnectionTooMany(t *testing.T) {
	t.Parallel()
	g := newGated(t, xdsserver.Limits{Connections: 2})
	one, err := g.shake()
	if err != nil || !welcome(one) {
		t.Fatal(err)
	}
	two, err := g.shake()
	if err != nil || !welcome(two) {
		t.Fatal(err)
	}
	if _, err := g.shake(); err == nil {
		t.Error("a third one was let in")
	}
	one.Close()
	for deadline := time.Now().Add(20 * time.Second); ; {
		if conn, err := g.shake(); err == nil && welcome(conn) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("none is let in although one has gone")
		}
	}
}

func TestOneStrangerTooMany(t *testing.T) {
	t.Parallel()
	g := newGated(t, xdsserver.Limits{Strangers: 2})
	known, err := g.shake() // is a stranger no more
	if err != nil || !welcome(known) {
		t.Fatal(err)
	}
	g.dial()
	g.dial()
	third := g.dial()
	if err := third.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := third.Read(make([]byte, 1)); err != io.EOF && !strings.Contains(err.Error(), "reset") {
		t.Errorf("a third stranger: %v", err)
	}
}

func TestStreamsGoThroughTheGate(t *testing.T) {
	t.Parallel()
	g := newGated(t, xdsserver.Limits{Names: 100})
	conn, err := grpc.NewClient(g.address, grpc.WithTransportCredentials(credentials.NewTLS(g.client)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	for range 20 {
		c := newTalkOn(t, conn)
		c.subscribe(mesh.ClusterType)
		c.wantAcked("C a=1")
	}
	for what, r := range map[string]*discoveryv3.DeltaDiscoveryRequest{
		"too many names": {TypeUrl: mesh.EndpointType, ResourceNamesSubscribe: strings.Split(strings.Repeat("x,", 101), ",")},
		"too many bytes": {TypeUrl: mesh.EndpointType, ResourceNamesSubscribe: []string{strings.Repeat("x", 9<<20)}},
	} {
		c := newTalkOn(t, conn)
		c.send(r)
		if err := <-c.err; status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// selfSigned is a certificate for the server, and who trusts it.
func selfSigned(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"gated"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}
