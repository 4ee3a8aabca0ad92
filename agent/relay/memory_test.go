// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/api"
)

const (
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	secretType   = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// item is a resource whose content is its version.
func item(kind, name, version string) *discoveryv3.Resource {
	return &discoveryv3.Resource{Name: name, Version: version, Resource: &anypb.Any{TypeUrl: kind, Value: []byte(version)}}
}

// turn is one response of meshd's, and what Envoy says to it.
type turn struct {
	kind    string
	items   []*discoveryv3.Resource
	removed []string
	refused bool
	leave   []string // names that Envoy unsubscribes from then
}

// play lets an Envoy that begins with nothing have these turns, through a relay with this memory.
func play(t *testing.T, s *setup, turns []turn) {
	t.Helper()
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(s.client.DeltaAggregatedResources(s.ctx))
	var up discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	begun := map[string]bool{}
	for i, turn := range turns {
		if !begun[turn.kind] {
			begun[turn.kind] = true
			check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: turn.kind}))
			if up == nil {
				up = <-s.delta
			}
			value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
			if turn.kind == listenerType {
				value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()) // for the name table
				check(t, up.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: NameTableType, Nonce: "names", Resources: []*discoveryv3.Resource{
					{Name: "shop", Version: "1", Resource: table(t, "pay.shop")},
				}}))
				value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
				<-s.tables
			}
		}
		nonce := fmt.Sprint(i)
		check(t, up.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: turn.kind, Nonce: nonce, Resources: turn.items, RemovedResources: turn.removed}))
		value[*discoveryv3.DeltaDiscoveryResponse](t)(down.Recv())
		verdict := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: turn.kind, ResponseNonce: nonce, ResourceNamesUnsubscribe: turn.leave}
		if turn.refused {
			verdict.ErrorDetail = &statuspb.Status{Message: "no"}
		}
		check(t, down.Send(verdict))
		value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
	}
	check(t, down.CloseSend())
}

// remember plays a life of configuration into a file.
func remember(t *testing.T, turns []turn) *Memory {
	t.Helper()
	s := start(t)
	m := &Memory{Path: filepath.Join(t.TempDir(), "configuration"), Node: "web-0"}
	s.relay.Memory = m
	play(t, s, turns)
	ended, end := context.WithCancel(t.Context())
	end()
	for !m.settled(turns) { // the last verdict is taken a moment after meshd has it
		if s.ctx.Err() != nil {
			t.Fatal("the memory does not learn")
		}
	}
	check(t, m.Run(ended))
	return m
}

// settled tells whether the last turn was taken; tests end with a listener of that name.
func (m *Memory) settled(turns []turn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	last := turns[len(turns)-1]
	_, ok := m.kinds[last.kind][last.items[0].GetName()]
	return ok
}

var life = []turn{
	{kind: clusterType, items: []*discoveryv3.Resource{item(clusterType, "a", "1"), item(clusterType, "b", "1")}},
	{kind: endpointType, items: []*discoveryv3.Resource{item(endpointType, "a", "1"), item(endpointType, "b", "1")}},
	{kind: clusterType, items: []*discoveryv3.Resource{item(clusterType, "a", "2")}, removed: []string{"b"}},
	{kind: endpointType, items: []*discoveryv3.Resource{item(endpointType, "a", "2")}, leave: []string{"b"}},
	{kind: clusterType, items: []*discoveryv3.Resource{item(clusterType, "a", "bad")}, refused: true},
	{kind: secretType, items: []*discoveryv3.Resource{item(secretType, "default", "secret")}},
	{kind: listenerType, items: []*discoveryv3.Resource{item(listenerType, "in", "1")}},
}

// While no meshd answers, an Envoy that starts gets what was accepted last, and once one does, it comes back with that.
func TestAnEnvoyStartsWithoutMeshd(t *testing.T) {
	t.Parallel()
	former := remember(t, life)
	if info, err := os.Stat(former.Path); err != nil || info.Mode() != 0o600 {
		t.Errorf("the file is %v, %v", info.Mode(), err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address := l.Addr().String()
	check(t, l.Close())
	said, tables := &log{}, make(chan *api.NameTable, 1)
	r := &Relay{
		Servers: servers.List{address}, Credentials: insecure.NewCredentials(), Log: slog.New(slog.NewTextHandler(said, nil)),
		Names: func(table *api.NameTable) { tables <- table }, Patience: time.Millisecond, Memory: &Memory{Path: former.Path, Node: former.Node},
	}
	r.Memory.Load()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(envoy(t, r).DeltaAggregatedResources(ctx))
	ask := func(kind string, names ...string) (got string) {
		t.Helper()
		check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: kind, ResourceNamesSubscribe: names}))
		answer := value[*discoveryv3.DeltaDiscoveryResponse](t)(down.Recv())
		for _, one := range answer.GetResources() {
			got += one.GetName() + "@" + one.GetVersion() + string(one.GetResource().GetValue()) + " "
		}
		check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: kind, ResponseNonce: answer.GetNonce()}))
		return got + strings.Join(answer.GetRemovedResources(), " ")
	}
	for _, c := range []struct {
		kind  string
		names []string
		want  string
	}{
		{clusterType, nil, "a@22 "}, {endpointType, []string{"a", "b"}, "a@22 b"}, {endpointType, []string{"a"}, "a@22 "},
		{listenerType, []string{"*"}, "in@11 "}, {secretType, nil, ""},
	} {
		if got := ask(c.kind, c.names...); got != c.want {
			t.Errorf("%s %v: got %q, want %q", c.kind, c.names, got, c.want)
		}
	}
	if got := slices.Collect(maps.Keys((<-tables).GetTable())); !slices.Equal(got, []string{"pay.shop"}) {
		t.Errorf("names %v", got)
	}
	if !r.FromMemory() || r.Connected() || !strings.Contains(said.String(), "no meshd answers") {
		t.Errorf("from memory %v, connected %v; the log says %s", r.FromMemory(), r.Connected(), said)
	}
	for !r.Configured() {
		if ctx.Err() != nil {
			t.Fatal("Envoy has accepted listeners, and the agent does not know")
		}
	}
	// meshd is back.
	played := &upstream{delta: make(chan discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, 2), end: make(chan error, 2)}
	serve(t, address, func(g *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, played) })
	defer func() { played.end <- nil; played.end <- nil }()
	if _, err := down.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v", err)
	}
	again := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(envoy(t, r).DeltaAggregatedResources(ctx))
	check(t, again.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: clusterType, InitialResourceVersions: map[string]string{"a": "2"}}))
	for up := range played.delta {
		got, err := up.Recv()
		if err != nil {
			continue // of the stream that waited
		}
		if got.GetInitialResourceVersions()["a"] != "2" {
			t.Errorf("it comes back with %v", got)
		}
		break
	}
	if r.FromMemory() {
		t.Error("still from memory")
	}
}

// An Envoy that holds something waits for meshd as ever, and loses nothing of what it has said meanwhile.
func TestAnEnvoyThatHoldsSomethingWaits(t *testing.T) {
	t.Parallel()
	former := remember(t, life)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address := l.Addr().String()
	check(t, l.Close())
	r := &Relay{Servers: servers.List{address}, Credentials: insecure.NewCredentials(), Patience: time.Millisecond, Memory: &Memory{Path: former.Path, Node: former.Node}}
	r.Memory.Load()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(envoy(t, r).DeltaAggregatedResources(ctx))
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: clusterType, InitialResourceVersions: map[string]string{"a": "1"}}))
	for r.lastFailure() == "unknown" { // patience is long over when a connection has failed
		if ctx.Err() != nil {
			t.Fatal("no connection was tried")
		}
	}
	played := &upstream{delta: make(chan discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, 1), end: make(chan error, 1)}
	serve(t, address, func(g *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, played) })
	defer func() { played.end <- nil }()
	up := <-played.delta
	if got := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()); got.GetInitialResourceVersions()["a"] != "1" {
		t.Errorf("meshd was told %v", got)
	}
	check(t, up.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: clusterType, Nonce: "1"}))
	value[*discoveryv3.DeltaDiscoveryResponse](t)(down.Recv())
}

// A file that is not what was written, or not for this node, is as good as none, and the log says why.
func TestAMemoryThatIsNotUsable(t *testing.T) {
	t.Parallel()
	former := remember(t, life)
	good := value[[]byte](t)(os.ReadFile(former.Path))
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	for name, c := range map[string]struct {
		content []byte
		node    string
		want    string
	}{
		"damaged":     {flipped, "web-0", "checksum"},
		"cut short":   {good[:len(good)-3], "web-0", "checksum"},
		"empty":       {nil, "web-0", "does not begin"},
		"another's":   {good, "web-1", "it is that of"},
		"a newer one": {bytes.Replace(good, []byte(`"v":1`), []byte(`"v":2`), 1), "web-0", "schema 2"},
		"noise":       {bytes.Repeat([]byte{0xff, '\n'}, 100), "web-0", "does not begin"},
	} {
		said := &log{}
		m := &Memory{Path: filepath.Join(t.TempDir(), "configuration"), Node: c.node, Log: slog.New(slog.NewTextHandler(said, nil))}
		check(t, os.WriteFile(m.Path, c.content, 0o600))
		m.Load()
		if !m.empty() || !strings.Contains(said.String(), c.want) || !strings.Contains(said.String(), "is not used") {
			t.Errorf("%s: empty %v, the log says %s", name, m.empty(), said)
		}
	}
	none := &log{}
	m := &Memory{Path: filepath.Join(t.TempDir(), "none"), Log: slog.New(slog.NewTextHandler(none, nil))}
	if m.Load(); !m.empty() || none.String() != "" {
		t.Errorf("the first start: %s", none)
	}
}

// No private key gets into the file, even if meshd should send one.
func TestNoKeyIsRemembered(t *testing.T) {
	t.Parallel()
	if slices.Contains(keptTypes, secretType) {
		t.Fatal("secrets are kept")
	}
	m := remember(t, life)
	if text := value[[]byte](t)(os.ReadFile(m.Path)); bytes.Contains(text, []byte("secret")) {
		t.Error("a secret is in the file")
	}
	said := &log{}
	m.Log = slog.New(slog.NewTextHandler(said, nil))
	key := &discoveryv3.Resource{Name: "k", Resource: &anypb.Any{TypeUrl: listenerType, Value: []byte("-----BEGIN EC PRIVATE KEY-----")}}
	m.apply(step{kind: listenerType, fresh: resources{"k": value[[]byte](t)(Codec{}.bytes(key))}}, false)
	m.save()
	if _, err := os.Stat(m.Path); !errors.Is(err, os.ErrNotExist) || !strings.Contains(said.String(), "private key") {
		t.Errorf("the file: %v; the log says %s", err, said)
	}
}

func (c Codec) bytes(v any) ([]byte, error) {
	data, err := c.Marshal(v)
	return data.Materialize(), err
}

// A disk that takes nothing does not end the agent.
func TestAFullDisk(t *testing.T) {
	t.Parallel()
	said := &log{}
	m := &Memory{Path: filepath.Join(t.TempDir(), "missing", "configuration"), Log: slog.New(slog.NewTextHandler(said, nil))}
	m.apply(step{kind: listenerType, fresh: resources{"in": nil}}, true)
	ended, end := context.WithCancel(t.Context())
	end()
	if check(t, m.Run(ended)); !strings.Contains(said.String(), "not kept on disk") {
		t.Errorf("the log says %s", said)
	}
}

// Whatever is in the file, it is refused or can be served.
func FuzzMemory(f *testing.F) {
	f.Add(encodeKinds(map[string]resources{listenerType: {"in": []byte("\x1a\x02in")}}))
	f.Fuzz(func(t *testing.T, body []byte) {
		kinds, err := decodeKinds(body)
		if err != nil {
			return
		}
		m := &Memory{kinds: kinds}
		again, err := decodeKinds(encodeKinds(kinds))
		if err != nil || len(again) != len(kinds) {
			t.Fatalf("%d types became %d: %v", len(kinds), len(again), err)
		}
		for kind := range kinds {
			answer := m.response(kind, "1", func(string) bool { return true }, []string{"x"})
			if err := each(answer, fieldDeltaResponseResources, func([]byte) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
	})
}
