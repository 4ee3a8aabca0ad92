// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/api"
)

// upstream is a meshd whose streams the test plays by hand.
type upstream struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	delta chan discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	world chan discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer
	end   chan error
}

func (u *upstream) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	u.delta <- s
	return <-u.end
}

func (u *upstream) StreamAggregatedResources(s discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	u.world <- s
	return <-u.end
}

// log collects what is told to people.
type log struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

type setup struct {
	*upstream
	relay  *Relay
	client discoveryv3.AggregatedDiscoveryServiceClient
	tables chan *api.NameTable
	log    *log
	ctx    context.Context
}

func serve(t *testing.T, address string, register func(*grpc.Server), options ...grpc.ServerOption) (*grpc.Server, string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	register(server)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	return server, l.Addr().String()
}

func start(t *testing.T) *setup {
	t.Helper()
	s := &setup{
		upstream: &upstream{
			delta: make(chan discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, 1),
			world: make(chan discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer, 1),
			end:   make(chan error, 1),
		},
		tables: make(chan *api.NameTable, 4),
		log:    &log{},
	}
	t.Cleanup(func() { s.end <- nil })
	_, address := serve(t, "127.0.0.1:0", func(g *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s.upstream) })
	s.relay = &Relay{
		Servers: servers.List{address}, Credentials: insecure.NewCredentials(),
		Names: func(table *api.NameTable) { s.tables <- table },
		Log:   slog.New(slog.NewTextHandler(s.log, nil)),
	}
	s.client = envoy(t, s.relay)
	var cancel context.CancelFunc
	s.ctx, cancel = context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return s
}

// envoy is a client of the relay.
func envoy(t *testing.T, r *Relay) discoveryv3.AggregatedDiscoveryServiceClient {
	t.Helper()
	_, address := serve(t, "127.0.0.1:0", r.Register, grpc.ForceServerCodecV2(Codec{}))
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
}

func value[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func table(t *testing.T, host string) *anypb.Any {
	t.Helper()
	return value[*anypb.Any](t)(anypb.New(&api.NameTable{Table: map[string]*api.NameTable_NameInfo{host: {Ips: []string{"10.0.0.1"}}}}))
}

// The name table comes in parts, one for each service, and a stream after the first one asks
// only for what it does not hold.
func TestNamesComeInParts(t *testing.T) {
	t.Parallel()
	s := start(t)
	part := func(name, version, host string) *discoveryv3.Resource {
		return &discoveryv3.Resource{Name: name, Version: version, Resource: table(t, host)}
	}
	type answers = []*discoveryv3.DeltaDiscoveryResponse
	for i, c := range []struct {
		held    map[string]string // what the stream starts with
		answers answers
		tables  []string // the names after each answer; an answer of nothing changes none
	}{
		{nil, answers{
			{Resources: []*discoveryv3.Resource{part("a", "1", "a.shop"), part("b", "1", "b.shop")}},
			{},
			{Resources: []*discoveryv3.Resource{part("b", "2", "bee.shop")}, RemovedResources: []string{"a"}},
		}, []string{"a.shop b.shop", "", "bee.shop"}},
		{map[string]string{"b": "2"}, answers{
			{Resources: []*discoveryv3.Resource{part("c", "1", "c.shop")}},
			{RemovedResources: []string{"b", "c"}},
		}, []string{"bee.shop c.shop", "-"}},
	} {
		ctx, cancel := context.WithCancel(s.ctx)
		down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(s.client.DeltaAggregatedResources(ctx))
		check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerType}))
		up := <-s.delta
		value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
		asked := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
		if got := asked.GetInitialResourceVersions(); !maps.Equal(got, c.held) {
			t.Errorf("stream %d starts with %v, want %v", i, got, c.held)
		}
		for j, answer := range c.answers {
			answer.TypeUrl = NameTableType
			check(t, up.Send(answer))
			if got := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()); got.GetErrorDetail() != nil {
				t.Errorf("answer %d.%d is refused: %v", i, j, got)
			}
			if c.tables[j] == "" {
				continue
			}
			hosts := slices.Sorted(maps.Keys((<-s.tables).GetTable()))
			if got := strings.Join(hosts, " "); got != strings.Trim(c.tables[j], "-") {
				t.Errorf("after answer %d.%d the names are %q, want %q", i, j, got, c.tables[j])
			}
		}
		if len(s.tables) > 0 {
			t.Errorf("stream %d: one more table: %v", i, <-s.tables)
		}
		cancel()
		s.end <- nil
	}
}

func TestFramesPassUnchangedAndNamesAreAdded(t *testing.T) {
	t.Parallel()
	s := start(t)
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(s.client.DeltaAggregatedResources(s.ctx))
	asked := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerType, InitialResourceVersions: map[string]string{"a": "7"}}
	// A field that nobody knows yet must arrive too.
	asked.ProtoReflect().SetUnknown([]byte{0xa2, 0x06, 1, 'x'})
	check(t, down.Send(asked))
	up := <-s.delta
	if got := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()); !proto.Equal(got, asked) {
		t.Errorf("meshd got %v, want %v", got, asked)
	}
	if got := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()); got.GetTypeUrl() != NameTableType {
		t.Errorf("after the listeners meshd got %v, want a subscription to names", got)
	}

	answer := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: NameTableType, Nonce: "n1", Resources: []*discoveryv3.Resource{{Name: "nametable", Version: "v1", Resource: table(t, "a.shop")}}}
	check(t, up.Send(answer))
	if got := (<-s.tables).GetTable(); got["a.shop"] == nil {
		t.Errorf("table %v", got)
	}
	if got := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()); got.GetTypeUrl() != NameTableType || got.GetResponseNonce() != "n1" || got.GetErrorDetail() != nil {
		t.Errorf("meshd got %v, want an acknowledgement", got)
	}
	listeners := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: listenerType, Nonce: "n2"}
	check(t, up.Send(listeners))
	if got := value[*discoveryv3.DeltaDiscoveryResponse](t)(down.Recv()); !proto.Equal(got, listeners) {
		t.Errorf("envoy got %v, want %v and never a name table", got, listeners)
	}
	if s.relay.Configured() {
		t.Error("configured before Envoy accepted")
	}
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerType, ResponseNonce: "n2"}))
	value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "x", ResponseNonce: "n3", ErrorDetail: &statuspb.Status{Message: "no such filter"}}))
	value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "y"}))
	value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()) // so the two before were noted
	if !s.relay.Configured() {
		t.Error("not configured after Envoy accepted listeners")
	}
	if !strings.Contains(s.log.String(), "no such filter") {
		t.Errorf("the refusal was not told:\n%s", s.log)
	}
}

// The stream outlives the certificate that it was opened with: meshd is told of the next.
func TestMeshdIsToldWhenTheCertificateEnds(t *testing.T) {
	t.Parallel()
	s := start(t)
	var mu sync.Mutex
	ends, changed := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), make(chan struct{})
	s.relay.Expires = func() (time.Time, <-chan struct{}) {
		mu.Lock()
		defer mu.Unlock()
		return ends, changed
	}
	s.relay.Names = nil
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(s.client.DeltaAggregatedResources(s.ctx))
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerType}))
	up := <-s.delta
	value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
	told := func() string {
		t.Helper()
		got := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
		text := got.GetNode().GetMetadata().GetFields()[expiresKey].GetStringValue()
		got.Node = nil
		if !proto.Equal(got, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerType}) {
			t.Errorf("and it asks for %v", got)
		}
		return text
	}
	if got := told(); got != "2026-01-02T03:04:05Z" {
		t.Errorf("at the start: %q", got)
	}
	mu.Lock()
	ends = ends.Add(time.Hour)
	close(changed)
	changed = make(chan struct{})
	mu.Unlock()
	if got := told(); got != "2026-01-02T04:04:05Z" {
		t.Errorf("after a renewal: %q", got)
	}
}

func TestABadNameTableIsRefusedAndTheStreamGoesOn(t *testing.T) {
	t.Parallel()
	s := start(t)
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(s.client.DeltaAggregatedResources(s.ctx))
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerType}))
	up := <-s.delta
	value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
	value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv())
	bad := &anypb.Any{TypeUrl: NameTableType, Value: []byte{0xff}}
	check(t, up.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: NameTableType, Nonce: "n1", Resources: []*discoveryv3.Resource{{Resource: bad}}}))
	if got := value[*discoveryv3.DeltaDiscoveryRequest](t)(up.Recv()); got.GetResponseNonce() != "n1" || got.GetErrorDetail() == nil {
		t.Errorf("meshd got %v, want a refusal", got)
	}
	check(t, up.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: listenerType, Nonce: "n2"}))
	value[*discoveryv3.DeltaDiscoveryResponse](t)(down.Recv())
}

func TestTheOtherVariant(t *testing.T) {
	t.Parallel()
	s := start(t)
	down := value[discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient](t)(s.client.StreamAggregatedResources(s.ctx))
	check(t, down.Send(&discoveryv3.DiscoveryRequest{TypeUrl: listenerType}))
	up := <-s.world
	value[*discoveryv3.DiscoveryRequest](t)(up.Recv())
	if got := value[*discoveryv3.DiscoveryRequest](t)(up.Recv()); got.GetTypeUrl() != NameTableType {
		t.Errorf("got %v", got)
	}
	check(t, up.Send(&discoveryv3.DiscoveryResponse{TypeUrl: NameTableType, Nonce: "n", VersionInfo: "v", Resources: []*anypb.Any{table(t, "a.shop")}}))
	<-s.tables
	if got := value[*discoveryv3.DiscoveryRequest](t)(up.Recv()); got.GetVersionInfo() != "v" || got.GetResponseNonce() != "n" {
		t.Errorf("acknowledged by %v", got)
	}
}

func TestTheEndOfMeshdIsTheEndForEnvoy(t *testing.T) {
	t.Parallel()
	s := start(t)
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(s.client.DeltaAggregatedResources(s.ctx))
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "x"}))
	value[*discoveryv3.DeltaDiscoveryRequest](t)((<-s.delta).Recv())
	if !s.relay.Connected() {
		t.Error("not connected")
	}
	s.end <- errors.New("out of grant")
	if _, err := down.Recv(); err == nil || !strings.Contains(err.Error(), "out of grant") {
		t.Errorf("Envoy sees %v, want meshd's reason", err)
	}
}

// Envoy's stream waits, and a person reads why, until meshd is there.
func TestAMeshdThatIsNotThereYet(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address := l.Addr().String()
	l.Close()
	told := &log{}
	r := &Relay{Servers: servers.List{address}, Credentials: insecure.NewCredentials(), Log: slog.New(slog.NewTextHandler(told, nil))}
	client := envoy(t, r)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	down := value[discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient](t)(client.DeltaAggregatedResources(ctx))
	check(t, down.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "x"}))
	for !strings.Contains(told.String(), "connection refused") {
		select {
		case <-ctx.Done():
			t.Fatalf("never told:\n%s", told)
		case <-time.After(20 * time.Millisecond):
		}
	}
	u := &upstream{delta: make(chan discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, 1), end: make(chan error, 1)}
	defer func() { u.end <- nil }()
	serve(t, address, func(g *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, u) })
	if got := value[*discoveryv3.DeltaDiscoveryRequest](t)((<-u.delta).Recv()); got.GetTypeUrl() != "x" {
		t.Errorf("got %v", got)
	}
}

func FuzzText(f *testing.F) {
	seed, _ := proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "x", ResponseNonce: "n"})
	f.Add(seed)
	f.Add([]byte{0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := text(data, fieldDeltaRequestType)
		var message discoveryv3.DeltaDiscoveryRequest
		if proto.Unmarshal(data, &message) != nil {
			return
		}
		if err != nil {
			t.Fatalf("refused what protobuf accepts: %v", err)
		}
		if string(got) != message.GetTypeUrl() {
			t.Fatalf("%q, protobuf says %q", got, message.GetTypeUrl())
		}
	})
}

// What meshd answers never brings the agent down, and what is held of it is whole.
func FuzzNames(f *testing.F) {
	value, _ := proto.Marshal(&api.NameTable{Table: map[string]*api.NameTable_NameInfo{"a.shop": {Ips: []string{"10.0.0.1"}}}})
	part := &anypb.Any{TypeUrl: NameTableType, Value: value}
	delta, _ := proto.Marshal(&discoveryv3.DeltaDiscoveryResponse{Resources: []*discoveryv3.Resource{{Name: "a", Version: "1", Resource: part}}, RemovedResources: []string{"b"}})
	world, _ := proto.Marshal(&discoveryv3.DiscoveryResponse{Resources: []*anypb.Any{part}})
	f.Add(delta, world)
	f.Add([]byte{0xff}, []byte{})
	f.Fuzz(func(t *testing.T, delta, world []byte) {
		var held names
		if a, err := incremental.answer(delta); err == nil {
			held = held.after(a)
			if len(held.parts) != len(held.versions) {
				t.Fatalf("%d parts with %d versions", len(held.parts), len(held.versions))
			}
			held.table()
		}
		if a, err := stateOfTheWorld.answer(world); err == nil {
			held.after(a).table()
		}
	})
}
