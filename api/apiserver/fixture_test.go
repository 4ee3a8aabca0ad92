// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	caetcd "github.com/isthmus-mesh/isthmus/ca/etcd"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// database is one embedded etcd for all tests, each below a prefix of its own.
var database *etcd.Database

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "apiserver-test-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if database, err = etcd.Open(context.Background(), etcd.DatabaseConfig{DataDir: dir, Unsynced: true}); err != nil {
		panic(err)
	}
	defer database.Close()
	return m.Run()
}

var prefixes atomic.Int64

// world is a meshd without its sources and proxies, which the test plays.
type world struct {
	*apiserver.Server
	ca      *catest.CA
	store   *etcd.Store
	sources sources
	proxies proxies
	address string // of the admin port
	mesh    string // of the agents' port
	client  api.AdminClient
}

// sources is what the test says that this replica syncs.
type sources struct {
	mu     sync.Mutex
	states []registry.SourceState
}

func (s *sources) Sources() []registry.SourceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.states
}

func (s *sources) set(states ...registry.SourceState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states = states
}

// proxies is what the test says that is connected.
type proxies struct {
	mu     sync.Mutex
	states []xdsserver.ProxyStatus
}

func (p *proxies) Proxies() []xdsserver.ProxyStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.states
}

func (p *proxies) set(states ...xdsserver.ProxyStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.states = states
}

func (p *proxies) Disconnect(which func(xds.Proxy) bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	var rest []xdsserver.ProxyStatus
	for _, s := range p.states {
		if !which(s.Proxy) {
			rest = append(rest, s)
		}
	}
	gone := len(p.states) - len(rest)
	p.states = rest
	return gone
}

// sealer binds a value to its name without hiding it.
type sealer struct{}

func (sealer) Seal(name string, plain []byte) ([]byte, error) {
	return append([]byte("sealed "+name+"\n"), plain...), nil
}

func (sealer) Open(name string, sealed []byte) ([]byte, error) {
	plain, ok := bytes.CutPrefix(sealed, []byte("sealed "+name+"\n"))
	if !ok {
		return nil, fmt.Errorf("sealed under another name than %s", name)
	}
	return plain, nil
}

func newWorld(t *testing.T, options ...func(*apiserver.Config)) *world {
	t.Helper()
	prefix := fmt.Sprintf("/test%d/", prefixes.Add(1))
	w := &world{ca: catest.New(t)}
	w.store = etcd.New(etcd.StoreConfig{Client: database.Client(), Prefix: prefix, Sealer: sealer{}, Replica: "meshd-0"})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.store.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	<-w.store.Ready()
	tokens, err := caetcd.NewTokens(database.Client(), prefix+"ca/", nil)
	if err != nil {
		t.Fatal(err)
	}
	attestor, err := attest.New(attest.Config{Authority: w.ca.Authority, JoinTokens: tokens})
	if err != nil {
		t.Fatal(err)
	}
	serving := w.ca.Serving(t, "127.0.0.1")
	cfg := apiserver.Config{
		Store: w.store, Authority: w.ca.Authority, Authenticator: attestor, Tokens: tokens,
		Audit: w.ca.Audit, AuditPath: w.ca.AuditPath, Sources: &w.sources, Proxies: &w.proxies,
		Certificate: func() *tls.Certificate { return &serving },
		Advertised:  []string{"meshd.example:15012"}, AdminAddress: "meshd.example:8443",
		Replica: "meshd-0", Version: "v0.1.0", EtcdMode: "embedded", Started: time.Now(), DrainPause: 10 * time.Millisecond,
		Log: slog.New(slog.DiscardHandler),
	}
	for _, option := range options {
		option(&cfg)
	}
	if w.Server, err = apiserver.New(cfg); err != nil {
		t.Fatal(err)
	}
	w.listen(t)
	return w
}

// listen opens the two ports.
func (w *world) listen(t *testing.T) {
	t.Helper()
	config := w.ca.ServerTLS(t, "127.0.0.1")
	config.NextProtos = []string{"h2", "http/1.1"}
	admin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.address = admin.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- w.Serve(ctx, admin, config) }()
	mesh, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.mesh = mesh.Addr().String()
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(w.ca.ServerTLS(t, "127.0.0.1"))))
	w.RegisterWorkloads(srv)
	go srv.Serve(mesh)
	w.client = api.NewAdminClient(w.dial(t, w.address, w.ca.Admin(t)))
	t.Cleanup(func() {
		srv.Stop()
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
}

// dial opens a connection that shows these certificates.
func (w *world) dial(t *testing.T, address string, certificates ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(w.ca.ClientTLS(certificates...))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// web is an HTTP client that shows these certificates.
func (w *world) web(certificates ...tls.Certificate) *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: w.ca.ClientTLS(certificates...), DisableKeepAlives: true}}
}

func (w *world) url(path string) string { return "https://" + w.address + path }

// adminConfig is an admin.conf for this world.
func (w *world) adminConfig(t *testing.T) *api.AdminConfig {
	t.Helper()
	admin := w.ca.Admin(t)
	var chain bytes.Buffer
	for _, der := range admin.Certificate {
		pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	key, err := x509.MarshalPKCS8PrivateKey(admin.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return &api.AdminConfig{
		APIVersion: api.Version, Kind: api.AdminConfigKind, Server: "https://" + w.address, TrustDomain: catest.TrustDomain,
		Root: string(w.ca.Bundle().PEM()), Certificate: chain.String(),
		Key: string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
	}
}

// request is a join of a cluster with a signing key of its own.
func request(t *testing.T, uid, name, network string) *api.RegisterClusterRequest {
	t.Helper()
	m := registrytest.Member(t, federation.ClusterID(uid), name)
	return &api.RegisterClusterRequest{
		Cluster: &api.Cluster{
			Metadata: &api.Metadata{Name: name, Uid: uid},
			Spec: &api.ClusterSpec{
				Role: "primary", Network: network, ApiServer: "https://192.0.2.1:6443", Issuer: m.Issuer, IssuerKeys: m.IssuerKeys,
			},
		},
		Reader: &api.Credential{Token: "reader"}, Writer: &api.Credential{Token: "writer"},
	}
}

func (w *world) join(t *testing.T, uid, name, network string) federation.SourceID {
	t.Helper()
	if _, err := w.client.RegisterCluster(t.Context(), request(t, uid, name, network)); err != nil {
		t.Fatalf("join %s: %v", name, err)
	}
	id := federation.ClusterID(uid)
	registrytest.Eventually(t, w.store, name+" is a member", func(s *federation.Snapshot) bool { return s.Clusters[id] != nil })
	return federation.KubeSource(id)
}

// report has a source say what it sees.
func (w *world) report(t *testing.T, source federation.SourceID, level registry.Level) {
	t.Helper()
	session, err := w.store.Begin(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := session.Apply(t.Context(), &level); err != nil {
		t.Fatal(err)
	}
	if err := session.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, record := range level.Records {
		registrytest.Eventually(t, w.store, "records of "+string(source), func(s *federation.Snapshot) bool {
			for _, r := range s.Records[name] {
				if r.Source == source && len(r.Endpoints) == len(record.Endpoints) {
					return true
				}
			}
			return false
		})
	}
}
