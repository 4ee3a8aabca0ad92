// SPDX-License-Identifier: Apache-2.0

package gateways_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/gateways"
	"github.com/isthmus-mesh/isthmus/xds"
)

var ports = []federation.Port{{Number: 80, Name: "http", Protocol: federation.HTTP}}

func recordIn(cluster, namespace, name string, endpoints ...federation.Endpoint) *federation.Record {
	return &federation.Record{
		Source: federation.SourceID("kube:" + cluster), Name: federation.ServiceName{Namespace: namespace, Name: name},
		Type: federation.ClusterIP, Ports: ports, Endpoints: endpoints,
	}
}

func endpointAt(ip, network string, change ...func(*federation.Endpoint)) federation.Endpoint {
	e := federation.Endpoint{
		Workload: ip, UID: ip, Addresses: []netip.Addr{netip.MustParseAddr(ip)}, TargetPorts: map[uint32]uint32{80: 8080},
		Health: federation.Ready, Network: federation.Network(network), ServiceAccount: "default", Mesh: true,
		Labels: map[string]string{"v": "1"},
	}
	for _, f := range change {
		f(&e)
	}
	return e
}

func snapshot(records ...*federation.Record) *federation.Snapshot {
	s := &federation.Snapshot{
		Clusters: map[federation.ClusterID]*federation.Cluster{
			"east": {ID: "east", Name: "east", Network: "n1", Role: federation.Primary},
			"west": {ID: "west", Name: "west", Network: "n2", Role: federation.Primary},
		},
		Records: map[federation.ServiceName][]*federation.Record{},
	}
	for _, r := range records {
		s.Records[r.Name] = append(s.Records[r.Name], r)
	}
	return s
}

var gateway = xds.Proxy{Cluster: "west", Network: "n2", Role: federation.GatewayRole}

// reach shows what an SNI leads to: "sni ip:port ip:port".
func reach(t *testing.T, s *federation.Snapshot) []string {
	t.Helper()
	r, findings := gateways.Build(s.View(gateway.Scope()), config.New(s), gateway)
	if len(findings) > 0 {
		t.Errorf("%v", findings)
	}
	var out []string
	for _, c := range r[xds.ClusterType] {
		if c.Name == api.ProbeName { // see TestTheProbeLeadsToTheAgent
			continue
		}
		res, ok := r.Get(xds.EndpointType, c.Name)
		if !ok {
			t.Errorf("cluster %s has no assignment", c.Name)
		}
		var cla endpointv3.ClusterLoadAssignment
		if err := proto.Unmarshal(res.Body, &cla); err != nil {
			t.Fatal(err)
		}
		line := c.Name
		for _, l := range cla.Endpoints {
			for _, e := range l.LbEndpoints {
				a := e.GetEndpoint().Address.GetSocketAddress()
				line += fmt.Sprintf(" %s:%d", a.Address, a.GetPortValue())
			}
		}
		out = append(out, line)
	}
	return out
}

func TestWhatAGatewayLetsIn(t *testing.T) {
	t.Parallel()
	notReady := func(e *federation.Endpoint) { e.Health = federation.NotReady }
	terminating := func(e *federation.Endpoint) { e.Health = federation.Terminating }
	bare := func(e *federation.Endpoint) { e.Mesh = false }
	local := recordIn("west", "shop", "local", endpointAt("10.2.0.9", "n2"))
	local.ClusterLocal = true
	hidden := recordIn("west", "shop", "hidden", endpointAt("10.2.0.9", "n2"))
	hidden.ExportTo = []string{"~"}
	for _, c := range []struct {
		what string
		in   *federation.Snapshot
		want []string
	}{
		{"endpoints of its own network only", snapshot(recordIn("west", "shop", "pay", endpointAt("10.2.0.2", "n2"), endpointAt("10.3.0.2", "n3")), recordIn("east", "shop", "pay", endpointAt("10.1.0.2", "n1"))),
			[]string{"outbound_.80_._.pay.shop.svc.cluster.local 10.2.0.2:8080"}},
		{"also of another cluster on the same network", snapshot(recordIn("east", "shop", "pay", endpointAt("10.2.0.7", "n2"))),
			[]string{"outbound_.80_._.pay.shop.svc.cluster.local 10.2.0.7:8080"}},
		{"a service that is only elsewhere", snapshot(recordIn("east", "shop", "pay", endpointAt("10.1.0.2", "n1"))), nil},
		{"a cluster-local service", snapshot(local), nil},
		{"a service exported to nobody", snapshot(hidden), nil},
		{"a system namespace", snapshot(recordIn("west", "kube-system", "dns", endpointAt("10.2.0.2", "n2"))), nil},
		{"endpoints without a proxy", snapshot(recordIn("west", "shop", "pay", endpointAt("10.2.0.2", "n2", bare))), nil},
		{"ready before terminating", snapshot(recordIn("west", "shop", "pay", endpointAt("10.2.0.2", "n2"), endpointAt("10.2.0.3", "n2", terminating), endpointAt("10.2.0.4", "n2", notReady))),
			[]string{"outbound_.80_._.pay.shop.svc.cluster.local 10.2.0.2:8080"}},
		{"terminating when nothing else is left", snapshot(recordIn("west", "shop", "pay", endpointAt("10.2.0.3", "n2", terminating), endpointAt("10.2.0.4", "n2", notReady))),
			[]string{"outbound_.80_._.pay.shop.svc.cluster.local 10.2.0.3:8080"}},
		{"unready for who has not heard of it, or has heard before", snapshot(recordIn("west", "shop", "pay", endpointAt("10.2.0.4", "n2", notReady))),
			[]string{"outbound_.80_._.pay.shop.svc.cluster.local 10.2.0.4:8080"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			if got := reach(t, c.in); !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

func TestSubsetsAndPods(t *testing.T) {
	t.Parallel()
	db := recordIn("west", "shop", "db", endpointAt("10.2.0.5", "n2", func(e *federation.Endpoint) { e.Hostname = "db-0" }))
	db.Type = federation.Headless
	s := snapshot(recordIn("west", "shop", "pay", endpointAt("10.2.0.2", "n2"), endpointAt("10.2.0.3", "n2", func(e *federation.Endpoint) { e.Labels = map[string]string{"v": "2"} })), db)
	s.Objects = []*federation.Object{{
		Source: "kube:east", APIVersion: "networking.istio.io/v1", Kind: "DestinationRule", Namespace: "shop", Name: "pay",
		Raw: []byte(`{"apiVersion":"networking.istio.io/v1","kind":"DestinationRule","metadata":{"name":"pay","namespace":"shop"},"spec":{"host":"pay","subsets":[{"name":"V2","labels":{"v":"2"}}]}}`),
	}}
	want := []string{
		"outbound_.80_._.db-0.west.db.shop.svc.clusterset.local 10.2.0.5:8080",
		"outbound_.80_._.db.shop.svc.cluster.local 10.2.0.5:8080",
		"outbound_.80_._.pay.shop.svc.cluster.local 10.2.0.2:8080 10.2.0.3:8080",
		"outbound_.80_.v2_.pay.shop.svc.cluster.local 10.2.0.3:8080", // as Envoy reads SNIs
	}
	if got := reach(t, s); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestOneChain(t *testing.T) {
	t.Parallel()
	s := snapshot()
	r, _ := gateways.Build(s.View(gateway.Scope()), nil, gateway)
	var l listenerv3.Listener
	res, _ := r.Get(xds.ListenerType, gateways.Listener)
	if err := proto.Unmarshal(res.Body, &l); err != nil {
		t.Fatal(err)
	}
	if len(l.FilterChains) != 1 || l.DefaultFilterChain != nil {
		t.Fatalf("%d chains, default %v", len(l.FilterChains), l.DefaultFilterChain)
	}
	match := l.FilterChains[0].FilterChainMatch
	if !slices.Equal(match.ApplicationProtocols, []string{"istio", "isthmus"}) || match.TransportProtocol != "tls" {
		t.Errorf("%v", match)
	}
	for _, name := range match.ServerNames {
		if !strings.HasPrefix(name, "*.svc.cluster") {
			t.Errorf("the chain takes names like %q", name)
		}
	}
}

// The reserved name ends at the agent of the same pod, and no service can take it.
func TestTheProbeLeadsToTheAgent(t *testing.T) {
	t.Parallel()
	s := snapshot(recordIn("west", "isthmus-system", "isthmus-probe", endpointAt("10.2.0.2", "n2", func(e *federation.Endpoint) {
		e.TargetPorts = map[uint32]uint32{80: 8080, api.ProbePort: 666}
	})))
	s.Records[federation.ServiceName{Namespace: "isthmus-system", Name: "isthmus-probe"}][0].Ports = append(slices.Clone(ports), federation.Port{Number: api.ProbePort})
	r, findings := gateways.Build(s.View(gateway.Scope()), config.New(s), gateway)
	if len(findings) > 0 || len(r[xds.ClusterType]) != 1 || len(r[xds.EndpointType]) != 0 {
		t.Fatalf("findings %v, %d clusters, %d assignments", findings, len(r[xds.ClusterType]), len(r[xds.EndpointType]))
	}
	res, ok := r.Get(xds.ClusterType, federation.SNI(api.ProbePort, "", "isthmus-probe.isthmus-system.svc.cluster.local"))
	if !ok {
		t.Fatalf("%s is no cluster, but %s", api.ProbeName, r[xds.ClusterType][0].Name)
	}
	var c clusterv3.Cluster
	if err := proto.Unmarshal(res.Body, &c); err != nil {
		t.Fatal(err)
	}
	to := c.GetLoadAssignment().GetEndpoints()[0].GetLbEndpoints()[0].GetEndpoint().GetAddress().GetSocketAddress()
	if to.GetAddress() != "127.0.0.1" || to.GetPortValue() != api.ProbePort || c.GetTransportSocket() != nil {
		t.Errorf("it leads to %v by %v", to, c.GetTransportSocket())
	}
}

func TestResolver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var fail bool
		answer := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
		changed := make(chan struct{}, 10)
		r := &gateways.Resolver{
			Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
				mu.Lock()
				defer mu.Unlock()
				if fail || host != "lb.example" {
					return nil, errors.New("no such host")
				}
				return slices.Clone(answer), nil
			},
			Changed: func() { changed <- struct{}{} },
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = r.Run(ctx) }()
		s := &federation.Snapshot{Gateways: map[federation.Network][]*federation.Gateway{"n2": {
			{Addresses: []federation.GatewayAddress{{Host: "lb.example", Port: 15443}, {Host: "192.0.2.9", Port: 15443}}},
		}}}
		hosts := func() string {
			var out []string
			for _, a := range r.Resolve(s).Gateways["n2"][0].Addresses {
				out = append(out, a.Host)
			}
			return strings.Join(out, " ")
		}
		if got := hosts(); got != "lb.example 192.0.2.9" {
			t.Errorf("before any look-up: %s", got)
		}
		<-changed
		if got := hosts(); got != "192.0.2.1 192.0.2.9" {
			t.Error(got)
		}
		mu.Lock()
		fail = true
		mu.Unlock()
		time.Sleep(time.Minute)
		if got := hosts(); got != "192.0.2.1 192.0.2.9" {
			t.Errorf("while look-ups fail: %s", got)
		}
		mu.Lock()
		fail, answer = false, []netip.Addr{netip.MustParseAddr("192.0.2.2")}
		mu.Unlock()
		<-changed
		if got := hosts(); got != "192.0.2.2 192.0.2.9" {
			t.Error(got)
		}
		if s.Gateways["n2"][0].Addresses[0].Host != "lb.example" {
			t.Error("the snapshot given was changed")
		}
	})
}
