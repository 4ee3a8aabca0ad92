// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// fleet is a world of two clusters that share a service and disagree on it.
func fleet(t *testing.T, options ...func(*apiserver.Config)) (w *world, east, west federation.SourceID) {
	t.Helper()
	w = newWorld(t, options...)
	east, west = w.join(t, "uid-e", "east", "n1"), w.join(t, "uid-w", "west", "n2")
	cart := registrytest.Record(east, "shop", "cart", 2)
	cart = registrytest.Change(cart, 1, func(e *federation.Endpoint) { e.Health = federation.NotReady })
	w.report(t, east, registry.Level{Records: registrytest.Records(cart, registrytest.Record(east, "kube-system", "dns", 1))})
	other := *registrytest.Record(west, "shop", "cart", 1)
	other.Ports = slices.Clone(other.Ports)
	other.Ports[0].Protocol = federation.TCP
	w.report(t, west, registry.Level{Records: registrytest.Records(&other, registrytest.Record(west, "eu", "tax", 1))})
	return w, east, west
}

func TestServicesAreMergedAndTheirConflictsNamed(t *testing.T) {
	t.Parallel()
	w, _, _ := fleet(t)
	list, err := w.client.ListServices(t.Context(), &api.ListServicesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range list.GetItems() {
		line := v.GetMetadata().GetNamespace() + "/" + v.GetMetadata().GetName()
		for _, r := range v.GetRecords() {
			line += fmt.Sprintf(" %s:%d/%d:%v", r.GetCluster(), r.GetReady(), r.GetEndpoints(), r.GetExported())
		}
		for _, f := range v.GetFindings() {
			line += " " + f.GetCode()
		}
		got = append(got, line)
	}
	want := []string{"eu/tax west:1/1:true", "kube-system/dns east:1/1:false", "shop/cart east:1/2:true west:1/1:true MESH2201"}
	for i := range want {
		if i >= len(got) || !strings.HasPrefix(got[i], want[i]) {
			t.Fatalf("services\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	one, err := w.client.ListServices(t.Context(), &api.ListServicesRequest{Cluster: "west", Namespace: "shop"})
	if err != nil || len(one.GetItems()) != 1 {
		t.Errorf("of west in shop: %v, %v", one, err)
	}
	if _, err := w.client.ListServices(t.Context(), &api.ListServicesRequest{Namespace: "shop", Name: "crat"}); api.ProblemOf(err).Try != "did you mean shop/cart?" {
		t.Errorf("a service that does not exist: %+v", api.ProblemOf(err))
	}
}

func TestEndpointsAreAsTheirClustersReportThem(t *testing.T) {
	t.Parallel()
	w, east, _ := fleet(t)
	w.sources.set(registry.SourceState{Source: east, Holding: true, Status: registry.Status{
		Conditions: []federation.Condition{{Type: federation.Reachable, Since: time.Now().Add(-time.Minute)}},
	}})
	list, err := w.client.ListEndpoints(t.Context(), &api.ListEndpointsRequest{Namespace: "shop", Service: "cart"})
	if err != nil || len(list.GetItems()) != 3 {
		t.Fatalf("endpoints %v, %v", list, err)
	}
	for _, e := range list.GetItems() {
		if stale := e.GetStaleSince() != nil; stale != (e.GetCluster() == "east") {
			t.Errorf("endpoint of %s: stale %v", e.GetCluster(), stale)
		}
		if a, err := netip.ParseAddr(e.GetAddresses()[0]); err != nil || !a.IsValid() || e.GetInstance() == "" || len(e.GetPorts()) == 0 {
			t.Errorf("endpoint %v", e)
		}
	}
	if _, err := w.client.ListEndpoints(t.Context(), &api.ListEndpointsRequest{Cluster: "north"}); api.ProblemOf(err).Code != api.UnknownName {
		t.Errorf("a cluster that does not exist: %v", err)
	}
}

func proxyStatus(source federation.SourceID, name string, behind time.Time, types ...xdsserver.TypeStatus) xdsserver.ProxyStatus {
	return xdsserver.ProxyStatus{
		Proxy: xds.Proxy{Workload: federation.WorkloadKey{Source: source, UID: name}, Name: name, Namespace: "shop", ServiceAccount: "cart", Role: federation.Sidecar},
		Node:  "sidecar~10.0.0.1~" + name + ".shop~shop.svc.cluster.local", Synced: behind.IsZero(), Behind: behind, Types: types,
	}
}

func TestProxiesTellWhatTheyRefused(t *testing.T) {
	t.Parallel()
	w, east, west := fleet(t)
	lds := "type.googleapis.com/envoy.config.listener.v3.Listener"
	w.proxies.set(
		proxyStatus(east, "good", time.Time{}, xdsserver.TypeStatus{TypeURL: lds, Version: "a", Resources: 3}),
		proxyStatus(west, "bad", time.Time{}, xdsserver.TypeStatus{TypeURL: lds, Version: "a", Refused: []xdsserver.Refusal{
			{At: time.Now(), Resources: []string{"virtualOutbound"}, Message: "no such filter"},
		}}),
		proxyStatus(west, "slow", time.Now().Add(-time.Minute), xdsserver.TypeStatus{TypeURL: lds, Pending: true}),
	)
	for _, c := range []struct {
		request *api.ListProxiesRequest
		want    string
	}{
		{&api.ListProxiesRequest{}, "east/good LDS synced, west/bad LDS rejected, west/slow LDS pending"},
		{&api.ListProxiesRequest{Troubled: true}, "west/bad LDS rejected, west/slow LDS pending"},
		{&api.ListProxiesRequest{Cluster: "east"}, "east/good LDS synced"},
		{&api.ListProxiesRequest{Name: "slow"}, "west/slow LDS pending"},
	} {
		list, err := w.client.ListProxies(t.Context(), c.request)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range list.GetItems() {
			got = append(got, p.GetCluster()+"/"+p.GetMetadata().GetName()+" "+p.GetTypes()[0].GetType()+" "+p.GetTypes()[0].GetState())
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("proxies %v, want %s", got, c.want)
		}
	}
}

// The check sees what is wrong, wherever it is, and says it once.
func TestTheCheckFindsWhatIsWrong(t *testing.T) {
	t.Parallel()
	lds := "type.googleapis.com/envoy.config.listener.v3.Listener"
	w, east, west := fleet(t, func(c *apiserver.Config) {
		c.Health = func() []apiserver.HealthCheck {
			return []apiserver.HealthCheck{{Name: "etcd"}, {Name: "configuration", Err: fmt.Errorf("not computed")}}
		}
		c.Findings = func() []federation.Finding {
			return []federation.Finding{{Code: "MESH4001", Severity: federation.SeverityError, Object: "VirtualService shop/x", Message: "bad"}, {Code: "MESH4001", Severity: federation.SeverityError, Object: "VirtualService shop/x", Message: "bad"}}
		}
	})
	w.sources.set(registry.SourceState{Source: west, Holding: true, Err: fmt.Errorf("fenced"), Status: registry.Status{Conditions: []federation.Condition{
		{Type: federation.CredentialsValid, Message: "the token expired", Since: time.Now()},
		{Type: federation.Synced, Status: true},
	}}})
	w.proxies.set(proxyStatus(east, "bad", time.Time{}, xdsserver.TypeStatus{TypeURL: lds, Refused: []xdsserver.Refusal{{Message: "no such filter", Resources: []string{"l"}}}}),
		proxyStatus(east, "slow", time.Now().Add(-time.Minute)))
	w.report(t, east, registry.Level{Objects: map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{
		"EnvoyFilter.networking.istio.io": {{Namespace: "shop", Name: "lua"}: {
			Source: east, APIVersion: "networking.istio.io/v1alpha3", Kind: "EnvoyFilter", Namespace: "shop", Name: "lua", Created: time.Now(), Raw: []byte(`{"apiVersion":"networking.istio.io/v1alpha3","kind":"EnvoyFilter","metadata":{"name":"lua","namespace":"shop"},"spec":{}}`),
		}},
	}})
	registrytest.Eventually(t, w.store, "the object", func(s *federation.Snapshot) bool { return len(s.Objects) == 1 })
	report, err := w.client.Check(t.Context(), &api.CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	for _, g := range report.GetGroups() {
		for _, f := range g.GetFindings() {
			if f.GetCode() != "" {
				found[g.GetName()+" "+f.GetCode()]++
				if _, ok := api.Explain(api.Code(f.GetCode())); !ok {
					t.Errorf("%s has no explanation", f.GetCode())
				}
			}
		}
	}
	for _, want := range []string{
		"control service MESH7001", "clusters MESH3003", "services MESH4001", "services MESH7005",
		"configuration MESH5001", "proxies MESH4101", "proxies MESH4102",
	} {
		if found[want] != 1 {
			t.Errorf("%s is found %d times; found: %v", want, found[want], found)
		}
	}
	if n := found["services MESH2201"]; n != 1 { // seen by both clusters, each from its side
		t.Errorf("the conflict is found %d times", n)
	}
	if report.GetErrors() == 0 || report.GetWarnings() == 0 {
		t.Errorf("%d errors, %d warnings", report.GetErrors(), report.GetWarnings())
	}
	config, err := w.client.ListConfig(t.Context(), &api.ListConfigRequest{Kind: "envoyfilter"})
	if err != nil || len(config.GetItems()) != 1 || config.GetItems()[0].GetStatus() != "NotYetTranslated" {
		t.Errorf("configuration %v, %v", config, err)
	}
}

// Who did what is told, also while it happens.
func TestActivityIsFollowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	stream, err := w.client.TailActivity(t.Context(), &api.TailActivityRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	joined := make(chan *api.Activity)
	go func() {
		for {
			a, err := stream.Recv()
			if err != nil {
				return
			}
			if a.GetVerb() == "register-cluster" {
				joined <- a
			}
		}
	}()
	w.join(t, "uid-e", "east", "n1")
	select {
	case a := <-joined:
		if a.GetActor() != "spiffe://cluster.local/ns/isthmus-system/sa/admin" || a.GetObject() != "east on network n1" || a.GetResult() != "ok" {
			t.Errorf("activity %v", a)
		}
	case <-time.After(registrytest.Patience):
		t.Fatal("the join is not told")
	}
}

// What the log names by UIDs is told by names, also of pods and clusters that are gone;
// and the logs of all replicas are told as one.
func TestActivityTellsNamesOfAllReplicas(t *testing.T) {
	t.Parallel()
	one := newWorld(t)
	east := one.join(t, "uid-e", "east", "n1")
	one.report(t, east, registry.Level{Workloads: map[string]*federation.Workload{"uid-1": {
		Source: east, Namespace: "shop", Name: "cart-7d9f", UID: "uid-1", Role: federation.Sidecar, ServiceAccount: "cart", Network: "n1",
	}}})
	registrytest.Eventually(t, one.store, "the pod", func(s *federation.Snapshot) bool { return len(s.Workloads) == 1 })
	serving := one.ca.Serving(t, "127.0.0.1")
	peers := apiserver.NewPeerGroup(apiserver.PeerConfig{
		Addresses: func() []string { return []string{one.address, "127.0.0.1:1"} },
		Authority: one.ca.Authority, Certificate: func() *tls.Certificate { return &serving }, Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() { peers.Close() })
	two := newWorld(t, func(c *apiserver.Config) {
		c.Store, c.Authority, c.Peers, c.Replica = one.store, one.ca.Authority, peers, "meshd-1"
	})
	two.client = api.NewAdminClient(two.dial(t, two.address, one.ca.Admin(t)))
	write := func(w *world, e ca.AuditEntry) {
		t.Helper()
		if err := w.ca.Audit.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	write(one, ca.AuditEntry{Event: ca.AuditIssued, Source: ca.Source(east), Instance: "uid-1", SPIFFEID: "spiffe://cluster.local/ns/shop/sa/cart", Serial: "0a", Method: "token"})
	write(two, ca.AuditEntry{Event: ca.AuditRefused, Source: ca.Source(east), Instance: "uid-gone", Reason: "no"})
	write(one, ca.AuditEntry{Event: "admin", Method: "remove-cluster", Source: "kube:uid-old", Reason: "old"})
	write(two, ca.AuditEntry{Event: ca.AuditRevoked, Source: "vm:n1", Instance: "web-1", Reason: "offboarded"})
	write(one, ca.AuditEntry{Event: ca.AuditRevoked, Source: "kube:uid-old"})

	stream, err := two.client.TailActivity(t.Context(), &api.TailActivityRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	next := func(want string) {
		t.Helper()
		for {
			a, err := stream.Recv()
			if err != nil {
				t.Fatalf("waiting for %q: %v", want, err)
			}
			if got := a.GetVerb() + " " + a.GetObject(); got == want {
				return
			} else if slices.Contains([]string{"issued", "refused", "revoked", "remove-cluster"}, a.GetVerb()) && !strings.Contains(a.GetActor(), "isthmus-system") {
				t.Fatalf("got %q, want %q", got, want)
			}
		}
	}
	next("issued pod shop/cart-7d9f in east")
	next("refused a former pod in east")
	next("remove-cluster old")
	next("revoked machine web-1 on n1")
	next("revoked cluster old (left)")
	// And it goes on, of both.
	write(one, ca.AuditEntry{Event: ca.AuditRefused, Source: ca.Source(east), Instance: "uid-1", Reason: "later"})
	next("refused pod shop/cart-7d9f in east")
	write(two, ca.AuditEntry{Event: ca.AuditRefused, Source: ca.Source(east), Reason: "later still"})
	next("refused cluster east")
}
