// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadstatsv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	mesh "github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// TestChecklist has the rules that need more than a word and an answer; the others stand
// in TestDelta, TestSotW and TestStreams, and W8, D6 and D8 hold whatever TestModel does.
// Not served, and so without a test: time to live (T1), errors of single resources (T5).
func TestChecklist(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		rule  string
		start []string
		story func(*bench, *talk)
	}{
		{"D9 of two responses each answer counts for its own", []string{"C a=1", "E a=1"}, func(b *bench, c *talk) {
			c.subscribe(mesh.ClusterType)
			c.subscribe(mesh.EndpointType, "a")
			clusters, endpoints := c.want("C a=1"), c.want("E a=1")
			c.nack(endpoints, "a: no")
			c.ack(clusters)
			c.silent()
			for _, s := range b.server.Proxies()[0].Types {
				if want := s.TypeURL == mesh.EndpointType; (len(s.Refused) == 1) != want {
					b.t.Errorf("%s: refused %+v", s.TypeURL, s.Refused)
				}
			}
		}},
		{"D10 two bad ones among a hundred are both named", hundred("=1"), func(b *bench, c *talk) {
			c.subscribe(mesh.ClusterType)
			c.ack(<-c.got)
			b.source.set(hundred("=2")...)
			c.nack(<-c.got, "Error adding/updating cluster(s) c17: no such thing, c71: nor this")
			c.silent()
			if refused := b.server.Proxies()[0].Types[0].Refused; fmt.Sprint(refused[0].Resources) != "[c17 c71]" {
				b.t.Errorf("%+v", refused)
			}
		}},
		{"D10 a resource that is refused again and again hides no other", []string{"E a=1", "E b=1"}, func(b *bench, c *talk) {
			c.subscribe(mesh.EndpointType, "a", "b")
			c.nack(c.want("E a=1 b=1"), "b is bad")
			for i := range 20 {
				b.source.set(fmt.Sprintf("E a=%d", i+2), "E b=1")
				c.nack(c.want(fmt.Sprintf("E a=%d", i+2)), "a is bad")
			}
			c.silent()
			named := map[string]bool{}
			for _, r := range b.server.Proxies()[0].Types[0].Refused {
				for _, name := range r.Resources {
					named[name] = true
				}
			}
			if !named["a"] || !named["b"] {
				b.t.Errorf("refused are a and b, known %v", named)
			}
		}},
		{"O4 a cluster goes when the routes that used it are gone", []string{"C a=1", "E a=1", "L l=1", "R r=1", "N n=1"}, func(b *bench, c *talk) {
			subscribeAll(c)
			b.source.set("L l=1", "R r=2", "N n=1")
			routes := c.want("R r=2")
			c.silentButHeld()
			c.ack(routes)
			c.wantAcked("C -a")
			c.wantAcked("E -a")
			c.silent()
		}},
		{"O4 and stays if the routes were refused", []string{"C a=1", "E a=1", "L l=1", "R r=1", "N n=1"}, func(b *bench, c *talk) {
			subscribeAll(c)
			b.source.set("C a=1", "E a=1", "L l=1", "R r=bad", "N n=1")
			c.nack(c.want("R r=bad"), "r is bad")
			b.source.set("C a=1", "E a=1", "L l=1", "R r=3", "N n=1")
			c.wantAcked("R r=3")
			c.silent()
		}},
		{"O5 clusters that did not change are not sent with those that did", hundred("=1"), func(b *bench, c *talk) {
			c.subscribe(mesh.ClusterType)
			c.ack(<-c.got)
			b.source.set(append(hundred("=1"), "C new=1")...)
			c.wantAcked("C new=1")
			c.silent()
		}},
		{"T3 a cluster that is asked for on demand and is not there is said to be missing at once", []string{"C a=1", "E a=1", "L l=1", "R r=1", "N n=1"}, func(b *bench, c *talk) {
			subscribeAll(c)
			b.source.set("C a=1", "E a=1", "L l=1", "R r=2", "N n=1")
			routes := c.want("R r=2") // a request waits for the cluster, and no route answers it
			c.subscribe(mesh.ClusterType, "x")
			c.wantAcked("C -x")
			c.ack(routes)
			c.silent()
		}},
		{"T4 names are opaque, and locators nobody uses end no stream", []string{"E xdstp://mesh/a/b?c=d=1"}, func(b *bench, c *talk) {
			name := "xdstp://mesh/a/b?c"
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: mesh.EndpointType, ResourceNamesSubscribe: []string{name},
				ResourceLocatorsSubscribe: []*discoveryv3.ResourceLocator{{Name: "z"}}})
			r := <-c.got
			if len(r.Resources) != 1 || r.Resources[0].Name != name {
				b.t.Error(r)
			}
			c.ack(r)
			c.silent()
		}},
		{"X6 globs are names like others", []string{"E a/b=1"}, func(_ *bench, c *talk) {
			c.subscribe(mesh.EndpointType, "a/*")
			c.wantAcked("E -a/*")
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

// hundred clusters.
func hundred(suffix string) (lines []string) {
	for i := range 100 {
		lines = append(lines, fmt.Sprintf("C c%d%s", i, suffix))
	}
	return lines
}

func TestS7AReplicaThatIsNotSyncedAnswersNothing(t *testing.T) {
	t.Parallel()
	server := xdsserver.New(xdsserver.Config{
		Source: xdsserver.NewPipeline(xdsserver.PipelineConfig{}), Patience: time.Millisecond,
		Authenticate: func(context.Context) (xdsserver.Peer, error) { return xdsserver.Peer{}, nil },
	})
	c := newTalkOn(t, dialServer(t, server))
	c.subscribe(mesh.ClusterType)
	select {
	case r := <-c.got:
		t.Errorf("answered %v", r)
	case err := <-c.err:
		if status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
	}
}

func TestT6LoadReportingIsUnimplemented(t *testing.T) {
	t.Parallel()
	b := newBench(t, "C a=1")
	reports, err := loadstatsv3.NewLoadReportingServiceClient(b.conn).StreamLoadStats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = reports.Send(&loadstatsv3.LoadStatsRequest{Node: &corev3.Node{Id: "n"}})
	if _, err := reports.Recv(); status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
	c := b.delta() // and configuration is served on the same connection
	c.subscribe(mesh.ClusterType)
	c.wantAcked("C a=1")
}

func TestProxylessAsksByName(t *testing.T) {
	t.Parallel()
	b := newBench(t, "L a=1", "L b=1", "C x=1")
	c := b.sotw()
	c.ask(mesh.ListenerType, "a", "nobody")
	c.ack(c.want("L a=1"), "a", "nobody") // who is missing in the whole does not exist
	b.source.set("L b=1", "C x=1")
	c.ack(c.want("L"), "a", "nobody")
	b.source.set("L a=2", "L b=2", "C x=1")
	r := c.want("L a=2")
	c.send(&discoveryv3.DiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, ResourceNames: []string{"a"}, ErrorDetail: &statuspb.Status{Message: "a"}})
	c.silent()
}

// TestProxyless lets grpc-go's own client find a service over xDS, follow its endpoint,
// and lose it.
func TestProxyless(t *testing.T) {
	t.Parallel()
	one, two := backend(t, "one"), backend(t, "two")
	source := &source{}
	server := xdsserver.New(xdsserver.Config{
		Source: source, Authenticate: func(context.Context) (xdsserver.Peer, error) { return xdsserver.Peer{}, nil },
	})
	source.put(proxyless(t, one))
	g := grpc.NewServer(xdsserver.Options()...)
	server.Register(g)
	resolver, err := xds.NewXDSResolverWithConfigForTesting(fmt.Appendf(nil, `{
		"xds_servers": [{"server_uri": %q, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}],
		"node": {"id": "proxyless"}}`, serveTCP(t, g)))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///pay.shop:80", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(resolver))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	answers := func(want string, gone bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		for {
			var header metadata.MD
			_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.Header(&header), grpc.WaitForReady(true))
			if err != nil && (!gone || status.Code(err) != codes.Unavailable) {
				t.Fatalf("want an answer of %s: %v", want, err)
			}
			if names := header.Get("name"); len(names) == 1 && names[0] == want {
				return
			}
		}
	}
	answers("one", false)
	source.put(proxyless(t, two))
	answers("two", false) // on the way from one to the other no call fails
	source.put(mesh.Resources{})
	for deadline := time.Now().Add(30 * time.Second); ; {
		_, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if status.Code(err) == codes.Unavailable {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the service is gone, and the answer still %v", err)
		}
	}
	source.put(proxyless(t, one))
	answers("one", true) // the client fails calls until its new routes are in place
	for _, p := range server.Proxies() {
		for _, of := range p.Types {
			if len(of.Refused) > 0 {
				t.Errorf("%s refused %s: %+v", p.Node, of.TypeURL, of.Refused)
			}
		}
	}
}

// backend is a server that says its name.
func backend(t *testing.T, name string) string {
	t.Helper()
	g := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if err := grpc.SetHeader(ctx, metadata.Pairs("name", name)); err != nil {
			return nil, err
		}
		return handle(ctx, r)
	}))
	healthpb.RegisterHealthServer(g, health.NewServer())
	return serveTCP(t, g)
}

func serveTCP(t *testing.T, g *grpc.Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	return l.Addr().String()
}

// proxyless is what a client without a proxy is told of a service with one endpoint.
func proxyless(t *testing.T, address string) mesh.Resources {
	t.Helper()
	pack := func(m proto.Message) *anypb.Any {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	one := func(name string, m proto.Message) []mesh.Resource {
		r, err := mesh.NewResource(name, m)
		if err != nil {
			t.Fatal(err)
		}
		return []mesh.Resource{r}
	}
	overADS := &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
	host := netip.MustParseAddrPort(address)
	return mesh.Resources{
		mesh.ListenerType: one("pay.shop:80", &listenerv3.Listener{Name: "pay.shop:80", ApiListener: &listenerv3.ApiListener{ApiListener: pack(&hcmv3.HttpConnectionManager{
			RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: overADS, RouteConfigName: "routes"}},
			HttpFilters:    []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(&routerv3.Router{})}}},
		})}}),
		mesh.RouteType: one("routes", &routev3.RouteConfiguration{Name: "routes", VirtualHosts: []*routev3.VirtualHost{{
			Domains: []string{"*"}, Routes: []*routev3.Route{{
				Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "pay"}}},
			}},
		}}}),
		mesh.ClusterType: one("pay", &clusterv3.Cluster{
			Name: "pay", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: overADS},
		}),
		mesh.EndpointType: one("pay", &endpointv3.ClusterLoadAssignment{ClusterName: "pay", Endpoints: []*endpointv3.LocalityLbEndpoints{{
			Locality: &corev3.Locality{Region: "here"}, LoadBalancingWeight: wrapperspb.UInt32(1),
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
					Address: host.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(host.Port())},
				}}},
			}}}},
		}}}),
	}
}
