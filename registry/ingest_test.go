// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

type noSealer struct{}

func (noSealer) Seal(_ string, plain []byte) ([]byte, error)  { return plain, nil }
func (noSealer) Open(_ string, sealed []byte) ([]byte, error) { return sealed, nil }

// replicas are stores that share one etcd.
func replicas(t *testing.T, names ...string) []*etcd.Store {
	t.Helper()
	db, err := etcd.Open(t.Context(), etcd.DatabaseConfig{DataDir: t.TempDir(), Unsynced: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	var out []*etcd.Store
	for _, name := range names {
		store := etcd.New(etcd.StoreConfig{Client: db.Client(), Sealer: noSealer{}, Replica: name, SessionTTL: time.Second})
		run(t, store.Run)
		<-store.Ready()
		out = append(out, store)
	}
	return out
}

// run runs f until the test ends or stop is called.
func run(t *testing.T, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func join(t *testing.T, store registry.Store, id federation.ClusterID, name string, change func(*registry.Member)) *registry.Member {
	t.Helper()
	m := registrytest.Member(t, id, name)
	if change != nil {
		change(m)
	}
	if _, err := store.Join(t.Context(), m, registrytest.Token("t"), false); err != nil {
		t.Fatal(err)
	}
	return m
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(registrytest.Patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not true: %s", registrytest.Patience, what)
		}
	}
}

func runner(store registry.Store, sources map[federation.ClusterID]*registrytest.Source) *registry.Runner {
	return registry.NewRunner(registry.RunnerConfig{
		Store: store, Retry: 50 * time.Millisecond,
		Cluster: func(m *registry.Member) registry.Source { return sources[m.ID] },
	})
}

func TestOneReplicaSyncsASourceAndTheOtherTakesOver(t *testing.T) {
	t.Parallel()
	stores := replicas(t, "a", "b")
	m := join(t, stores[0], "uid-1", "east", nil)
	level := registry.Level{Records: registrytest.Records(registrytest.Record(m.Source(), "shop", "cart", 2))}
	var sources [2]*registrytest.Source
	var runners [2]*registry.Runner
	var stops [2]func()
	for i, store := range stores {
		sources[i] = &registrytest.Source{}
		sources[i].Set(level)
		runners[i] = runner(store, map[federation.ClusterID]*registrytest.Source{"uid-1": sources[i]})
		stops[i] = run(t, runners[i].Run)
	}
	holder := func() int {
		for i, r := range runners {
			if s := r.Sources(); len(s) == 1 && s[0].Holding {
				return i
			}
		}
		return -1
	}
	eventually(t, "somebody syncs", func() bool { return holder() >= 0 })
	first := holder()
	registrytest.Eventually(t, stores[1-first], "the other replica sees it", func(s *federation.Snapshot) bool { return len(s.Records) == 1 })
	if runs, _ := sources[1-first].Runs(); runs != 0 {
		t.Errorf("the other replica's source was started %d times", runs)
	}
	stops[first]()
	eventually(t, "the other replica syncs", func() bool { _, running := sources[1-first].Runs(); return running })
	if _, running := sources[first].Runs(); running {
		t.Error("the source of the replica that stopped still runs")
	}
	sources[1-first].Set(registry.Level{Records: registrytest.Records()})
	registrytest.Eventually(t, stores[1-first], "its reports count", func(s *federation.Snapshot) bool { return len(s.Records) == 0 })
}

func TestBurstsAreCoalesced(t *testing.T) {
	t.Parallel()
	store := replicas(t, "a")[0]
	m := join(t, store, "uid-1", "east", nil)
	source := &registrytest.Source{}
	record := registrytest.Record(m.Source(), "shop", "cart", 2)
	source.Set(registry.Level{Records: registrytest.Records(record)})
	r := registry.NewRunner(registry.RunnerConfig{Store: store, Holdoff: 200 * time.Millisecond, Cluster: func(*registry.Member) registry.Source { return source }})
	run(t, r.Run)
	registrytest.Eventually(t, store, "the first level is stored", func(s *federation.Snapshot) bool { return len(s.Records) == 1 })
	before := store.Health().Revision
	for i := range 100 {
		record = registrytest.Change(record, 0, func(e *federation.Endpoint) { e.Hostname = fmt.Sprint("h", i) })
		source.Set(registry.Level{Records: registrytest.Records(record)})
	}
	registrytest.Eventually(t, store, "the last one is stored", func(s *federation.Snapshot) bool {
		return s.Records[record.Name][0].Endpoints[0].Hostname == "h99"
	})
	if n := store.Health().Revision - before; n > 5 {
		t.Errorf("100 changes in a row took %d revisions", n)
	}
	before = store.Health().Revision
	for range 3 {
		stored := r.Sources()[0].Stored
		source.Set(registry.Level{Records: registrytest.Records(record)})
		eventually(t, "the level was looked at", func() bool { return r.Sources()[0].Stored.After(stored) })
	}
	if after := store.Health().Revision; after != before {
		t.Errorf("the same level again made revision %d from %d", after, before)
	}
}

func TestSourceThatFailsIsStartedAgain(t *testing.T) {
	t.Parallel()
	store := replicas(t, "a")[0]
	m := join(t, store, "uid-1", "east", nil)
	source := &registrytest.Source{}
	source.Set(registry.Level{Records: registrytest.Records(registrytest.Record(m.Source(), "shop", "cart", 2))})
	r := runner(store, map[federation.ClusterID]*registrytest.Source{"uid-1": source})
	run(t, r.Run)
	registrytest.Eventually(t, store, "it is stored", func(s *federation.Snapshot) bool { return len(s.Records) == 1 })
	source.Fail(errors.New("broken"))
	eventually(t, "it runs again", func() bool { runs, running := source.Runs(); return runs == 2 && running })
	if s, _ := store.Snapshot(); len(s.Records) != 1 {
		t.Error("its records are gone")
	}
	source.Observe(registry.Status{Conditions: []federation.Condition{{Type: federation.Reachable, Reason: "Timeout"}}, Lag: time.Second})
	registrytest.Eventually(t, store, "its condition is stored", func(s *federation.Snapshot) bool {
		c := s.Clusters["uid-1"].Conditions
		return len(c) == 1 && c[0].Type == federation.Reachable && !c[0].Since.IsZero()
	})
	if s := r.Sources()[0]; s.Status.Lag != time.Second || !s.Holding {
		t.Errorf("state: %+v", s)
	}
	if err := store.Leave(t.Context(), "uid-1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is stopped", func() bool { _, running := source.Runs(); return !running && len(r.Sources()) == 0 })
}

func TestGrantsAreEnforced(t *testing.T) {
	t.Parallel()
	store := replicas(t, "a")[0]
	m := join(t, store, "uid-1", "east", func(m *registry.Member) {
		m.Grant = federation.Grant{Namespaces: []string{"shop", "pay*"}, ServiceAccounts: []string{"shop/*", "pay/good"}}
	})
	source := m.Source()
	mixed := registrytest.Record(source, "pay", "mixed", 2)
	mixed.Endpoints[0].ServiceAccount, mixed.Endpoints[1].ServiceAccount = "good", "evil"
	workload := func(uid, ns, account string) *federation.Workload {
		return &federation.Workload{Source: source, UID: uid, Namespace: ns, Name: uid, ServiceAccount: account}
	}
	kind := registry.ObjectKind("VirtualService.networking.istio.io")
	object := func(ns string) *federation.Object {
		return &federation.Object{Source: source, Kind: "VirtualService", Namespace: ns, Name: "x", Raw: []byte("{}")}
	}
	s := &registrytest.Source{}
	s.Set(registry.Level{
		Records: registrytest.Records(registrytest.Record(source, "shop", "cart", 1), registrytest.Record(source, "other", "cart", 1),
			registrytest.Record(source, "kube-system", "dns", 1), mixed),
		Workloads: map[string]*federation.Workload{"1": workload("1", "shop", "any"), "2": workload("2", "pay", "evil"), "3": workload("3", "kube-system", "x")},
		Objects:   map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{kind: {{Namespace: "shop", Name: "x"}: object("shop"), {Namespace: "other", Name: "x"}: object("other")}},
	})
	r := runner(store, map[federation.ClusterID]*registrytest.Source{"uid-1": s})
	run(t, r.Run)
	name := func(ns, n string) federation.ServiceName { return federation.ServiceName{Namespace: ns, Name: n} }
	snapshot := registrytest.Eventually(t, store, "what is granted is there", func(s *federation.Snapshot) bool {
		return len(s.Records) == 3 && len(s.Workloads) == 1 && len(s.Objects) == 1
	})
	if snapshot.Records[name("other", "cart")] != nil || snapshot.Records[name("kube-system", "dns")] == nil {
		t.Errorf("records: %v", snapshot.Records)
	}
	if e := snapshot.Records[name("pay", "mixed")][0].Endpoints; len(e) != 1 || e[0].ServiceAccount != "good" {
		t.Errorf("endpoints: %+v", e)
	}
	var said []string
	for _, f := range r.Sources()[0].Findings {
		said = append(said, f.Code+" "+f.Object)
	}
	want := "MESH2204 VirtualService.networking.istio.io other @ kube:uid-1, MESH2204 endpoints pay/evil @ kube:uid-1, " +
		"MESH2204 services other @ kube:uid-1, MESH2204 workloads pay/evil @ kube:uid-1"
	if got := strings.Join(said, ", "); got != want {
		t.Errorf("findings\n got %s\nwant %s", got, want)
	}
	if err := store.UpdateMember(t.Context(), "uid-1", func(m *registry.Member) error { m.Grant = federation.Grant{}; return nil }); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, store, "a wider grant counts at once", func(s *federation.Snapshot) bool {
		return len(s.Records) == 4 && len(s.Workloads) == 2 && len(s.Records[name("pay", "mixed")][0].Endpoints) == 2
	})
}

func TestAddressesAreAllocatedAndRest(t *testing.T) {
	t.Parallel()
	stores := replicas(t, "a", "b")
	east, west := join(t, stores[0], "uid-1", "east", nil), join(t, stores[0], "uid-2", "west", nil)
	registrytest.Eventually(t, stores[1], "both are known", func(s *federation.Snapshot) bool { return len(s.Clusters) == 2 })
	for _, store := range stores { // both allocate, and agree
		run(t, registry.Allocator{Store: store, Holdoff: time.Millisecond}.Run)
	}
	session, err := stores[0].Begin(t.Context(), east.Source())
	if err != nil {
		t.Fatal(err)
	}
	apply := func(names ...string) {
		t.Helper()
		var records []*federation.Record
		for _, name := range names {
			records = append(records, registrytest.Record(east.Source(), "shop", name, 1))
		}
		if _, err := session.Apply(t.Context(), &registry.Level{Records: registrytest.Records(records...)}); err != nil {
			t.Fatal(err)
		}
	}
	apply("cart", "web")
	host := federation.ServiceName{Namespace: "shop", Name: "cart"}.Host()
	s := registrytest.Eventually(t, stores[1], "both services have addresses", func(s *federation.Snapshot) bool { return len(s.Addresses) == 2 })
	given := s.Addresses[host]
	if !federation.VirtualV4.Contains(given.V4) || !federation.VirtualV6.Contains(given.V6) {
		t.Errorf("address: %+v", given)
	}
	apply("web")
	registrytest.Eventually(t, stores[1], "the address rests", func(s *federation.Snapshot) bool { return !s.Addresses[host].Released.IsZero() })
	apply("cart", "web")
	registrytest.Eventually(t, stores[1], "it is the same again", func(s *federation.Snapshot) bool { return s.Addresses[host] == given })
	if err := stores[0].Leave(t.Context(), west.ID); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, stores[1], "nobody needs them any more", func(s *federation.Snapshot) bool {
		for _, a := range s.Addresses {
			if a.Released.IsZero() {
				return false
			}
		}
		return len(s.Addresses) == 2
	})
}

func TestMembersAreValidated(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		field  string
		change func(*registry.Member)
	}{
		{"uid", func(m *registry.Member) { m.ID = "a/b" }},
		{"name", func(m *registry.Member) { m.Name = "" }},
		{"network", func(m *registry.Member) { m.Network = "a b" }},
		{"role", func(m *registry.Member) { m.Role = "boss" }},
		{"apiServer", func(m *registry.Member) { m.APIServer = "http://192.0.2.1" }},
		{"issuerKeys", func(m *registry.Member) { m.IssuerKeys = []byte(`{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}`) }},
	} {
		m := registrytest.Member(t, "uid", "east")
		c.change(m)
		if err := m.Validate(); err == nil || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: got %v", c.field, err)
		}
	}
	vm := &registry.VM{Network: "n", Name: "web", Service: federation.ServiceName{Namespace: "legacy", Name: "web"}, ServiceAccount: "web", Ports: []registry.VMPort{{Number: 80}, {Number: 80}}}
	if err := vm.Validate(); err == nil || !strings.Contains(err.Error(), "port 80") {
		t.Errorf("a port given twice: %v", err)
	}
	a := registry.VMHealth{Healthy: true, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Since: time.Now()}
	b := a
	b.Since = time.Time{}
	if !a.Same(&b) {
		t.Error("reports that mean the same differ")
	}
}

func FuzzParseTokenTimes(f *testing.F) {
	f.Add("a.b.c")
	f.Add("e30.eyJpYXQiOjEsImV4cCI6Mn0.x")
	f.Fuzz(func(t *testing.T, token string) {
		registry.ParseTokenTimes(token)
		registry.TokenSubject(token)
	})
}

func FuzzKeyThumbprints(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"RSA"}]}`))
	f.Fuzz(func(t *testing.T, keys []byte) { registry.KeyThumbprints(keys) })
}
