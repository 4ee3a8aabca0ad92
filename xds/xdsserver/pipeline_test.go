// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
	"github.com/isthmus-mesh/isthmus/xds/xdstest"
)

func startPipeline(t *testing.T, c xdsserver.PipelineConfig) *xdsserver.Pipeline {
	t.Helper()
	c.Generators = generators()
	p := xdsserver.NewPipeline(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = p.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return p
}

var clientPeer = xdsserver.Peer{
	Workload: federation.WorkloadKey{Source: "kube:east", UID: "uid-client"}, Namespace: "shop", ServiceAccount: "client",
}

func clientLoad() *federation.Workload {
	return xdstest.Workload("kube:east", "client", "n1", xdstest.ClientIP, federation.Sidecar)
}

func TestNobodyIsServedBeforeTheFirstSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPipeline(t, xdsserver.PipelineConfig{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.Attach(ctx, clientPeer); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has not read its store yet") {
			t.Error(err)
		}
	})
}

func TestAWorkloadThatIsNotKnownYetWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPipeline(t, xdsserver.PipelineConfig{})
		empty := xdstest.Snapshot(nil)
		p.Update(empty)
		type result struct {
			feed xdsserver.Feed
			err  error
		}
		got := make(chan result, 1)
		go func() {
			f, err := p.Attach(t.Context(), clientPeer)
			got <- result{f, err}
		}()
		time.Sleep(10 * time.Second)
		next := xdstest.Later(empty)
		next.Workloads[clientPeer.Workload] = clientLoad()
		p.Update(next)
		r := <-got
		if r.err != nil {
			t.Fatal(r.err)
		}
		if f := r.feed.Current(); len(f.Resources[xds.ListenerType]) == 0 || f.Revision != 2 {
			t.Errorf("%+v", f)
		}
		r.feed.Close()

		// Deleted is another thing than unknown.
		gone := xdstest.Later(next)
		delete(gone.Workloads, clientPeer.Workload)
		p.Update(gone)
		synctest.Wait()
		time.Sleep(time.Second)
		if _, err := p.Attach(t.Context(), clientPeer); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
	})
}

func TestWhoTheCredentialSaysMustBeWhoTheRecordSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPipeline(t, xdsserver.PipelineConfig{})
		p.Update(xdstest.Snapshot([]*federation.Workload{clientLoad()}))
		time.Sleep(time.Second)
		other := clientPeer
		other.ServiceAccount = "admin"
		if _, err := p.Attach(t.Context(), other); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
	})
}

func TestOnlyThoseConcernedAreWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPipeline(t, xdsserver.PipelineConfig{})
		inShop, other := clientLoad(), xdstest.Workload("kube:east", "other", "n1", "10.1.0.9", federation.Sidecar)
		other.Namespace = "elsewhere"
		private := xdstest.Record("kube:east", xdstest.Endpoint(xdstest.Workload("kube:east", "near", "n1", xdstest.NearIP, federation.Sidecar)))
		private.ExportTo = []string{"."}
		s := xdstest.Snapshot([]*federation.Workload{inShop, other}, private)
		p.Update(s)
		one, err := p.Attach(t.Context(), clientPeer)
		if err != nil {
			t.Fatal(err)
		}
		peer := xdsserver.Peer{Workload: federation.WorkloadKey{Source: "kube:east", UID: "uid-other"}, Namespace: "elsewhere", ServiceAccount: "other"}
		two, err := p.Attach(t.Context(), peer)
		if err != nil {
			t.Fatal(err)
		}
		drain := func(f xdsserver.Feed) bool {
			select {
			case <-f.Changed():
				return true
			default:
				return false
			}
		}
		drain(one)
		drain(two)
		next := xdstest.Later(s)
		changed := *private
		changed.Endpoints = nil
		next.Records[private.Name] = []*federation.Record{&changed}
		p.Update(next)
		time.Sleep(time.Second)
		if !drain(one) {
			t.Error("who sees the service was not woken")
		}
		if drain(two) {
			t.Error("who does not see the service was woken")
		}
		// Nothing changed at all: nobody is woken, and the revision is known.
		p.Update(xdstest.Later(next))
		time.Sleep(time.Second)
		if drain(one) || drain(two) {
			t.Error("woken by a revision that changed nothing")
		}
		if one.Current().Revision != 3 {
			t.Error(one.Current().Revision)
		}
	})
}

func TestRemoteWeightsChangeAtMostOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPipeline(t, xdsserver.PipelineConfig{})
		s := xdstest.Snapshot([]*federation.Workload{clientLoad()})
		size := func(n int) *federation.Snapshot {
			s = xdstest.Later(s)
			var list []federation.Endpoint
			for i := range n {
				w := xdstest.Workload("kube:west", fmt.Sprintf("far-%d", i), "n2", "10.2.0.2", federation.Sidecar)
				w.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 2, 1, byte(i)})}
				list = append(list, xdstest.Endpoint(w))
			}
			r := xdstest.Record("kube:west", list...)
			s.Records[r.Name] = []*federation.Record{r}
			return s
		}
		p.Update(size(10))
		f, err := p.Attach(t.Context(), clientPeer)
		if err != nil {
			t.Fatal(err)
		}
		weight := func() uint32 {
			r, _ := f.Current().Resources.Get(xds.EndpointType, "outbound|80||pay.shop.svc.cluster.local")
			var cla endpointv3.ClusterLoadAssignment
			if err := proto.Unmarshal(r.Body, &cla); err != nil || len(cla.Endpoints) == 0 {
				return 0
			}
			return cla.Endpoints[0].LbEndpoints[0].LoadBalancingWeight.Value
		}
		for _, step := range []struct {
			n    int
			wait time.Duration
			want uint32
		}{
			{10, 0, 10},
			{20, 100 * time.Millisecond, 10}, // too soon
			{20, time.Second, 20},            // let go by itself
			{0, 100 * time.Millisecond, 0},   // to zero at once
			{5, 100 * time.Millisecond, 5},   // and from zero
		} {
			p.Update(size(step.n))
			time.Sleep(step.wait + 50*time.Millisecond)
			if got := weight(); got != step.want {
				t.Errorf("%d endpoints after %v: weight %d, want %d", step.n, step.wait, got, step.want)
			}
		}
	})
}

// noting is a generator that notes whom it was asked for.
type noting struct {
	xds.Builder
	role  federation.ProxyRole
	roles *[]federation.ProxyRole
}

func (n *noting) BuildClass(v *federation.View, i *config.Index, c xds.Class) (xds.Resources, []federation.Finding) {
	*n.roles = append(*n.roles, n.role)
	return n.Builder.BuildClass(v, i, c)
}

func TestGatewaysAreToldFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var roles []federation.ProxyRole
		generator := func(role federation.ProxyRole) func(xdsserver.Restraint) xdsserver.Generator {
			return func(xdsserver.Restraint) xdsserver.Generator { return &noting{role: role, roles: &roles} }
		}
		p := xdsserver.NewPipeline(xdsserver.PipelineConfig{Generators: map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator{
			federation.Sidecar: generator(federation.Sidecar), federation.GatewayRole: generator(federation.GatewayRole),
		}})
		go func() { _ = p.Run(t.Context()) }()
		server := xdstest.Workload("kube:west", "pay", "n2", xdstest.NearIP, federation.Sidecar)
		loads := []*federation.Workload{server, xdstest.Workload("kube:west", "gateway", "n2", xdstest.GatewayIP, federation.GatewayRole)}
		for i := range 5 {
			w := xdstest.Workload("kube:east", fmt.Sprintf("client-%d", i), "n1", xdstest.ClientIP, federation.Sidecar)
			w.Namespace = w.Name // each is a class of its own
			loads = append(loads, w)
		}
		s := xdstest.Snapshot(loads, xdstest.Record("kube:west", xdstest.Endpoint(server)))
		p.Update(s)
		for _, w := range loads[1:] {
			f, err := p.Attach(t.Context(), xdsserver.Peer{
				Workload: federation.WorkloadKey{Source: w.Source, UID: w.UID}, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
		}
		for i := range 10 {
			time.Sleep(time.Second)
			synctest.Wait()
			roles = nil
			s = xdstest.Later(s)
			changed := xdstest.Record("kube:west", xdstest.Endpoint(server))
			changed.Endpoints[0].Health = []federation.Health{federation.NotReady, federation.Ready}[i%2]
			s.Records[changed.Name] = []*federation.Record{changed}
			p.Update(s)
			time.Sleep(time.Second)
			synctest.Wait()
			if len(roles) != 6 || roles[0] != federation.GatewayRole {
				t.Errorf("change %d was computed for %v; want the gateway first, then 5 sidecars", i, roles)
			}
		}
	})
}
