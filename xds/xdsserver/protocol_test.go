// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// source is a Source that a test sets by hand.
type source struct {
	mu        sync.Mutex
	resources xds.Resources
	revision  federation.Revision
	feeds     map[*handFeed]bool
}

type handFeed struct {
	source  *source
	changed chan struct{}
}

func (s *source) Attach(context.Context, xdsserver.Peer) (xdsserver.Feed, error) {
	f := &handFeed{s, make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.feeds == nil {
		s.feeds = map[*handFeed]bool{}
	}
	s.feeds[f] = true
	return f, nil
}

func (f *handFeed) Current() xdsserver.Frame {
	f.source.mu.Lock()
	defer f.source.mu.Unlock()
	return xdsserver.Frame{Resources: f.source.resources, Revision: f.source.revision}
}
func (f *handFeed) Changed() <-chan struct{} { return f.changed }

func (f *handFeed) Heard(xdsserver.Frame, xdsserver.Holdings) {}

func (f *handFeed) Close() {
	f.source.mu.Lock()
	defer f.source.mu.Unlock()
	delete(f.source.feeds, f)
}

// set replaces everything: "C a=1" is cluster a in version 1; E, L, R, N likewise.
func (s *source) set(lines ...string) {
	types := map[string]string{"C": xds.ClusterType, "E": xds.EndpointType, "L": xds.ListenerType, "R": xds.RouteType, "N": xds.NameTableType}
	r := xds.Resources{}
	for _, line := range lines {
		kind, rest, _ := strings.Cut(line, " ")
		name, version, _ := strings.Cut(rest, "=")
		version, _, _ = strings.Cut(version, " ") // what follows is only weight
		r[types[kind]] = append(r[types[kind]], xds.Resource{Name: name, Version: version, Body: []byte(rest)})
	}
	for _, list := range r {
		slices.SortFunc(list, func(a, b xds.Resource) int { return strings.Compare(a.Name, b.Name) })
	}
	s.put(r)
}

// put replaces everything.
func (s *source) put(r xds.Resources) {
	s.mu.Lock()
	s.resources = r
	s.revision++
	feeds := make([]*handFeed, 0, len(s.feeds))
	for f := range s.feeds {
		feeds = append(feeds, f)
	}
	s.mu.Unlock()
	for _, f := range feeds {
		select {
		case f.changed <- struct{}{}:
		default:
		}
	}
}

// bench is a server on an in-memory socket.
type bench struct {
	t      *testing.T
	source *source
	server *xdsserver.Server
	conn   *grpc.ClientConn
}

func newBench(t *testing.T, lines ...string) *bench {
	t.Helper()
	b := &bench{t: t, source: &source{}}
	b.source.set(lines...)
	b.server = xdsserver.New(xdsserver.Config{
		Source:       b.source,
		Authenticate: func(context.Context) (xdsserver.Peer, error) { return xdsserver.Peer{}, nil },
	})
	b.conn = dialServer(t, b.server)
	return b
}

func dialServer(t *testing.T, s *xdsserver.Server) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer(xdsserver.Options()...)
	s.Register(g)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return l.Dial() }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// talk is a client's end of a delta stream.
type talk struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	got    chan *discoveryv3.DeltaDiscoveryResponse
	err    chan error
	first  bool
}

func (b *bench) delta() *talk {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	b.t.Cleanup(cancel)
	st, err := discoveryv3.NewAggregatedDiscoveryServiceClient(b.conn).DeltaAggregatedResources(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	c := &talk{t: b.t, stream: st, got: make(chan *discoveryv3.DeltaDiscoveryResponse, 100), err: make(chan error, 1), first: true}
	go func() {
		for {
			r, err := st.Recv()
			if err != nil {
				c.err <- err
				return
			}
			c.got <- r
		}
	}()
	return c
}

func (c *talk) send(r *discoveryv3.DeltaDiscoveryRequest) {
	c.t.Helper()
	if c.first {
		r.Node, c.first = &corev3.Node{Id: "n"}, false
	}
	if err := c.stream.Send(r); err != nil {
		c.t.Fatal(err)
	}
}

func (c *talk) subscribe(typeURL string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

func (c *talk) ack(r *discoveryv3.DeltaDiscoveryResponse) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
}

func (c *talk) nack(r *discoveryv3.DeltaDiscoveryResponse, message string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, ErrorDetail: &statuspb.Status{Message: message}})
}

// want receives one response and compares it: "C a=1 b=2 -c".
func (c *talk) want(text string) *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case r := <-c.got:
		if got := showDelta(r); got != text {
			c.t.Fatalf("got %q, want %q", got, text)
		}
		return r
	case err := <-c.err:
		c.t.Fatalf("stream ended: %v, want %q", err, text)
	case <-time.After(5 * time.Second):
		c.t.Fatalf("nothing, want %q", text)
	}
	return nil
}

// wantAcked is want, acknowledged.
func (c *talk) wantAcked(text string) { c.t.Helper(); c.ack(c.want(text)) }

// silent checks that nothing is outstanding: an answer to a new question comes first.
func (c *talk) silent() {
	c.t.Helper()
	probe := fmt.Sprintf("probe-%d", time.Now().UnixNano())
	c.subscribe("type.googleapis.com/envoy.test.Probe", probe)
	for {
		select {
		case r := <-c.got:
			if r.TypeUrl == "type.googleapis.com/envoy.test.Probe" {
				c.ack(r)
				return
			}
			c.t.Fatalf("unexpected %q", showDelta(r))
		case err := <-c.err:
			c.t.Fatal(err)
		case <-time.After(5 * time.Second):
			c.t.Fatal("the probe was not answered")
		}
	}
}

var letters = map[string]string{xds.ClusterType: "C", xds.EndpointType: "E", xds.ListenerType: "L", xds.RouteType: "R", xds.NameTableType: "N"}

func showDelta(r *discoveryv3.DeltaDiscoveryResponse) string {
	parts := []string{letters[r.TypeUrl]}
	for _, res := range r.Resources {
		parts = append(parts, string(res.Resource.Value))
	}
	for _, n := range r.RemovedResources {
		parts = append(parts, "-"+n)
	}
	return strings.Join(parts, " ")
}

const unknownType = "type.googleapis.com/istio.v1.HealthInformation"

func TestDelta(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		rule  string
		start []string
		story func(*bench, *talk)
	}{
		{"S3 types are independent", []string{"C a=1", "L l=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.ClusterType, "*")
			cds := c.want("C a=1")
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, ResponseNonce: cds.Nonce})
			c.ack(cds)
			c.wantAcked("L l=1")
		}},
		{"S4 a nonce on the first request of a type is a reconnect", []string{"C a=1"}, func(_ *bench, c *talk) {
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: "old"})
			c.wantAcked("C a=1")
		}},
		{"S6 unknown types keep the stream", []string{"C a=1"}, func(_ *bench, c *talk) {
			c.subscribe(unknownType)
			c.subscribe(xds.ClusterType)
			c.wantAcked("C a=1")
			c.silent()
		}},
		{"X1 a star subscribes to all", []string{"C a=1", "C b=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.ClusterType, "*")
			c.wantAcked("C a=1 b=1")
		}},
		{"X2 no name ever means all", []string{"C a=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.ClusterType)
			c.wantAcked("C a=1")
		}},
		{"X3 a name beside the legacy wildcard keeps it", []string{"C a=1"}, func(b *bench, c *talk) {
			c.subscribe(xds.ClusterType)
			c.wantAcked("C a=1")
			c.subscribe(xds.ClusterType, "a")
			c.wantAcked("C a=1")
			b.source.set("C a=1", "C b=1")
			c.wantAcked("C b=1")
		}},
		{"X4 endpoints are never meant as a whole", []string{"E a=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.EndpointType)
			c.silent()
		}},
		{"X5 nothing yet", []string{"C a=1"}, func(b *bench, c *talk) {
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResourceNamesSubscribe: []string{"*"}, ResourceNamesUnsubscribe: []string{"*"}})
			c.silent()
			c.subscribe(xds.ClusterType, "a")
			c.wantAcked("C a=1")
		}},
		{"D1 subscriptions on a stale nonce count", []string{"E a=1", "E b=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.EndpointType, "a")
			c.wantAcked("E a=1")
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResponseNonce: "stale", ResourceNamesSubscribe: []string{"b"}})
			c.wantAcked("E b=1")
		}},
		{"D1 a subscription rides on a NACK", []string{"E a=1", "E b=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.EndpointType, "a")
			r := c.want("E a=1")
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResponseNonce: r.Nonce, ResourceNamesSubscribe: []string{"b"}, ErrorDetail: &statuspb.Status{Message: "no"}})
			c.wantAcked("E b=1")
		}},
		{"D2 a name asked for again is answered again", []string{"E a=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.EndpointType, "a")
			c.wantAcked("E a=1")
			c.subscribe(xds.EndpointType, "a")
			c.wantAcked("E a=1")
		}},
		{"D2 a star asked for again is answered again", []string{"C a=1", "C b=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.ClusterType, "*")
			c.wantAcked("C a=1 b=1")
			c.subscribe(xds.ClusterType, "*")
			c.wantAcked("C a=1 b=1")
		}},
		{"D3 a missing name is said to be missing, and sent when it appears", []string{"E a=1"}, func(b *bench, c *talk) {
			c.subscribe(xds.EndpointType, "a", "x")
			c.wantAcked("E a=1 -x")
			b.source.set("E a=1", "E x=1")
			c.wantAcked("E x=1")
		}},
		{"D4 unsubscribing what is unknown is nothing", []string{"E a=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.EndpointType, "a")
			c.wantAcked("E a=1")
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesUnsubscribe: []string{"x"}})
			c.silent()
		}},
		{"D4 a name that the wildcard still covers is sent on unsubscribing", []string{"C a=1"}, func(_ *bench, c *talk) {
			c.subscribe(xds.ClusterType, "*", "a", "x")
			c.wantAcked("C a=1 -x")
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResourceNamesUnsubscribe: []string{"a", "x"}})
			c.wantAcked("C a=1 -x")
		}},
		{"D4 what was unsubscribed is not sent", []string{"E a=1"}, func(b *bench, c *talk) {
			c.subscribe(xds.EndpointType, "a")
			c.wantAcked("E a=1")
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesUnsubscribe: []string{"a"}})
			c.silent()
			b.source.set("E a=2")
			c.silent()
		}},
		{"D6 only what differs is sent to who comes back", []string{"C a=1", "C b=2", "C c=1"}, func(_ *bench, c *talk) {
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResourceNamesSubscribe: []string{"*"},
				InitialResourceVersions: map[string]string{"a": "1", "b": "1", "gone": "7"}})
			c.wantAcked("C b=2 c=1")
			c.wantAcked("C -gone")
		}},
		{"D6 nothing is sent to who is current", []string{"C a=1"}, func(_ *bench, c *talk) {
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, InitialResourceVersions: map[string]string{"a": "1"}})
			c.silent()
		}},
		{"D7 endpoints that are current are not resent", []string{"C a=1", "E a=1", "E b=2"}, func(_ *bench, c *talk) {
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, InitialResourceVersions: map[string]string{"a": "1"}})
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"a", "b"}, InitialResourceVersions: map[string]string{"a": "1", "b": "1"}})
			c.wantAcked("E b=2")
			c.silent()
		}},
		{"D7 but those of a cluster that was resent are", []string{"C a=2", "E a=1"}, func(_ *bench, c *talk) {
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, InitialResourceVersions: map[string]string{"a": "1"}})
			c.wantAcked("C a=2")
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"a"}, InitialResourceVersions: map[string]string{"a": "1"}})
			c.wantAcked("E a=1")
		}},
		{"D9 a burst while a response is in flight is one response", []string{"C a=1"}, func(b *bench, c *talk) {
			c.subscribe(xds.ClusterType)
			r := c.want("C a=1")
			b.source.set("C a=2")
			b.source.set("C a=3", "C b=1")
			c.ack(r)
			c.wantAcked("C a=3 b=1")
			c.silent()
		}},
		{"D10 what was refused is not resent until it changes", []string{"C a=1"}, func(b *bench, c *talk) {
			c.subscribe(xds.ClusterType)
			c.wantAcked("C a=1")
			b.source.set("C a=bad", "C b=1")
			c.nack(c.want("C a=bad b=1"), "cluster a is broken")
			c.silent()
			refused := b.server.Proxies()[0].Types[0].Refused
			if len(refused) != 1 || !slices.Equal(refused[0].Resources, []string{"a"}) || refused[0].Message != "cluster a is broken" {
				b.t.Errorf("%+v", refused)
			}
			b.source.set("C a=good", "C b=1")
			c.wantAcked("C a=good")
			c.silent()
			if refused := b.server.Proxies()[0].Types[0].Refused; len(refused) != 0 {
				b.t.Errorf("still %+v", refused)
			}
		}},
		{"D11 endpoints of a removed cluster", []string{"C a=1", "E a=1"}, func(b *bench, c *talk) {
			c.subscribe(xds.ClusterType)
			c.wantAcked("C a=1")
			c.subscribe(xds.EndpointType, "a")
			c.wantAcked("E a=1")
			b.source.set()
			c.wantAcked("C -a")
			c.wantAcked("E -a")
			c.subscribe(xds.EndpointType, "a")
			c.wantAcked("E -a")
		}},
		{"D12 an empty whole is answered", nil, func(_ *bench, c *talk) {
			c.subscribe(xds.ClusterType)
			c.wantAcked("C")
			c.silent()
		}},
		{"O1 make before break", []string{"C a=1", "E a=1", "L l=1", "R r=1", "N n=1"}, func(b *bench, c *talk) {
			subscribeAll(c)
			b.source.set("C b=1", "E b=1", "L m=1", "R r=2", "N n=2")
			// Clusters are acknowledged when they are warm: endpoints go out before.
			cds := c.want("C b=1")
			c.subscribe(xds.EndpointType, "b")
			c.wantAcked("E b=1")
			c.ack(cds)
			c.wantAcked("L m=1")
			c.wantAcked("R r=2")
			c.wantAcked("N n=2")
			c.wantAcked("L -l")
			c.wantAcked("C -a")
			c.wantAcked("E -a")
			c.silent()
		}},
		{"O2 endpoints of a changed cluster are resent", []string{"C a=1", "E a=1", "L l=1", "R r=1", "N n=1"}, func(b *bench, c *talk) {
			subscribeAll(c)
			b.source.set("C a=2", "E a=1", "L l=1", "R r=1", "N n=1")
			cds := c.want("C a=2")
			c.wantAcked("E a=1")
			c.ack(cds)
			c.silent()
		}},
		{"O3 listeners wait for clusters", []string{"C a=1", "E a=1", "L l=1", "R r=1", "N n=1"}, func(b *bench, c *talk) {
			subscribeAll(c)
			b.source.set("C a=1", "C b=1", "E a=1", "L l=2", "R r=1", "N n=1")
			cds := c.want("C b=1")
			c.silentButHeld()
			c.ack(cds)
			c.wantAcked("L l=2")
		}},
		{"O6 what did not change is not touched", []string{"C a=1", "E a=1", "L l=1", "R r=1", "N n=1"}, func(b *bench, c *talk) {
			subscribeAll(c)
			b.source.set("C a=1", "E a=2", "L l=1", "R r=1", "N n=1")
			c.wantAcked("E a=2")
			c.silent()
		}},
	} {
		t.Run(c.rule, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, c.start...)
			c.story(b, b.delta())
		})
	}
}

// silentButHeld checks that nothing comes for a moment: an unrelated question would be
// held back too.
func (c *talk) silentButHeld() {
	c.t.Helper()
	select {
	case r := <-c.got:
		c.t.Fatalf("unexpected %q", showDelta(r))
	case <-time.After(50 * time.Millisecond):
	}
}

// subscribeAll is a client of all types that has everything of O1's start.
func subscribeAll(c *talk) {
	c.t.Helper()
	c.subscribe(xds.ClusterType)
	c.wantAcked("C a=1")
	c.subscribe(xds.EndpointType, "a")
	c.wantAcked("E a=1")
	c.subscribe(xds.ListenerType)
	c.wantAcked("L l=1")
	c.subscribe(xds.RouteType, "r")
	c.wantAcked("R r=1")
	c.subscribe(xds.NameTableType)
	c.wantAcked("N n=1")
}

// Istio's agent reads the first resource of an answer and no other.
func TestStateOfTheWorldHasOneNameTable(t *testing.T) {
	t.Parallel()
	b := newBench(t, "N a.shop=1", "N b.shop=1")
	c := b.sotw()
	c.ask(xds.NameTableType)
	c.ack(c.want("N a.shop=1b.shop=1"))
	b.source.set("N b.shop=2")
	c.ack(c.want("N b.shop=2"))
	b.source.set()
	c.want("N ") // an empty table, not none
}

// full is a client's end of a SotW stream.
type full struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	got    chan *discoveryv3.DiscoveryResponse
	err    chan error
	first  bool
}

func (b *bench) sotw() *full {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	b.t.Cleanup(cancel)
	st, err := discoveryv3.NewAggregatedDiscoveryServiceClient(b.conn).StreamAggregatedResources(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	c := &full{t: b.t, stream: st, got: make(chan *discoveryv3.DiscoveryResponse, 100), err: make(chan error, 1), first: true}
	go func() {
		for {
			r, err := st.Recv()
			if err != nil {
				c.err <- err
				return
			}
			c.got <- r
		}
	}()
	return c
}

func (c *full) send(r *discoveryv3.DiscoveryRequest) {
	c.t.Helper()
	if c.first {
		r.Node, c.first = &corev3.Node{Id: "n"}, false
	}
	if err := c.stream.Send(r); err != nil {
		c.t.Fatal(err)
	}
}

func (c *full) ask(typeURL string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: names})
}

// ack acknowledges with the names that are wanted from now on.
func (c *full) ack(r *discoveryv3.DiscoveryResponse, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, VersionInfo: r.VersionInfo, ResourceNames: names})
}

func (c *full) want(text string) *discoveryv3.DiscoveryResponse {
	c.t.Helper()
	select {
	case r := <-c.got:
		parts := []string{letters[r.TypeUrl]}
		for _, res := range r.Resources {
			parts = append(parts, string(res.Value))
		}
		if got := strings.Join(parts, " "); got != text {
			c.t.Fatalf("got %q, want %q", got, text)
		}
		return r
	case err := <-c.err:
		c.t.Fatalf("stream ended: %v, want %q", err, text)
	case <-time.After(5 * time.Second):
		c.t.Fatalf("nothing, want %q", text)
	}
	return nil
}

func (c *full) silent() {
	c.t.Helper()
	select {
	case r := <-c.got:
		c.t.Fatalf("unexpected %v", r)
	case <-time.After(50 * time.Millisecond):
	}
}

func TestSotW(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		rule  string
		start []string
		story func(*bench, *full)
	}{
		{"W1 a NACK is told by error_detail alone", []string{"C a=1"}, func(b *bench, c *full) {
			c.ask(xds.ClusterType)
			r := c.want("C a=1")
			c.send(&discoveryv3.DiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, VersionInfo: r.VersionInfo, ErrorDetail: &statuspb.Status{Message: "a: no"}})
			c.silent()
			if refused := b.server.Proxies()[0].Types[0].Refused; len(refused) != 1 {
				b.t.Errorf("%+v", refused)
			}
			b.source.set("C a=2")
			c.ack(c.want("C a=2"))
		}},
		{"W2 names on a stale nonce count, without an answer of their own", []string{"E a=1", "E b=1"}, func(_ *bench, c *full) {
			c.ask(xds.EndpointType, "a")
			r := c.want("E a=1")
			c.send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.EndpointType, ResponseNonce: "stale", ResourceNames: []string{"a", "b"}})
			c.silent()
			c.ack(r, "a", "b")
			c.ack(c.want("E b=1"), "a", "b")
		}},
		{"W3 clusters are told as a whole", []string{"C a=1", "C b=1"}, func(b *bench, c *full) {
			c.ask(xds.ClusterType)
			c.ack(c.want("C a=1 b=1"))
			b.source.set("C a=2", "C b=1")
			c.ack(c.want("C a=2 b=1"))
			b.source.set("C b=1")
			c.ack(c.want("C b=1"))
			b.source.set()
			c.ack(c.want("C"))
			c.silent()
		}},
		{"W4 a newly wanted name is sent", []string{"E a=1", "E b=1"}, func(_ *bench, c *full) {
			c.ask(xds.EndpointType, "a")
			c.ack(c.want("E a=1"), "a")
			c.ask(xds.EndpointType, "a", "b")
			c.ack(c.want("E b=1"), "a", "b")
		}},
		{"W5 a name wanted again is sent again", []string{"E a=1", "E b=1"}, func(_ *bench, c *full) {
			c.ask(xds.EndpointType, "a", "b")
			c.ack(c.want("E a=1 b=1"), "a")
			c.ask(xds.EndpointType, "a", "b")
			c.ack(c.want("E b=1"), "a", "b")
		}},
		{"W6 nothing is sent while nothing changes", []string{"C a=1", "E a=1"}, func(b *bench, c *full) {
			c.ask(xds.EndpointType, "a")
			c.ack(c.want("E a=1"), "a")
			b.source.set("C a=2", "E a=1")
			c.silent()
		}},
		{"W7 who comes back with the same whole is current", []string{"C a=1"}, func(b *bench, c *full) {
			c.ask(xds.ClusterType)
			r := c.want("C a=1")
			again := b.sotw()
			again.send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.ClusterType, VersionInfo: r.VersionInfo})
			again.silent()
			b.source.set("C a=2")
			again.ack(again.want("C a=2"))
		}},
		{"X2 after a name, none means nothing", []string{"L l=1", "L m=1"}, func(b *bench, c *full) {
			c.ask(xds.ListenerType, "l")
			c.ack(c.want("L l=1"), "l")
			c.ask(xds.ListenerType)
			c.silent()
			b.source.set("L l=2", "L m=2")
			c.silent()
		}},
		{"X3 a name ends the legacy wildcard", []string{"C a=1", "C b=1"}, func(b *bench, c *full) {
			c.ask(xds.ClusterType)
			c.ack(c.want("C a=1 b=1"), "a")
			c.ack(c.want("C a=1"), "a")
			b.source.set("C a=2", "C b=2")
			c.ack(c.want("C a=2"), "a")
		}},
		{"D12 an empty whole is answered", nil, func(_ *bench, c *full) {
			c.ask(xds.ClusterType)
			c.ack(c.want("C"))
			c.ask(xds.ListenerType)
			c.ack(c.want("L"))
			c.silent()
		}},
		{"O1 a removed cluster stays until the listeners are gone", []string{"C a=1", "L l=1"}, func(b *bench, c *full) {
			c.ask(xds.ClusterType)
			c.ack(c.want("C a=1"))
			c.ask(xds.ListenerType)
			c.ack(c.want("L l=1"))
			b.source.set("C b=1", "L m=1")
			c.ack(c.want("C a=1 b=1"))
			c.ack(c.want("L l=1 m=1"))
			c.ack(c.want("L m=1"))
			c.ack(c.want("C b=1"))
			c.silent()
		}},
		{"O2 endpoints of a changed cluster are resent", []string{"C a=1", "E a=1"}, func(b *bench, c *full) {
			c.ask(xds.ClusterType)
			c.ack(c.want("C a=1"))
			c.ask(xds.EndpointType, "a")
			c.ack(c.want("E a=1"), "a")
			b.source.set("C a=2", "E a=1")
			cds := c.want("C a=2")
			c.ack(c.want("E a=1"), "a")
			c.ack(cds)
			c.silent()
		}},
	} {
		t.Run(c.rule, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, c.start...)
			c.story(b, b.sotw())
		})
	}
}

func TestStreams(t *testing.T) {
	t.Parallel()
	t.Run("S1 the first request names the node", func(t *testing.T) {
		t.Parallel()
		c := newBench(t).delta()
		c.first = false
		c.subscribe(xds.ClusterType)
		if err := <-c.err; status.Code(err) != codes.InvalidArgument {
			t.Error(err)
		}
	})
	t.Run("S2 type_url is mandatory on ADS", func(t *testing.T) {
		t.Parallel()
		c := newBench(t).delta()
		c.subscribe("")
		if err := <-c.err; status.Code(err) != codes.InvalidArgument {
			t.Error(err)
		}
	})
	t.Run("S2 and implied elsewhere", func(t *testing.T) {
		t.Parallel()
		b := newBench(t, "C a=1")
		st, err := clusterservice.NewClusterDiscoveryServiceClient(b.conn).DeltaClusters(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "n"}}); err != nil {
			t.Fatal(err)
		}
		if r, err := st.Recv(); err != nil || showDelta(r) != "C a=1" {
			t.Error(r, err)
		}
	})
	t.Run("S5 two streams of one node do not disturb each other", func(t *testing.T) {
		t.Parallel()
		b := newBench(t, "C a=1")
		one, two := b.delta(), b.delta()
		one.subscribe(xds.ClusterType)
		one.wantAcked("C a=1")
		two.subscribe(xds.ClusterType)
		two.want("C a=1") // never acknowledged
		b.source.set("C a=2")
		one.wantAcked("C a=2")
	})
	t.Run("a revoked proxy is disconnected", func(t *testing.T) {
		t.Parallel()
		b := newBench(t, "C a=1")
		c := b.delta()
		c.subscribe(xds.ClusterType)
		c.wantAcked("C a=1")
		if n := b.server.Disconnect(func(xds.Proxy) bool { return true }); n != 1 {
			t.Error(n)
		}
		if err := <-c.err; status.Code(err) != codes.Unauthenticated {
			t.Error(err)
		}
	})
	t.Run("a draining server closes and refuses", func(t *testing.T) {
		t.Parallel()
		b := newBench(t, "C a=1")
		c := b.delta()
		c.subscribe(xds.ClusterType)
		c.wantAcked("C a=1")
		if err := b.server.Drain(t.Context(), 10*time.Millisecond); err != nil {
			t.Error(err)
		}
		if err := <-c.err; status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
		late := b.delta()
		if err := <-late.err; status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
	})
	t.Run("a slow reader delays nobody and loses nothing", func(t *testing.T) {
		t.Parallel()
		big := strings.Repeat("x", 3<<20)
		b := newBench(t, "C a=1")
		slow, err := discoveryv3.NewAggregatedDiscoveryServiceClient(b.conn).DeltaAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = slow.Send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "slow"}, TypeUrl: xds.ClusterType})
		other := newTalkOn(t, dialServer(t, b.server))
		other.subscribe(xds.ClusterType)
		other.wantAcked("C a=1")
		for i := range 20 {
			b.source.set(fmt.Sprintf("C a=%d %s", i, big))
			select {
			case r := <-other.got:
				other.ack(r)
			case <-time.After(5 * time.Second):
				t.Fatal("held up by the slow reader")
			}
		}
		r, err := slow.Recv()
		for n := 0; err == nil && !strings.HasPrefix(string(r.Resources[0].Resource.Value), "a=19"); n++ {
			if n > 2 {
				t.Fatalf("%d responses were queued", n)
			}
			_ = slow.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
			r, err = slow.Recv()
		}
		if err != nil && !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
	t.Run("D14 a large answer comes in parts", func(t *testing.T) {
		t.Parallel()
		var lines []string
		for i := range 5 {
			lines = append(lines, fmt.Sprintf("C %d=1 %s", i, strings.Repeat("x", 1<<20)))
		}
		c := newBench(t, lines...).delta()
		c.subscribe(xds.ClusterType)
		total := 0
		for total < 5 {
			r := <-c.got
			total += len(r.Resources)
			if len(r.Resources) > 2 {
				t.Errorf("%d MiB in one response", len(r.Resources))
			}
			c.ack(r)
		}
		c.silent()
	})
}

func newTalkOn(t *testing.T, conn *grpc.ClientConn) *talk {
	t.Helper()
	return (&bench{t: t, conn: conn}).delta()
}
