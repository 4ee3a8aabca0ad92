// SPDX-License-Identifier: Apache-2.0

package gateways_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
	"github.com/isthmus-mesh/isthmus/xds/xdstest"
)

// crossing is a caller in east and a gateway in west, who acknowledge when the test says
// so.
type crossing struct {
	t        *testing.T
	pipeline *xdsserver.Pipeline
	snapshot *federation.Snapshot
	caller   *peer
	gateway  *peer // nil where it is connected to another replica
	far      *federation.Workload
	headless bool
}

// peer is a proxy without a stream.
type peer struct {
	feed xdsserver.Feed
	has  xdsserver.Frame
	open bool // has something to answer
}

func (p *peer) Settled() bool { return !p.open }

func (p *peer) Held(typeURL, name string) (string, bool) {
	r, ok := p.has.Resources.Get(typeURL, name)
	return r.Version, ok
}

// acknowledge takes over all there is.
func (p *peer) acknowledge() {
	p.has = p.feed.Current()
	p.feed.Heard(p.has, p)
	synctest.Wait()
}

// leads tells whether an assignment that the peer is told of has endpoints.
func (p *peer) leads(t *testing.T, name string) bool {
	t.Helper()
	r, ok := p.feed.Current().Resources.Get(xds.EndpointType, name)
	var cla endpointv3.ClusterLoadAssignment
	if err := proto.Unmarshal(r.Body, &cla); err != nil {
		t.Fatal(err)
	}
	return ok && len(cla.Endpoints) > 0
}

const (
	paySNI     = "outbound_.80_._.pay.shop.svc.cluster.local"
	payCluster = "outbound|80||pay.shop.svc.cluster.local"
)

// newCrossing has pay without endpoints, and both proxies in sync.
func newCrossing(t *testing.T, connected bool) *crossing {
	t.Helper()
	client := xdstest.Workload("kube:east", "client", "n1", xdstest.ClientIP, federation.Sidecar)
	gw := xdstest.Workload("kube:west", "gw", "n2", xdstest.GatewayIP, federation.GatewayRole)
	c := &crossing{t: t, far: xdstest.Workload("kube:west", "far", "n2", farIP, federation.Sidecar)}
	c.pipeline = xdsserver.NewPipeline(xdsserver.PipelineConfig{Generators: generators()})
	go func() { _ = c.pipeline.Run(t.Context()) }()
	c.snapshot = xdstest.Snapshot([]*federation.Workload{client, gw, c.far}, xdstest.Record("kube:west"))
	c.pipeline.Update(c.snapshot)
	c.caller = c.attach(client)
	c.caller.acknowledge()
	if connected {
		c.gateway = c.attach(gw)
		c.gateway.acknowledge()
	}
	c.rest()
	return c
}

func (c *crossing) attach(w *federation.Workload) *peer {
	c.t.Helper()
	f, err := c.pipeline.Attach(c.t.Context(), xdsserver.Peer{
		Workload: federation.WorkloadKey{Source: w.Source, UID: w.UID}, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return &peer{feed: f}
}

// rest lets what is due happen, and no more.
func (c *crossing) rest() {
	time.Sleep(30 * time.Millisecond)
	synctest.Wait()
}

// change reports other endpoints of pay in west.
func (c *crossing) change(endpoints ...federation.Endpoint) {
	c.snapshot = xdstest.Later(c.snapshot)
	record := xdstest.Record("kube:west", endpoints...)
	if c.headless {
		record.Type, record.ClusterIPs = federation.Headless, nil
	}
	c.snapshot.Records[xdstest.Pay] = []*federation.Record{record}
	c.pipeline.Update(c.snapshot)
	c.rest()
}

func (c *crossing) want(what string, caller, gateway bool) {
	c.t.Helper()
	if got := c.caller.leads(c.t, payCluster); got != caller {
		c.t.Errorf("%s: the caller is told of endpoints: %v, want %v", what, got, caller)
	}
	if c.gateway == nil {
		return
	}
	if got := c.gateway.leads(c.t, paySNI); got != gateway {
		c.t.Errorf("%s: the gateway is told of endpoints: %v, want %v", what, got, gateway)
	}
}

func TestCallersComeOnceTheGatewayLeadsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		c.want("at first", false, false)
		c.change(xdstest.Endpoint(c.far))
		c.want("before the gateway has acknowledged", false, true)
		if got := c.pipeline.Held(); got != len(xdstest.Ports()) {
			t.Errorf("%d doors are held, want one for each port", got)
		}
		time.Sleep(time.Second)
		c.want("a second later", false, true)
		start := time.Now()
		c.gateway.acknowledge()
		c.want("after it has", true, true)
		if took := time.Since(start); took > 0 {
			t.Errorf("callers were told %v after the acknowledgement", took)
		}
		if got := c.pipeline.Held(); got != 0 {
			t.Errorf("%d doors are still held", got)
		}
	})
}

func TestWhatTheGatewayHasAlreadyIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		e := xdstest.Endpoint(c.far)
		e.Health = federation.NotReady
		c.change(e)
		c.gateway.acknowledge()
		c.want("unready", false, true) // who comes a moment too early is let in
		for range 3 {
			c.change(xdstest.Endpoint(c.far))
			c.want("ready", true, true)
			c.change(e)
			c.want("unready again", false, true)
		}
	})
}

func TestAStuckGatewayHoldsNobodyForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		start := time.Now()
		c.change(xdstest.Endpoint(c.far))
		for !c.caller.leads(t, payCluster) {
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(start); took < 1900*time.Millisecond || took > 2100*time.Millisecond {
			t.Errorf("held for %v, want 2 s", took)
		}
		c.change()
		c.change(xdstest.Endpoint(c.far))
		c.want("a second time nobody waits for it", true, true)
		c.gateway.acknowledge()
		c.change()
		time.Sleep(5 * time.Second) // the caller has not acknowledged, but that is bounded too
		c.gateway.acknowledge()
		c.change(xdstest.Endpoint(c.far))
		c.want("since it has answered, it is waited for", false, true)
		c.gateway.feed.Close()
		c.rest()
		if !c.caller.leads(t, payCluster) {
			t.Error("held by a gateway that has gone")
		}
	})
}

func TestARestartTakesNothingAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		c.change(xdstest.Endpoint(c.far))
		again := xdsserver.NewPipeline(xdsserver.PipelineConfig{Generators: generators()})
		go func() { _ = again.Run(t.Context()) }()
		again.Update(c.snapshot)
		c.pipeline = again
		gw := c.snapshot.Workloads[federation.WorkloadKey{Source: "kube:west", UID: "uid-gw"}]
		c.gateway = c.attach(gw) // and does not answer
		c.caller = c.attach(c.snapshot.Workloads[federation.WorkloadKey{Source: "kube:east", UID: "uid-client"}])
		c.want("the new replica's first answer", true, true)
	})
}

func TestAGatewayKeepsADoorUntilCallersKnow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		c.change(xdstest.Endpoint(c.far))
		c.gateway.acknowledge()
		c.caller.acknowledge()
		c.change()
		c.want("gone", false, true)
		time.Sleep(time.Second)
		c.want("the caller has not acknowledged", false, true)
		c.caller.acknowledge()
		time.Sleep(200 * time.Millisecond)
		c.want("it has", false, false)
	})
}

func TestASlowCallerKeepsNoDoorOpenForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		c.change(xdstest.Endpoint(c.far))
		c.gateway.acknowledge()
		start := time.Now()
		c.change()
		for c.gateway.leads(t, paySNI) {
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(start); took < 1900*time.Millisecond || took > 2200*time.Millisecond {
			t.Errorf("kept for %v, want 2 s", took)
		}
	})
}

func TestADoorThatOpensAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		c.change(xdstest.Endpoint(c.far))
		c.gateway.acknowledge()
		c.caller.acknowledge()
		c.change()
		c.gateway.acknowledge() // has what it had
		c.change(xdstest.Endpoint(c.far))
		c.want("the very same endpoint: nothing to wait for", true, true)
		c.change()
		other := xdstest.Workload("kube:west", "other", "n2", "10.2.0.7", federation.Sidecar)
		c.change(xdstest.Endpoint(other))
		c.want("another one", false, true)
		time.Sleep(50 * time.Millisecond)
		c.change(xdstest.Endpoint(other), xdstest.Endpoint(c.far))
		c.want("two by now", false, true)
		c.gateway.acknowledge()
		c.want("acknowledged", true, true)
	})
}

func TestSubsetsAndPodsHaveDoorsOfTheirOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		c.headless = true // and exists in west alone
		rule := object("networking.istio.io/v1", "DestinationRule", "pay", `{"host":"pay","subsets":[{"name":"V2","labels":{"v":"2"}}]}`)
		c.snapshot = xdstest.Later(c.snapshot)
		c.snapshot.Objects = []*federation.Object{rule}
		host := "two-0.west.pay.shop.svc.clusterset.local"
		c.snapshot.Addresses = map[string]federation.VirtualAddress{
			xdstest.Pay.Host(): c.snapshot.Addresses[xdstest.Pay.Host()],
			host:               {Host: host, V4: netip.MustParseAddr("240.240.0.6")},
		}
		one := xdstest.Endpoint(c.far)
		one.Labels = map[string]string{"v": "1"}
		c.change(one)
		c.gateway.acknowledge()
		c.want("v1", true, true)
		two := xdstest.Endpoint(xdstest.Workload("kube:west", "two", "n2", "10.2.0.7", federation.Sidecar))
		two.Labels, two.Hostname = map[string]string{"v": "2"}, "two-0"
		c.change(one, two)
		c.want("v1 is still called", true, true)
		const subset, pod = "outbound|80|V2|pay.shop.svc.cluster.local", "outbound|80||two-0.west.pay.shop.svc.clusterset.local"
		for _, name := range []string{subset, pod} {
			if c.caller.leads(t, name) {
				t.Errorf("%s is called before the gateway leads there", name)
			}
		}
		if !c.gateway.leads(t, "outbound_.80_.v2_.pay.shop.svc.cluster.local") {
			t.Error("the gateway was not told of the subset")
		}
		c.gateway.acknowledge()
		for _, name := range []string{subset, pod} {
			if !c.caller.leads(t, name) {
				t.Errorf("%s is not called", name)
			}
		}
	})
}

func TestAGatewayOfAnotherReplicaHasAShortGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, false)
		start := time.Now()
		c.change(xdstest.Endpoint(c.far))
		c.want("at once", false, false)
		for !c.caller.leads(t, payCluster) {
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(start); took < 90*time.Millisecond || took > 150*time.Millisecond {
			t.Errorf("held for %v, want 100 ms", took)
		}
		c.change(xdstest.Endpoint(c.far), xdstest.Endpoint(xdstest.Workload("kube:west", "two", "n2", "10.2.0.7", federation.Sidecar)))
		c.want("a second endpoint", true, false)
	})
}

func TestDoorsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(t, true)
		c.change(xdstest.Endpoint(c.far))
		c.gateway.acknowledge()
		c.change()
		time.Sleep(5 * time.Second)
		// Each of the six ports is a door.
		text := collected(t, c.pipeline)
		for _, want := range []string{"isthmus_xds_door_wait_seconds 6", "isthmus_xds_doors_overdue_total 6"} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in\n%s", want, text)
			}
		}
	})
}

// collected are the counters, and how often histograms were observed.
func collected(t *testing.T, c prometheus.Collector) string {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, f := range families {
		for _, m := range f.Metric {
			if h := m.GetHistogram(); h != nil {
				fmt.Fprintf(&out, "%s %d\n", f.GetName(), h.GetSampleCount())
			} else {
				fmt.Fprintf(&out, "%s %g\n", f.GetName(), m.GetCounter().GetValue())
			}
		}
	}
	return out.String()
}
