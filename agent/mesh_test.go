// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"crypto/tls"
	"errors"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/caserver"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

const nameTableType = "type.googleapis.com/istio.networking.nds.v1.NameTable"

// mesh is a meshd for one test: a real authority, and discovery that sends
// what the test put in.
type mesh struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	api.UnimplementedWorkloadsServer
	*catest.CA
	jwt     *ca.JWTAuthority
	cluster *catest.Cluster
	token   string // a join token for web-1 in namespace legacy on network n1
	address string
	server  *grpc.Server
	issuing *caserver.Server

	mu        sync.Mutex
	resources map[string]map[string]*anypb.Any
	streams   []stream
	cut       chan struct{} // closed to end all discovery streams
	reports   []*api.HealthReport
}

// stream is what was seen of one discovery stream.
type stream struct {
	peer    string // URI of the client certificate
	node    string
	initial map[string][]string // type -> names held at the start
	acks    map[string]int
	nacks   []string
}

// joinTokens is the one join token of a mesh.
type joinTokens struct {
	token string
	what  ca.JoinToken
	mu    sync.Mutex
	spent bool
}

func (j *joinTokens) Read(_ context.Context, token string) (ca.JoinToken, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if token != j.token || j.spent {
		return ca.JoinToken{}, ca.ErrJoinToken
	}
	return j.what, nil
}

func (j *joinTokens) Spend(_ context.Context, token string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if token != j.token || j.spent {
		return ca.ErrJoinToken
	}
	j.spent = true
	return nil
}

// Keys implements attest.Clusters.
func (m *mesh) Keys(context.Context) ([]attest.ClusterKeys, error) {
	return []attest.ClusterKeys{{ClusterID: m.cluster.UID, Name: "east", Issuer: catest.Issuer, JWKS: m.cluster.JWKS()}}, nil
}

// newMesh serves on a listener, under a name that its certificate carries.
func newMesh(t *testing.T, l net.Listener) *mesh {
	t.Helper()
	m := &mesh{
		CA:        catest.New(t),
		cluster:   catest.NewCluster(t, "east-uid"),
		address:   l.Addr().String(),
		resources: map[string]map[string]*anypb.Any{},
		cut:       make(chan struct{}),
	}
	tokens := &joinTokens{}
	var id string
	tokens.token, id, _ = ca.NewJoinToken()
	tokens.what = ca.JoinToken{ID: id, Name: "web-1", Network: "n1", Namespace: "legacy", ServiceAccount: "web"}
	m.token = tokens.token
	attestor, err := attest.New(attest.Config{Authority: m.Authority, Clusters: m, JoinTokens: tokens})
	if err != nil {
		t.Fatal(err)
	}
	m.jwt, err = ca.OpenJWT(t.Context(), m.Authority, ca.JWTConfig{})
	if err != nil {
		t.Fatal(err)
	}
	issuing, err := caserver.New(caserver.Config{Authority: m.Authority, Attestor: attestor, JWT: m.jwt})
	if err != nil {
		t.Fatal(err)
	}
	m.issuing = issuing
	m.serve(t, l)
	return m
}

// serve begins to answer, at first or again.
func (m *mesh) serve(t *testing.T, l net.Listener) {
	t.Helper()
	host, _, _ := net.SplitHostPort(m.address)
	m.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(m.ServerTLS(t, host))))
	m.issuing.Register(m.server)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(m.server, m)
	api.RegisterWorkloadsServer(m.server, m)
	go m.server.Serve(l)
	t.Cleanup(m.server.Stop)
}

// roots writes the root certificates to a file.
func (m *mesh) roots(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	if err := os.WriteFile(path, m.Bundle().PEM(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func (m *mesh) put(t *testing.T, name string, message proto.Message) {
	t.Helper()
	body, err := anypb.New(message)
	if err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.resources[body.GetTypeUrl()] == nil {
		m.resources[body.GetTypeUrl()] = map[string]*anypb.Any{}
	}
	m.resources[body.GetTypeUrl()][name] = body
}

// breakStreams ends all discovery streams, as a meshd does that restarts.
func (m *mesh) breakStreams() {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.cut)
	m.cut = make(chan struct{})
}

// seen returns copies of what was seen, oldest stream first.
func (m *mesh) seen() []stream {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []stream
	for _, s := range m.streams {
		s.acks, s.initial, s.nacks = maps.Clone(s.acks), maps.Clone(s.initial), slices.Clone(s.nacks)
		out = append(out, s)
	}
	return out
}

// DeltaAggregatedResources sends everything of a type at its first request.
func (m *mesh) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	m.mu.Lock()
	index, cut := len(m.streams), m.cut
	m.streams = append(m.streams, stream{peer: uri(s.Context()), initial: map[string][]string{}, acks: map[string]int{}})
	m.mu.Unlock()
	requests, failed := make(chan *discoveryv3.DeltaDiscoveryRequest), make(chan error, 1)
	go func() {
		for {
			r, err := s.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- r:
			case <-s.Context().Done():
				return
			}
		}
	}()
	for nonce := 1; ; nonce++ {
		select {
		case <-cut:
			return errors.New("meshd restarts")
		case err := <-failed:
			return err
		case r := <-requests:
			if response := m.respond(index, r, nonce); response != nil {
				if err := s.Send(response); err != nil {
					return err
				}
			}
		}
	}
}

func (m *mesh) respond(index int, r *discoveryv3.DeltaDiscoveryRequest, nonce int) *discoveryv3.DeltaDiscoveryResponse {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.streams[index]
	if id := r.GetNode().GetId(); id != "" {
		s.node = id
	}
	if r.GetResponseNonce() != "" {
		if e := r.GetErrorDetail(); e != nil {
			s.nacks = append(s.nacks, e.GetMessage())
		} else {
			s.acks[r.GetTypeUrl()]++
		}
		return nil
	}
	for name := range r.GetInitialResourceVersions() {
		s.initial[r.GetTypeUrl()] = append(s.initial[r.GetTypeUrl()], name)
	}
	response := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.GetTypeUrl(), Nonce: strconv.Itoa(nonce)}
	for name, body := range m.resources[r.GetTypeUrl()] {
		response.Resources = append(response.Resources, &discoveryv3.Resource{Name: name, Version: "1", Resource: body})
	}
	return response
}

// Report records and accepts.
func (m *mesh) Report(s api.Workloads_ReportServer) error {
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		m.mu.Lock()
		m.reports = append(m.reports, r)
		m.mu.Unlock()
		if err := s.Send(&api.HealthAck{IntervalSeconds: 1, Accepted: true}); err != nil {
			return err
		}
	}
}

func (m *mesh) lastReport() *api.HealthReport {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.reports) == 0 {
		return &api.HealthReport{Message: "none yet"}
	}
	return m.reports[len(m.reports)-1]
}

func uri(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 || len(info.State.PeerCertificates[0].URIs) == 0 {
		return ""
	}
	return info.State.PeerCertificates[0].URIs[0].String()
}

// envoyPath finds the Envoy that `make` fetched, or skips.
func envoyPath(t *testing.T) string {
	t.Helper()
	candidates := []string{os.Getenv("ENVOY")}
	if cache, err := os.UserCacheDir(); err == nil {
		found, _ := filepath.Glob(filepath.Join(cache, "isthmus", "envoy-*", "envoy"))
		candidates = append(candidates, found...)
	}
	candidates = append(candidates, "envoy")
	for _, candidate := range candidates {
		if candidate == "" {
			continue
		}
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	t.Skip("no Envoy: set $ENVOY, or let make fetch it")
	return ""
}

// eventually waits for a condition, and tells at the end why it never held.
func eventually(t *testing.T, what string, condition func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for began := time.Now(); ; {
		err := condition()
		if err == nil {
			t.Logf("%s after %v", what, time.Since(began).Round(time.Millisecond))
			return
		}
		select {
		case <-deadline:
			t.Fatalf("%s: not in 30 s: %v", what, err)
		case <-tick.C:
		}
	}
}

// mutual is the configuration of a client with a mesh identity. Names of
// services are not in certificates, so the peer is judged by the caller.
func (m *mesh) mutual(t *testing.T, alpn ...string) *tls.Config {
	t.Helper()
	config := m.ClientTLS(m.Leaf(t, catest.Subject("kube:east-uid", "client-uid", "shop")))
	config.InsecureSkipVerify = true
	config.NextProtos = alpn
	return config
}
