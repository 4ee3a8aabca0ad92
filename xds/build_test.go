// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// world is a snapshot under construction: cluster east on network n1, west on n2.
type world struct{ federation.Snapshot }

func newWorld() *world {
	w := &world{federation.Snapshot{
		Revision: 1,
		Clusters: map[federation.ClusterID]*federation.Cluster{
			"east": {ID: "east", Name: "east", Network: "n1", Role: federation.Primary},
			"west": {ID: "west", Name: "west", Network: "n2", Role: federation.Primary},
		},
		Records: map[federation.ServiceName][]*federation.Record{},
		Gateways: map[federation.Network][]*federation.Gateway{"n2": {
			{Source: "kube:west", Network: "n2", Name: "gw", Ready: 1, Addresses: []federation.GatewayAddress{{Host: "172.16.0.3", Port: 15443}}},
		}},
		Addresses: map[string]federation.VirtualAddress{},
	}}
	return w
}

// add gives a service to a cluster; endpoints are written "ip", "ip!" (not ready) or
// "ip~" (without a proxy), and are on the cluster's network.
func (w *world) add(cluster, name string, ports []federation.Port, endpoints ...string) *federation.Record {
	r := &federation.Record{
		Source: federation.SourceID("kube:" + cluster), Name: federation.ServiceName{Namespace: "shop", Name: name},
		Type: federation.ClusterIP, Created: time.Unix(int64(len(w.Records)), 0), Ports: ports,
		ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(10 + len(w.Records))})},
	}
	network := w.Clusters[federation.ClusterID(cluster)].Network
	for i, text := range endpoints {
		e := federation.Endpoint{
			Workload: fmt.Sprintf("%s-%d", name, i), UID: fmt.Sprintf("%s-%s-%d", cluster, name, i), Network: network,
			Health: federation.Ready, Mesh: true, ServiceAccount: name, TargetPorts: map[uint32]uint32{}, Labels: map[string]string{"n": fmt.Sprint(i)},
		}
		if strings.HasSuffix(text, "!") {
			e.Health = federation.NotReady
		}
		if strings.HasSuffix(text, "~") {
			e.Mesh, e.ServiceAccount = false, ""
		}
		e.Addresses = []netip.Addr{netip.MustParseAddr(strings.TrimRight(text, "!~"))}
		for _, p := range ports {
			e.TargetPorts[p.Number] = p.Number + 8000
		}
		r.Endpoints = append(r.Endpoints, e)
	}
	w.Records[r.Name] = append(w.Records[r.Name], r)
	w.Addresses[r.Name.Host()] = federation.VirtualAddress{Host: r.Name.Host(), V4: netip.AddrFrom4([4]byte{240, 240, 0, byte(len(w.Records))})}
	return r
}

func (w *world) object(kind, name, spec string) {
	group := "networking.istio.io/v1"
	if kind == "PeerAuthentication" {
		group = "security.istio.io/v1"
	}
	w.Objects = append(w.Objects, &federation.Object{
		Source: "kube:east", APIVersion: group, Kind: kind, Namespace: "shop", Name: name, Created: time.Unix(1, 0),
		Raw: fmt.Appendf(nil, `{"apiVersion":%q,"kind":%q,"metadata":{"name":%q,"namespace":"shop"},"spec":%s}`, group, kind, name, spec),
	})
}

var client = xds.Proxy{
	Workload: federation.WorkloadKey{Source: "kube:east", UID: "client"}, Cluster: "east", Network: "n1",
	Namespace: "shop", Role: federation.Sidecar,
}

func (w *world) build(t *testing.T, p xds.Proxy) (xds.Resources, []federation.Finding) {
	t.Helper()
	return xds.Build(w.View(p.Scope()), config.New(&w.Snapshot), p)
}

func read[M proto.Message](t *testing.T, r xds.Resources, typeURL, name string, m M) M {
	t.Helper()
	res, ok := r.Get(typeURL, name)
	if !ok {
		t.Fatalf("no %s %q; there are %v", typeURL, name, names(r, typeURL))
	}
	if err := proto.Unmarshal(res.Body, m); err != nil {
		t.Fatal(err)
	}
	return m
}

func names(r xds.Resources, typeURL string) []string {
	var out []string
	for _, res := range r[typeURL] {
		out = append(out, res.Name)
	}
	return out
}

var http80 = []federation.Port{{Number: 80, Name: "http", Protocol: federation.HTTP}}

// hops shows an assignment: "p0 10.1.0.2:8080*1 istio".
func hops(cla *endpointv3.ClusterLoadAssignment) []string {
	var out []string
	for _, l := range cla.Endpoints {
		for _, e := range l.LbEndpoints {
			a := e.GetEndpoint().Address.GetSocketAddress()
			text := fmt.Sprintf("p%d %s:%d*%d", l.Priority, a.Address, a.GetPortValue(), e.LoadBalancingWeight.GetValue())
			if m := e.Metadata.GetFilterMetadata()["envoy.transport_socket_match"]; m != nil {
				text += " " + m.Fields["tlsMode"].GetStringValue()
			}
			if e.HealthStatus != 0 {
				text += " " + e.HealthStatus.String()
			}
			out = append(out, text)
		}
	}
	return out
}

func TestServiceInBothClusters(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.add("east", "pay", http80, "10.1.0.2", "10.1.0.3!", "10.1.0.4~")
	w.add("west", "pay", http80, "10.2.0.2", "10.2.0.3", "10.2.0.4~")
	r, findings := w.build(t, client)
	if len(findings) != 0 {
		t.Errorf("%v", findings)
	}
	const name = "outbound|80||pay.shop.svc.cluster.local"
	cla := read(t, r, xds.EndpointType, name, &endpointv3.ClusterLoadAssignment{})
	want := []string{
		"p0 10.1.0.2:8080*1 istio", "p0 10.1.0.3:8080*1 istio UNHEALTHY", "p0 10.1.0.4:8080*1",
		"p1 172.16.0.3:15443*2 istio", // two mesh endpoints; what has no proxy cannot be reached
	}
	if got := hops(cla); !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	c := read(t, r, xds.ClusterType, name, &clusterv3.Cluster{})
	if c.CommonLbConfig.HealthyPanicThreshold.GetValue() != 0 || c.CommonLbConfig.HealthyPanicThreshold == nil {
		t.Error("the panic threshold is not 0")
	}
	var tls tlsv3.UpstreamTlsContext
	if err := c.TransportSocketMatches[0].TransportSocket.GetTypedConfig().UnmarshalTo(&tls); err != nil {
		t.Fatal(err)
	}
	if tls.Sni != "outbound_.80_._.pay.shop.svc.cluster.local" {
		t.Error(tls.Sni)
	}
	sans := tls.CommonTlsContext.GetCombinedValidationContext().DefaultValidationContext.MatchTypedSubjectAltNames
	if len(sans) != 1 || sans[0].Matcher.GetExact() != "spiffe://cluster.local/ns/shop/sa/pay" || sans[0].SanType != tlsv3.SubjectAltNameMatcher_URI {
		t.Errorf("%v", sans)
	}
	l := read(t, r, xds.ListenerType, "10.96.0.10_80", &listenerv3.Listener{})
	if l.BindToPort.GetValue() {
		t.Error("a service's listener binds")
	}
	for _, ip := range names(r, xds.ListenerType) {
		if strings.HasPrefix(ip, "10.1.") || strings.HasPrefix(ip, "10.2.") {
			t.Errorf("listener %s stands on a pod's address", ip)
		}
	}
}

func TestNoAddressOfAnotherNetwork(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.add("east", "pay", http80, "10.1.0.2")
	w.add("west", "pay", http80, "10.2.77.2").ClusterIPs = []netip.Addr{netip.MustParseAddr("10.77.0.1")}
	r, _ := w.build(t, client)
	for typeURL, list := range r {
		for _, res := range list {
			if body := string(res.Body) + res.Name; strings.Contains(body, "10.2.77.2") || strings.Contains(body, "10.77.0.1") {
				t.Errorf("%s %s holds an address of the other network", typeURL, res.Name)
			}
		}
	}
}

func TestServiceWithoutEndpointsHasAnEmptyAssignment(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.add("east", "idle", http80)
	r, _ := w.build(t, client)
	if got := hops(read(t, r, xds.EndpointType, "outbound|80||idle.shop.svc.cluster.local", &endpointv3.ClusterLoadAssignment{})); len(got) != 0 {
		t.Error(got)
	}
}

func TestInboundChains(t *testing.T) {
	t.Parallel()
	ports := []federation.Port{{Number: 80, Protocol: federation.HTTP}, {Number: 82, Protocol: federation.Unknown}, {Number: 83, Protocol: federation.TCP}}
	for _, c := range []struct {
		mode string
		want []string
	}{
		{"PERMISSIVE", []string{
			"virtualInbound-trap",
			"0.0.0.0_8080-mesh", "0.0.0.0_8080-tls", "0.0.0.0_8080-plain",
			"0.0.0.0_8082-mesh-http", "0.0.0.0_8082-mesh", "0.0.0.0_8082-tls", "0.0.0.0_8082-plain-http", "0.0.0.0_8082-plain",
			"0.0.0.0_8083-mesh", "0.0.0.0_8083-tls", "0.0.0.0_8083-plain",
			"virtualInbound-mesh", "virtualInbound-tls", "virtualInbound-plain",
		}},
		{"STRICT", []string{
			"virtualInbound-trap",
			"0.0.0.0_8080-mesh", "0.0.0.0_8080-refused-tls", "0.0.0.0_8080-refused",
			"0.0.0.0_8082-mesh-http", "0.0.0.0_8082-mesh", "0.0.0.0_8082-refused-tls", "0.0.0.0_8082-refused",
			"0.0.0.0_8083-mesh", "0.0.0.0_8083-refused-tls", "0.0.0.0_8083-refused",
			"virtualInbound-mesh", "virtualInbound-refused-tls", "virtualInbound-refused",
		}},
		{"DISABLE", []string{
			"virtualInbound-trap",
			"0.0.0.0_8080-plain",
			"0.0.0.0_8082-tls", "0.0.0.0_8082-plain-http", "0.0.0.0_8082-plain",
			"0.0.0.0_8083-tls", "0.0.0.0_8083-plain",
			"virtualInbound-tls", "virtualInbound-plain",
		}},
	} {
		t.Run(c.mode, func(t *testing.T) {
			t.Parallel()
			w := newWorld()
			w.add("east", "pay", ports, "10.1.0.2")
			w.object("PeerAuthentication", "default", `{"mtls":{"mode":"`+c.mode+`"}}`)
			p := client
			p.Workload.UID = "east-pay-0"
			r, _ := w.build(t, p)
			var got []string
			for _, chain := range read(t, r, xds.ListenerType, xds.VirtualInbound, &listenerv3.Listener{}).FilterChains {
				got = append(got, chain.Name)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
			// Callers do not offer TLS to who refuses it.
			istio := strings.Contains(fmt.Sprint(hops(read(t, r, xds.EndpointType, "outbound|80||pay.shop.svc.cluster.local", &endpointv3.ClusterLoadAssignment{}))), "istio")
			if istio != (c.mode != "DISABLE") {
				t.Errorf("mutual TLS to the endpoint: %v", istio)
			}
		})
	}
}

// Two services may see one port of a workload differently. Whoever calls the one that says
// HTTP is still known by name to the workload: HTTP ends in a chain that reads HTTP.
func TestServicesDisagreeOnAPort(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		other federation.Protocol
		want  []string
	}{
		"two kinds of HTTP": {federation.HTTP2, []string{"0.0.0.0_8080-mesh", "0.0.0.0_8080-tls", "0.0.0.0_8080-plain"}},
		"one knows nothing": {federation.Unknown, []string{
			"0.0.0.0_8080-mesh-http", "0.0.0.0_8080-mesh", "0.0.0.0_8080-tls", "0.0.0.0_8080-plain-http", "0.0.0.0_8080-plain",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld()
			w.add("east", "pay", http80, "10.1.0.2")
			second := w.add("east", "paying", []federation.Port{{Number: 80, Protocol: c.other}}, "10.1.0.2")
			second.Endpoints[0].UID = "east-pay-0"
			p := client
			p.Workload.UID = "east-pay-0"
			r, _ := w.build(t, p)
			var got []string
			for _, chain := range read(t, r, xds.ListenerType, xds.VirtualInbound, &listenerv3.Listener{}).FilterChains {
				if strings.HasPrefix(chain.Name, "0.0.0.0_8080-") {
					got = append(got, chain.Name)
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
			cluster := read(t, r, xds.ClusterType, "outbound|80||pay.shop.svc.cluster.local", &clusterv3.Cluster{})
			socket := &tlsv3.UpstreamTlsContext{}
			if err := cluster.TransportSocketMatches[0].TransportSocket.GetTypedConfig().UnmarshalTo(socket); err != nil {
				t.Fatal(err)
			}
			if offered := socket.CommonTlsContext.AlpnProtocols; len(offered) != 3 || offered[0] != "isthmus-http" {
				t.Errorf("the caller offers %q, want HTTP first", offered)
			}
		})
	}
}

func TestHeadlessHere(t *testing.T) {
	t.Parallel()
	w := newWorld()
	r := w.add("east", "db", []federation.Port{{Number: 5432, Protocol: federation.TCP}}, "10.1.0.2", "10.1.0.3!")
	r.Type, r.ClusterIPs = federation.Headless, nil
	for i := range r.Endpoints {
		r.Endpoints[i].Hostname = fmt.Sprintf("db-%d", i)
	}
	west := w.add("west", "db", []federation.Port{{Number: 5432, Protocol: federation.TCP}}, "10.2.0.2")
	west.Type, west.ClusterIPs = federation.Headless, nil
	out, _ := w.build(t, client)
	// Each pod on its own port and on the service's.
	want := []string{"10.1.0.2_13432", "10.1.0.2_5432", "10.1.0.3_13432", "10.1.0.3_5432", "virtualInbound", "virtualOutbound"}
	if got := names(out, xds.ListenerType); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	table := read(t, out, xds.NameTableType, "db.shop.svc.cluster.local", &api.NameTable{}).Table
	if got := table["db.shop.svc.cluster.local"].GetIps(); !slices.Equal(got, []string{"10.1.0.2"}) {
		t.Errorf("the service's name: %v; want the own cluster's ready pods only", got)
	}
	if got := table["db-0.db.shop.svc.cluster.local"].GetIps(); !slices.Equal(got, []string{"10.1.0.2"}) {
		t.Errorf("the pod's name: %v", got)
	}
}

func TestNobodyTakesAnothersAddress(t *testing.T) {
	t.Parallel()
	w := newWorld()
	// The first by name, with an endpoint that someone wrote by hand.
	evil := w.add("east", "aaa", http80, "10.96.0.99~")
	evil.Type, evil.ClusterIPs = federation.Headless, nil
	evil.Endpoints[0].TargetPorts = map[uint32]uint32{80: 80}
	w.add("east", "pay", http80, "10.1.0.2").ClusterIPs = []netip.Addr{netip.MustParseAddr("10.96.0.99")}
	w.add("east", "wild", http80).ClusterIPs = []netip.Addr{netip.MustParseAddr("0.0.0.0")}
	r, findings := w.build(t, client)
	l := read(t, r, xds.ListenerType, "10.96.0.99_80", &listenerv3.Listener{})
	if text := l.String(); !strings.Contains(text, "pay.shop") || strings.Contains(text, "aaa.shop") {
		t.Error("the listener is another service's")
	}
	if len(findings) != 1 || findings[0].Object != "Listener 10.96.0.99_80" {
		t.Errorf("%v", findings)
	}
	if _, ok := r.Get(xds.ListenerType, "0.0.0.0_80"); ok {
		t.Error("a listener takes every address")
	}
}

func TestVisibility(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.add("east", "open", http80)
	w.add("east", "private", http80).ExportTo = []string{"."}
	w.add("east", "hidden", http80)
	w.object("Sidecar", "default", `{"egress":[{"hosts":["./open.shop.svc.cluster.local","./private.shop.svc.cluster.local"]}]}`)
	in, _ := w.build(t, client)
	if got := names(in, xds.RouteType); !slices.Equal(got, []string{"open.shop.svc.cluster.local:80", "private.shop.svc.cluster.local:80"}) {
		t.Errorf("inside: %q", got)
	}
	other := client
	other.Namespace = "other"
	out, _ := w.build(t, other)
	if got := names(out, xds.RouteType); !slices.Equal(got, []string{"hidden.shop.svc.cluster.local:80", "open.shop.svc.cluster.local:80"}) {
		t.Errorf("outside: %q", got)
	}
}

func TestRoutesOfAVirtualService(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.add("east", "pay", http80, "10.1.0.2", "10.1.0.3")
	w.add("west", "pay", http80, "10.2.0.2", "10.2.0.3")
	w.object("DestinationRule", "pay", `{"host":"pay","trafficPolicy":{"loadBalancer":{"consistentHash":{"httpHeaderName":"x-user"}}},
		"subsets":[{"name":"v1","labels":{"n":"0"}},{"name":"v2","labels":{"n":"1"}}]}`)
	w.object("VirtualService", "pay", `{"hosts":["pay"],"http":[
		{"name":"beta","match":[{"uri":{"prefix":"/beta"},"headers":{"x-b":{"regex":"1|2"},"x-a":{"exact":"1"}}}],"rewrite":{"uri":"/"},"route":[{"destination":{"host":"pay","subset":"v2"}}],"timeout":"3s","retries":{"attempts":0}},
		{"route":[{"destination":{"host":"pay","subset":"v1"},"weight":90},{"destination":{"host":"pay","subset":"v2"},"weight":10}],"retries":{"attempts":4,"retryOn":"5xx,503","perTryTimeout":"1s"}},
		{"route":[{"destination":{"host":"nowhere"}}]}]}`)
	r, findings := w.build(t, client)
	routes := read(t, r, xds.RouteType, "pay.shop.svc.cluster.local:80", &routev3.RouteConfiguration{}).VirtualHosts[0].Routes
	if len(routes) != 2 {
		t.Fatalf("%d routes: %v", len(routes), routes)
	}
	beta := routes[0]
	if beta.Match.GetPrefix() != "/beta" || len(beta.Match.Headers) != 2 || beta.Match.Headers[0].Name != "x-a" ||
		beta.GetRoute().PrefixRewrite != "/" || beta.GetRoute().Timeout.AsDuration() != 3*time.Second || beta.GetRoute().RetryPolicy != nil {
		t.Errorf("%v", beta)
	}
	split := routes[1].GetRoute()
	if c := split.GetWeightedClusters().Clusters; len(c) != 2 || c[0].Name != "outbound|80|v1|pay.shop.svc.cluster.local" || c[0].Weight.Value != 90 || c[1].Weight.Value != 10 {
		t.Errorf("%v", c)
	}
	if p := split.RetryPolicy; p.NumRetries.Value != 4 || p.RetryOn != "5xx,retriable-status-codes" || !slices.Equal(p.RetriableStatusCodes, []uint32{503}) {
		t.Errorf("%v", p)
	}
	if len(split.HashPolicy) != 1 || split.HashPolicy[0].GetHeader().HeaderName != "x-user" {
		t.Errorf("%v", split.HashPolicy)
	}
	if len(findings) != 1 || !strings.Contains(findings[0].Message, `"nowhere`) || !strings.Contains(findings[0].Object, "VirtualService shop/pay") {
		t.Errorf("%v", findings)
	}
	if got := hops(read(t, r, xds.EndpointType, "outbound|80|v2|pay.shop.svc.cluster.local", &endpointv3.ClusterLoadAssignment{})); !slices.Equal(got, []string{"p0 10.1.0.3:8080*1 istio", "p1 172.16.0.3:15443*1 istio"}) {
		t.Errorf("subset v2: %q", got)
	}
	if c := read(t, r, xds.ClusterType, "outbound|80||pay.shop.svc.cluster.local", &clusterv3.Cluster{}); c.LbPolicy != clusterv3.Cluster_RING_HASH {
		t.Error(c.LbPolicy)
	}
}

func TestDestinationRuleTLS(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ tls, socket, finding string }{
		{`{"mode":"DISABLE"}`, "envoy.transport_sockets.raw_buffer", ""},
		{`{"mode":"ISTIO_MUTUAL"}`, "envoy.transport_sockets.tls", ""},
		{`{"mode":"SIMPLE","sni":"x"}`, "envoy.transport_sockets.tls", ""},
		{`{"mode":"MUTUAL","clientCertificate":"/c","privateKey":"/k"}`, "envoy.transport_sockets.tls", ""},
		{`{"mode":"SIMPLE","credentialName":"s"}`, "", "credentialName"},
	} {
		w := newWorld()
		w.add("east", "pay", http80, "10.1.0.2")
		w.object("DestinationRule", "pay", `{"host":"pay","trafficPolicy":{"tls":`+c.tls+`}}`)
		r, findings := w.build(t, client)
		got := read(t, r, xds.ClusterType, "outbound|80||pay.shop.svc.cluster.local", &clusterv3.Cluster{})
		if got.TransportSocket.GetName() != c.socket {
			t.Errorf("%s: %q", c.tls, got.TransportSocket.GetName())
		}
		if text := fmt.Sprint(findings); !strings.Contains(text, c.finding) || c.finding == "" && len(findings) > 0 {
			t.Errorf("%s: %s", c.tls, text)
		}
	}
}

func TestWhatCannotBeBuiltStopsNothing(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.add("east", "good", http80, "10.1.0.2")
	w.add("east", "odd", []federation.Port{{Number: 70000, Protocol: federation.HTTP}, {Number: 80, Protocol: federation.HTTP}}, "10.1.0.3")
	w.add("east", "bad\xff", http80, "10.1.0.4")
	r, findings := w.build(t, client)
	got := names(r, xds.ListenerType)
	for _, want := range []string{"10.96.0.10_80", "10.96.0.11_80", "virtualInbound", "virtualOutbound"} {
		if !slices.Contains(got, want) {
			t.Errorf("no listener %s: %q", want, got)
		}
	}
	for _, typeURL := range []string{xds.ClusterType, xds.EndpointType, xds.RouteType} {
		if !strings.Contains(fmt.Sprint(names(r, typeURL)), "odd.shop") {
			t.Errorf("%s: the good port of a service with a bad one is missing", typeURL)
		}
	}
	if _, ok := r.Get(xds.NameTableType, "odd.shop.svc.cluster.local"); !ok {
		t.Error("no names of a service with a bad port")
	}
	if len(findings) == 0 {
		t.Error("no finding")
	}
	for _, f := range findings {
		if !strings.HasPrefix(f.Object, "Service shop/") && !strings.HasPrefix(f.Object, "Proxy ") {
			t.Errorf("%+v names no object", f)
		}
	}
}

// TestMemory plays changes through one Builder: its bytes must be those of a full build.
func TestMemory(t *testing.T) {
	t.Parallel()
	w := newWorld()
	b := &xds.Builder{}
	var view *federation.View
	var index *config.Index
	check := func(what string) {
		t.Helper()
		w.Revision++
		s := w.Snapshot
		view, index = s.ViewFrom(view, client.Scope()), config.NewFrom(index, &s)
		for _, ns := range []string{"shop", "other"} {
			p := client
			p.Namespace = ns
			got, _ := b.Build(view, index, p)
			want, _ := xds.Build(s.View(p.Scope()), config.New(&s), p)
			for typeURL := range want {
				if !slices.EqualFunc(got[typeURL], want[typeURL], func(x, y xds.Resource) bool { return x.Name == y.Name && x.Version == y.Version }) {
					t.Errorf("%s, namespace %s: %s differs", what, ns, typeURL)
				}
			}
			if len(got) != len(want) {
				t.Errorf("%s: other types", what)
			}
		}
	}
	replace := func(old *federation.Record, change func(*federation.Record)) *federation.Record {
		r := *old
		r.Endpoints = slices.Clone(old.Endpoints)
		change(&r)
		records := map[federation.ServiceName][]*federation.Record{}
		for k, list := range w.Records {
			for _, x := range list {
				if x == old {
					x = &r
				}
				records[k] = append(records[k], x)
			}
		}
		w.Records = records
		return &r
	}
	pay := w.add("east", "pay", http80, "10.1.0.2", "10.1.0.3")
	cart := w.add("west", "cart", http80, "10.2.0.2")
	check("start")
	pay = replace(pay, func(r *federation.Record) { r.Endpoints[0].Health = federation.NotReady })
	check("an endpoint is unready")
	cart = replace(cart, func(r *federation.Record) { r.Endpoints[0].Mesh = false })
	check("a remote endpoint lost its proxy")
	w.object("DestinationRule", "pay", `{"host":"pay","subsets":[{"name":"v1","labels":{"n":"0"}}]}`)
	check("a rule")
	w.object("VirtualService", "pay", `{"hosts":["pay"],"http":[{"route":[{"destination":{"host":"cart"}}]}]}`)
	check("a route to another service")
	w.object("PeerAuthentication", "default", `{"mtls":{"mode":"DISABLE"}}`)
	check("a policy")
	w.Gateways = map[federation.Network][]*federation.Gateway{}
	check("the gateway is gone")
	w.Objects = nil
	w.Records = map[federation.ServiceName][]*federation.Record{pay.Name: {pay}}
	check("services and configuration are gone")
	_ = cart
}

// TestMemoryOfAnything does the same with changes that nobody thought of.
func TestMemoryOfAnything(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		held := map[string]bool{} // services that callers must not hear of
		b := &xds.Builder{Closed: func(k federation.WeightKey) bool { return held[k.Service.Name] }}
		var view *federation.View
		var index *config.Index
		for step := range rapid.IntRange(2, 12).Draw(t, "steps") {
			what := anyChange(t, w)
			if name := rapid.SampledFrom([]string{"", "", "a", "b"}).Draw(t, "held"); name != "" {
				held[name] = !held[name]
				b.Forget(federation.ServiceName{Namespace: "shop", Name: name})
			}
			w.Revision++
			s := w.Snapshot
			view, index = s.ViewFrom(view, client.Scope()), config.NewFrom(index, &s)
			for _, ns := range []string{"shop", "other"} {
				p := client
				p.Namespace = ns
				got, gotFindings := b.Build(view, index, p)
				fresh := &xds.Builder{Closed: b.Closed}
				want, wantFindings := fresh.Build(s.View(p.Scope()), config.New(&s), p)
				for typeURL := range want {
					if !slices.EqualFunc(got[typeURL], want[typeURL], func(x, y xds.Resource) bool { return x.Name == y.Name && x.Version == y.Version }) {
						t.Fatalf("step %d, %s, namespace %s: %s differs", step, what, ns, typeURL)
					}
				}
				if len(got) != len(want) || !slices.Equal(gotFindings, wantFindings) {
					t.Fatalf("step %d, %s, namespace %s: other types or findings", step, what, ns)
				}
			}
		}
	})
}

// anyChange changes one of four services in one of two clusters.
func anyChange(t *rapid.T, w *world) string {
	name := federation.ServiceName{Namespace: "shop", Name: rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "service")}
	source := federation.SourceID(rapid.SampledFrom([]string{"kube:east", "kube:west"}).Draw(t, "source"))
	what := rapid.SampledFrom([]string{"make", "remove", "health", "health", "account", "hide", "headless", "address"}).Draw(t, "change")
	records := map[federation.ServiceName][]*federation.Record{}
	var old *federation.Record
	for k, list := range w.Records {
		for _, r := range list {
			if k == name && r.Source == source {
				old = r
				continue
			}
			records[k] = append(records[k], r)
		}
	}
	if old == nil || what == "make" {
		network, ip := federation.Network("n1"), "10.1.0."
		if source == "kube:west" {
			network, ip = "n2", "10.2.0."
		}
		old = &federation.Record{Source: source, Name: name, Type: federation.ClusterIP, Ports: http80, Created: time.Unix(1, 0)}
		old.ClusterIPs = []netip.Addr{netip.MustParseAddr("10.96.0." + fmt.Sprint(rapid.IntRange(1, 3).Draw(t, "ip")))}
		for i := range rapid.IntRange(0, 3).Draw(t, "endpoints") {
			old.Endpoints = append(old.Endpoints, federation.Endpoint{
				Workload: fmt.Sprint(i), UID: fmt.Sprint(name.Name, i), Addresses: []netip.Addr{netip.MustParseAddr(ip + fmt.Sprint(i+2))},
				TargetPorts: map[uint32]uint32{80: 8080}, Health: federation.Ready, Network: network, ServiceAccount: "x", Mesh: true,
			})
		}
	}
	changed := *old
	changed.Endpoints = slices.Clone(old.Endpoints)
	for i := range changed.Endpoints[:min(1, len(changed.Endpoints))] {
		switch what {
		case "health":
			changed.Endpoints[i].Health = rapid.SampledFrom([]federation.Health{federation.Ready, federation.NotReady, federation.Terminating}).Draw(t, "health")
		case "account":
			changed.Endpoints[i].ServiceAccount = rapid.SampledFrom([]string{"x", "y"}).Draw(t, "account")
		}
	}
	switch what {
	case "hide":
		changed.ExportTo = rapid.SampledFrom([][]string{nil, {"."}}).Draw(t, "export")
	case "headless":
		changed.Type, changed.ClusterIPs = federation.Headless, nil
	case "address":
		changed.ClusterIPs = []netip.Addr{netip.MustParseAddr("10.96.1.1")}
	}
	if what != "remove" {
		records[name] = append(records[name], &changed)
		slices.SortFunc(records[name], func(a, b *federation.Record) int { return strings.Compare(string(a.Source), string(b.Source)) })
	}
	w.Records = records
	return what
}

func BenchmarkBuild(b *testing.B) {
	w := newWorld()
	for i := range 1000 {
		r := w.add("east", fmt.Sprintf("s%d", i), http80, "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6")
		r.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i / 250), byte(i%250 + 1)})}
	}
	view := w.View(client.Scope())
	b.Run("full", func(b *testing.B) {
		size := 0
		for b.Loop() {
			r, _ := xds.Build(view, nil, client)
			size = 0
			for _, list := range r {
				for _, res := range list {
					size += len(res.Body)
				}
			}
		}
		b.ReportMetric(float64(size)/1024, "KiB")
	})
	b.Run("again", func(b *testing.B) {
		builder := &xds.Builder{}
		builder.Build(view, nil, client)
		for b.Loop() {
			builder.Build(view, nil, client)
		}
	})
}
