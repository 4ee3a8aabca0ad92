// SPDX-License-Identifier: Apache-2.0

package registrytest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// Patience is how long a condition of a test may take to come true.
const Patience = 20 * time.Second

// Eventually waits until what the store holds is as it should be; want says how.
func Eventually(t testing.TB, store registry.Store, want string, is func(*federation.Snapshot) bool) *federation.Snapshot {
	t.Helper()
	deadline := time.After(Patience)
	for {
		snapshot, changed := store.Snapshot()
		if is(snapshot) {
			return snapshot
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("after %v still not true: %s (revision %d, %d services)", Patience, want, snapshot.Revision, len(snapshot.Records))
		}
	}
}

// Store runs the conformance suite. newReplica makes one more replica of a store of its
// own for each subtest: replicas that were made with the same testing.T share their state.
func Store(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	for _, story := range []struct {
		name string
		tell func(t *testing.T, newReplica func(t *testing.T) registry.Store)
	}{
		{"what a session applies is what every replica sees", appliedIsSeen},
		{"nothing is written when nothing changed", nothingChanged},
		{"one endpoint's change is one small transaction", oneChange},
		{"a large record becomes visible as a whole", largeRecord},
		{"what is unknown stays as it was", unknownStays},
		{"a late session writes nothing", lateSession},
		{"what is exposed is shown here alone, until it is stored", exposed},
		{"who has stored a whole level is known", settled},
		{"snapshots share what did not change", sharing},
		{"members are unique", uniqueMembers},
		{"a member that leaves takes everything along", leaving},
		{"conditions are transitions", conditions},
		{"addresses are created once", addresses},
		{"VMs report and are lost", vms},
	} {
		t.Run(story.name, func(t *testing.T) {
			t.Parallel()
			story.tell(t, newReplica)
		})
	}
}

func begin(t *testing.T, store registry.Store, source federation.SourceID) registry.Session {
	t.Helper()
	session, err := store.Begin(t.Context(), source)
	if err != nil {
		t.Fatalf("begin a session: %v", err)
	}
	t.Cleanup(func() { session.Close(context.Background()) })
	return session
}

// reached waits until a replica has read a revision.
func reached(t *testing.T, store registry.Store, revision federation.Revision) {
	t.Helper()
	for deadline := time.Now().Add(Patience); store.Health().Revision < revision; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %v at revision %d, want %d", Patience, store.Health().Revision, revision)
		}
	}
}

func apply(t *testing.T, session registry.Session, level registry.Level) registry.Written {
	t.Helper()
	written, err := session.Apply(t.Context(), &level)
	if err != nil {
		t.Fatalf("apply: %v", err)
	}
	return written
}

func join(t *testing.T, store registry.Store, id federation.ClusterID, name string) *registry.Member {
	t.Helper()
	m := Member(t, id, name)
	if _, err := store.Join(t.Context(), m, Token("secret of "+name), false); err != nil {
		t.Fatalf("join %s: %v", name, err)
	}
	return m
}

func recordOf(s *federation.Snapshot, source federation.SourceID, namespace, name string) *federation.Record {
	for _, r := range s.Records[federation.ServiceName{Namespace: namespace, Name: name}] {
		if r.Source == source {
			return r
		}
	}
	return nil
}

// sees waits until a store holds exactly this record.
func sees(t *testing.T, store registry.Store, want *federation.Record) *federation.Snapshot {
	t.Helper()
	return Eventually(t, store, fmt.Sprintf("%s is as it was applied", want.Name), func(s *federation.Snapshot) bool {
		return reflect.DeepEqual(recordOf(s, want.Source, want.Name.Namespace, want.Name.Name), want)
	})
}

func appliedIsSeen(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	a, b := newReplica(t), newReplica(t)
	m := join(t, a, "uid-1", "east")
	source := m.Source()
	cart := Record(source, "shop", "cart", 150)
	cart.Endpoints[3].Hostname = "cart-3"
	cart.Endpoints[3].Addresses = append(cart.Endpoints[3].Addresses, netip.MustParseAddr("fd00::3"))
	cart.Endpoints[4].Health = federation.Terminating
	cart.Endpoints[5].TargetPorts = nil
	cart.Endpoints[6].Labels = nil
	empty := Record(source, "shop", "empty", 0)
	workload := &federation.Workload{Source: source, Namespace: "shop", Name: "cart-1", UID: "u-1", Role: federation.Sidecar, ServiceAccount: "cart", Network: "n1"}
	gateway := &federation.Gateway{Source: source, Network: "n1", Name: "isthmus-system/isthmus-eastwestgateway", Addresses: []federation.GatewayAddress{{Host: "192.0.2.7", Port: 15443}}, Ready: 2}
	object := &federation.Object{Source: source, APIVersion: "networking.istio.io/v1", Kind: "VirtualService", Namespace: "shop", Name: "cart", Raw: []byte(`{"spec":{"hosts":["a<b>&c"]}}`)}
	session := begin(t, a, source)
	apply(t, session, registry.Level{
		Records:   Records(cart, empty),
		Workloads: map[string]*federation.Workload{"u-1": workload},
		Gateways:  map[string]*federation.Gateway{gateway.Name: gateway},
		Objects: map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{
			"VirtualService.networking.istio.io": {{Namespace: "shop", Name: "cart"}: object},
		},
	})
	for _, store := range []registry.Store{a, b} {
		sees(t, store, cart)
		snapshot := sees(t, store, empty)
		if got := snapshot.Workloads[federation.WorkloadKey{Source: source, UID: "u-1"}]; !reflect.DeepEqual(got, workload) {
			t.Errorf("workload: got %+v, want %+v", got, workload)
		}
		if got := snapshot.Gateways["n1"]; len(got) != 1 || !reflect.DeepEqual(got[0], gateway) {
			t.Errorf("gateways: got %+v, want %+v", got, gateway)
		}
		if got := snapshot.Objects; len(got) != 1 || !reflect.DeepEqual(got[0], object) {
			t.Errorf("objects: got %+v, want %+v", got, object)
		}
	}
	apply(t, session, registry.Level{Records: Records(cart), Workloads: map[string]*federation.Workload{}})
	Eventually(t, b, "the other service and the workload are gone", func(s *federation.Snapshot) bool {
		return len(s.Records) == 1 && len(s.Workloads) == 0 && len(s.Gateways) == 1 && len(s.Objects) == 1
	})
}

func nothingChanged(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	m := join(t, store, "uid-1", "east")
	level := func() registry.Level {
		return registry.Level{
			Records:   Records(Record(m.Source(), "shop", "cart", 130), Record(m.Source(), "shop", "web", 3)),
			Workloads: map[string]*federation.Workload{"u-1": {Source: m.Source(), Namespace: "shop", Name: "web-1", UID: "u-1", Role: federation.Sidecar}},
			Gateways:  map[string]*federation.Gateway{"a/b": {Source: m.Source(), Network: "n1", Name: "a/b", Pending: "no address yet"}},
			Objects: map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{"Sidecar.networking.istio.io": {
				{Namespace: "shop", Name: "s"}: {Source: m.Source(), Kind: "Sidecar", Namespace: "shop", Name: "s", Raw: []byte("{ \"spec\": {} }")}}},
		}
	}
	session := begin(t, store, m.Source())
	same := level()
	if w := apply(t, session, same); w.Transactions == 0 {
		t.Error("the first level wrote nothing")
	}
	if w := apply(t, session, same); w.Transactions != 0 {
		t.Errorf("the same level again wrote %+v", w)
	}
	if w := apply(t, session, level()); w.Transactions != 0 {
		t.Errorf("an equal level of new pointers wrote %+v", w)
	}
	if err := session.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := begin(t, store, m.Source())
	if w := apply(t, next, level()); w.Operations > 1 {
		t.Errorf("an equal level in the next session wrote %+v, want no more than whose it is", w)
	}
	if w := apply(t, next, level()); w.Transactions != 0 {
		t.Errorf("an equal level again wrote %+v", w)
	}
}

func oneChange(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	m := join(t, store, "uid-1", "east")
	session := begin(t, store, m.Source())
	record := Record(m.Source(), "shop", "catalogue-of-a-long-name", 1000)
	apply(t, session, registry.Level{Records: Records(record)})
	for i, change := range []func(e *federation.Endpoint){
		func(e *federation.Endpoint) { e.Health = federation.NotReady },
		func(e *federation.Endpoint) { e.Addresses = []netip.Addr{netip.MustParseAddr("10.9.9.9")} },
		func(e *federation.Endpoint) { e.Workload = "catalogue-of-a-long-name-zzz" },
	} {
		record = Change(record, 999, change)
		w := apply(t, session, registry.Level{Records: Records(record)})
		if w.Transactions != 1 || w.Bytes > 8192 {
			t.Errorf("change %d: wrote %+v, want one transaction of at most 8192 bytes", i, w)
		}
		sees(t, store, record)
	}
	less := *record
	less.Endpoints = record.Endpoints[1:]
	if w := apply(t, session, registry.Level{Records: Records(&less)}); w.Transactions != 1 || w.Bytes > 8192 {
		t.Errorf("an endpoint that goes: wrote %+v, want one transaction of at most 8192 bytes", w)
	}
	if w := apply(t, session, registry.Level{Records: Records(record)}); w.Transactions != 1 || w.Bytes > 8192 {
		t.Errorf("an endpoint that comes: wrote %+v, want one transaction of at most 8192 bytes", w)
	}
	sees(t, store, record)
}

func largeRecord(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	m := join(t, store, "uid-1", "east")
	session := begin(t, store, m.Source())
	const size = 12000
	record := Record(m.Source(), "shop", "large", size)
	done := make(chan []int)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { // whatever anybody sees is all or nothing
		var odd []int
		for {
			snapshot, changed := store.Snapshot()
			if r := recordOf(snapshot, m.Source(), "shop", "large"); r != nil && len(r.Endpoints) != size && len(r.Endpoints) != 5 {
				odd = append(odd, len(r.Endpoints))
			}
			select {
			case <-changed:
			case <-ctx.Done():
				done <- odd
				return
			}
		}
	}()
	apply(t, session, registry.Level{Records: Records(record)})
	sees(t, store, record)
	moved := *record
	moved.Endpoints = append([]federation.Endpoint(nil), record.Endpoints...)
	for i := range moved.Endpoints {
		moved.Endpoints[i].Network = "n2"
	}
	apply(t, session, registry.Level{Records: Records(&moved)})
	sees(t, store, &moved)
	small := Record(m.Source(), "shop", "large", 5)
	apply(t, session, registry.Level{Records: Records(small)})
	sees(t, store, small)
	cancel()
	if odd := <-done; len(odd) > 0 {
		t.Errorf("seen in part, with %v endpoints", odd)
	}
	apply(t, session, registry.Level{Records: Records(record)})
	apply(t, session, registry.Level{Records: Records()})
	Eventually(t, store, "the record is gone", func(s *federation.Snapshot) bool { return len(s.Records) == 0 })
}

func unknownStays(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	m := join(t, store, "uid-1", "east")
	session := begin(t, store, m.Source())
	cart := Record(m.Source(), "shop", "cart", 2)
	objects := map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{
		"A.example.org": {{Namespace: "shop", Name: "x"}: {Source: m.Source(), Kind: "A", Namespace: "shop", Name: "x", Raw: []byte("{}")}},
		"B.example.org": {{Namespace: "shop", Name: "x"}: {Source: m.Source(), Kind: "B", Namespace: "shop", Name: "x", Raw: []byte("{}")}},
	}
	apply(t, session, registry.Level{Records: Records(cart), Objects: objects})
	if w := apply(t, session, registry.Level{}); w.Transactions != 0 {
		t.Errorf("a level that knows nothing wrote %+v", w)
	}
	apply(t, session, registry.Level{Objects: map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{"B.example.org": {}}})
	snapshot := Eventually(t, store, "only objects of kind B are gone", func(s *federation.Snapshot) bool { return len(s.Objects) == 1 })
	if recordOf(snapshot, m.Source(), "shop", "cart") == nil || snapshot.Objects[0].Kind != "A" {
		t.Errorf("what was unknown is gone: %+v", snapshot)
	}
}

func lateSession(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	a, b := newReplica(t), newReplica(t)
	m := join(t, a, "uid-1", "east")
	Eventually(t, b, "the other replica knows the cluster", func(s *federation.Snapshot) bool { return len(s.Clusters) == 1 })
	first := begin(t, a, m.Source())
	apply(t, first, registry.Level{Records: Records(Record(m.Source(), "shop", "cart", 1))})
	if _, err := b.Begin(t.Context(), m.Source()); !errors.Is(err, registry.ErrHeld) {
		t.Fatalf("a second session: got %v, want ErrHeld", err)
	}
	if _, err := a.Begin(t.Context(), federation.KubeSource("nobody")); !errors.Is(err, registry.ErrNotFound) {
		t.Fatalf("a session of no member: got %v, want ErrNotFound", err)
	}
	if err := first.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := begin(t, b, m.Source())
	cart := Record(m.Source(), "shop", "cart", 2)
	apply(t, second, registry.Level{Records: Records(cart)})
	if _, err := first.Apply(t.Context(), &registry.Level{Records: Records()}); !errors.Is(err, registry.ErrFenced) {
		t.Fatalf("a late write: got %v, want ErrFenced", err)
	}
	sees(t, a, cart)
}

func exposed(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	a, b := newReplica(t), newReplica(t)
	m := join(t, a, "uid-1", "east")
	source := m.Source()
	session := begin(t, a, source)
	cart, web := Record(source, "shop", "cart", 2), Record(source, "shop", "web", 2)
	w := &federation.Workload{Source: source, UID: "u-1", Namespace: "shop", Name: "cart-1"}
	g := &federation.Gateway{Source: source, Network: "n1", Name: "a/b", Ready: 1}
	apply(t, session, registry.Level{
		Records: Records(cart, web), Workloads: map[string]*federation.Workload{"u-1": w}, Gateways: map[string]*federation.Gateway{g.Name: g},
	})
	before := sees(t, a, web)
	sees(t, b, cart)

	less := Change(cart, 0, func(e *federation.Endpoint) { e.Health = federation.NotReady })
	again, fresh := *web, Record(source, "shop", "fresh", 1)
	level := &registry.Level{Records: Records(less, &again, fresh), Workloads: map[string]*federation.Workload{}}
	a.Expose(source, level)
	shown, _ := a.Snapshot()
	if !reflect.DeepEqual(recordOf(shown, source, "shop", "cart"), less) || recordOf(shown, source, "shop", "fresh") == nil || len(shown.Workloads) != 0 {
		t.Errorf("what is exposed is not shown: %+v", shown)
	}
	if len(shown.Gateways["n1"]) != 1 {
		t.Error("what the exposed level does not know is not shown as it is stored")
	}
	if recordOf(shown, source, "shop", "web") != recordOf(before, source, "shop", "web") {
		t.Error("a record that means the same was shown as another one")
	}
	if s, _ := b.Snapshot(); !reflect.DeepEqual(recordOf(s, source, "shop", "cart"), cart) || recordOf(s, source, "shop", "fresh") != nil {
		t.Errorf("the other replica shows it too: %+v", s)
	}
	if a.Expose(source, level); func() bool { s, _ := a.Snapshot(); return s != shown }() {
		t.Error("the same level again made another snapshot")
	}

	written := apply(t, session, *level)
	a.Conceal(source, written.Revision+1)
	sees(t, b, less)
	reached(t, a, written.Revision)
	stored, _ := a.Snapshot()
	if recordOf(stored, source, "shop", "cart") != recordOf(shown, source, "shop", "cart") {
		t.Error("what is exposed is no longer shown")
	}
	a.Conceal(source, written.Revision)
	concealed, _ := a.Snapshot()
	if !reflect.DeepEqual(concealed.Records, stored.Records) || len(concealed.Workloads) != 0 || len(concealed.Gateways["n1"]) != 1 {
		t.Errorf("it is stored now, and shown otherwise: %+v", concealed)
	}
	if recordOf(concealed, source, "shop", "web") != recordOf(before, source, "shop", "web") {
		t.Error("a record that never changed was copied")
	}
	a.Expose(source, &registry.Level{Records: Records()})
	if s, _ := a.Snapshot(); len(s.Records) != 0 {
		t.Errorf("shown although its source has withdrawn it: %+v", s.Records)
	}
	a.Conceal(source, 0)
	if s, _ := a.Snapshot(); len(s.Records) != 3 {
		t.Errorf("shown are %d services, want the 3 that are stored", len(s.Records))
	}
}

func settled(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	a, b := newReplica(t), newReplica(t)
	m := join(t, a, "uid-1", "east")
	source := m.Source()
	first := begin(t, a, source)
	if a.SyncedElsewhere(source) || a.Settled(source) != 0 {
		t.Error("settled before anything was stored")
	}
	apply(t, first, registry.Level{Objects: map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{}})
	cart := Record(source, "shop", "cart", 2)
	written := apply(t, first, registry.Level{Records: Records(cart)})
	reached(t, b, written.Revision)
	if !b.SyncedElsewhere(source) || b.Settled(source) != first.Began() || a.SyncedElsewhere(source) {
		t.Errorf("settled by %d, want %d, and by the first replica", b.Settled(source), first.Began())
	}
	if err := first.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := begin(t, b, source)
	if b.SyncedElsewhere(source) || b.Settled(source) != first.Began() {
		t.Error("a session that has stored nothing yet has settled the source")
	}
	written = apply(t, second, registry.Level{Records: Records(cart)})
	reached(t, a, written.Revision)
	if !a.SyncedElsewhere(source) || a.Settled(source) != second.Began() {
		t.Errorf("settled by %d, want %d", a.Settled(source), second.Began())
	}
	if err := b.Leave(t.Context(), m.ID); err != nil {
		t.Fatal(err)
	}
	if b.SyncedElsewhere(source) || b.Settled(source) != 0 {
		t.Error("still settled after the cluster has left")
	}
}

func sharing(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	m := join(t, store, "uid-1", "east")
	session := begin(t, store, m.Source())
	cart, web := Record(m.Source(), "shop", "cart", 2), Record(m.Source(), "shop", "web", 2)
	apply(t, session, registry.Level{Records: Records(cart, web)})
	before := sees(t, store, web)
	changed := Change(cart, 0, func(e *federation.Endpoint) { e.Health = federation.NotReady })
	apply(t, session, registry.Level{Records: Records(changed, web)})
	after := sees(t, store, changed)
	if after.Revision <= before.Revision {
		t.Errorf("revision %d after %d", after.Revision, before.Revision)
	}
	if recordOf(before, m.Source(), "shop", "web") != recordOf(after, m.Source(), "shop", "web") {
		t.Error("a record that did not change was copied")
	}
	if !reflect.DeepEqual(recordOf(before, m.Source(), "shop", "cart"), cart) {
		t.Error("an older snapshot has changed")
	}
}

func uniqueMembers(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	ctx := t.Context()
	east := join(t, store, "uid-1", "east")
	if outcome, err := store.Join(ctx, east, registry.Credentials{}, false); err != nil || outcome != registry.Unchanged {
		t.Errorf("the same again: got %q, %v; want unchanged", outcome, err)
	}
	for _, c := range []struct {
		why    string
		change func(m *registry.Member)
		want   error
	}{
		{"the UID of another name", func(m *registry.Member) { m.ID = "uid-1"; m.Name = "copy" }, registry.ErrSameUID},
		{"the name of another UID", func(m *registry.Member) { m.Name = "east" }, registry.ErrSameName},
		{"the key of another UID", func(m *registry.Member) { m.IssuerKeys = east.IssuerKeys }, registry.ErrSameKey},
	} {
		m := Member(t, "uid-2", "west")
		c.change(m)
		if _, err := store.Join(ctx, m, Token("t"), false); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.why, err, c.want)
		}
	}
	if err := store.UpdateMember(ctx, "uid-1", func(m *registry.Member) error { m.Name = "orient"; return nil }); err != nil {
		t.Fatalf("rename: %v", err)
	}
	if _, err := store.Join(ctx, Member(t, "uid-2", "east"), Token("t2"), false); err != nil {
		t.Errorf("a name that was given up: %v", err)
	}
	session := begin(t, store, east.Source())
	apply(t, session, registry.Level{Records: Records(Record(east.Source(), "shop", "cart", 1))})
	rebuilt := Member(t, "uid-3", "orient")
	if outcome, err := store.Join(ctx, rebuilt, Token("t3"), true); err != nil || outcome != registry.Replaced {
		t.Fatalf("replace: got %q, %v; want replaced", outcome, err)
	}
	snapshot := Eventually(t, store, "the one that was replaced is gone", func(s *federation.Snapshot) bool {
		return len(s.Clusters) == 2 && s.Clusters["uid-3"] != nil && len(s.Records) == 0
	})
	if snapshot.Clusters["uid-3"].Joined.IsZero() {
		t.Error("the time of joining is missing")
	}
	if _, err := session.Apply(ctx, &registry.Level{Records: Records()}); !errors.Is(err, registry.ErrFenced) {
		t.Errorf("a write for the one that was replaced: got %v, want ErrFenced", err)
	}
	got, err := store.Credentials(ctx, "uid-3")
	if err != nil || got.Reader.Token != "t3" {
		t.Errorf("credentials: got %v, %v", got, err)
	}
	if _, err := store.Credentials(ctx, "uid-1"); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("credentials of the one that was replaced: got %v, want ErrNotFound", err)
	}
}

func leaving(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	east, west := join(t, store, "uid-1", "east"), join(t, store, "uid-10", "west")
	for _, m := range []*registry.Member{east, west} {
		apply(t, begin(t, store, m.Source()), registry.Level{
			Records:   Records(Record(m.Source(), "shop", "cart", 3)),
			Workloads: map[string]*federation.Workload{"u": {Source: m.Source(), UID: "u", Namespace: "shop", Name: "w"}},
			Gateways:  map[string]*federation.Gateway{"a/b": {Source: m.Source(), Network: "other", Name: "a/b"}},
		})
	}
	Eventually(t, store, "both report", func(s *federation.Snapshot) bool {
		return len(s.Workloads) == 2 && len(s.Gateways["other"]) == 2
	})
	if err := store.Leave(t.Context(), "uid-1"); err != nil {
		t.Fatal(err)
	}
	snapshot, _ := store.Snapshot()
	if len(snapshot.Clusters) != 1 || len(snapshot.Records) != 1 || len(snapshot.Workloads) != 1 || len(snapshot.Gateways["other"]) != 1 {
		t.Errorf("left behind: %+v", snapshot)
	}
	if recordOf(snapshot, west.Source(), "shop", "cart") == nil {
		t.Error("the other cluster's record is gone")
	}
	if err := store.Leave(t.Context(), "uid-1"); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("leave again: got %v, want ErrNotFound", err)
	}
	again := *east
	if _, err := store.Join(t.Context(), &again, Token("t"), false); err != nil {
		t.Errorf("join again: %v", err)
	}
}

func conditions(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	store := newReplica(t)
	m := join(t, store, "uid-1", "east")
	session := begin(t, store, m.Source())
	since := time.Date(2026, 11, 22, 10, 31, 0, 0, time.UTC)
	set := func(c ...federation.Condition) int {
		w, err := session.SetConditions(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		return w.Transactions
	}
	down := federation.Condition{Type: federation.Reachable, Reason: "Timeout", Message: "no answer", Since: since}
	if n := set(down, federation.Condition{Type: federation.Synced, Status: true, Since: since}); n != 1 {
		t.Errorf("a first observation took %d transactions", n)
	}
	down.Since, down.Message = since.Add(time.Minute), "no answer for 60s"
	if n := set(down); n != 0 {
		t.Errorf("the same state took %d transactions", n)
	}
	down.Reason = "Refused"
	set(down)
	snapshot := Eventually(t, store, "the reason is another", func(s *federation.Snapshot) bool {
		c := s.Clusters["uid-1"].Conditions
		return len(c) == 2 && c[0].Reason == "Refused"
	})
	if got := snapshot.Clusters["uid-1"].Conditions[0].Since; !got.Equal(since) {
		t.Errorf("since %v, want %v: the status did not change", got, since)
	}
}

func addresses(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	a, b := newReplica(t), newReplica(t)
	ctx := t.Context()
	cart := federation.VirtualAddress{Host: "cart.shop.svc.cluster.local", V4: netip.MustParseAddr("240.240.0.1"), V6: netip.MustParseAddr("2001:2::1")}
	web := federation.VirtualAddress{Host: "web.shop.svc.cluster.local", V4: netip.MustParseAddr("240.240.0.1"), V6: netip.MustParseAddr("2001:2::2")}
	if err := a.PutAddresses(ctx, []federation.VirtualAddress{cart}); err != nil {
		t.Fatal(err)
	}
	if err := b.PutAddresses(ctx, []federation.VirtualAddress{cart}); err != nil {
		t.Errorf("the same again: %v", err)
	}
	other := cart
	other.V4 = netip.MustParseAddr("240.240.0.9")
	for _, c := range []federation.VirtualAddress{web, other} {
		if err := b.PutAddresses(ctx, []federation.VirtualAddress{c}); !errors.Is(err, registry.ErrAddressTaken) {
			t.Errorf("%s with %s: got %v, want ErrAddressTaken", c.Host, c.V4, err)
		}
	}
	Eventually(t, b, "the address is known", func(s *federation.Snapshot) bool { return s.Addresses[cart.Host] == cart })
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := a.DropAddresses(ctx, []string{cart.Host}, now); !errors.Is(err, registry.ErrTooEarly) {
		t.Errorf("drop an address in use: got %v, want ErrTooEarly", err)
	}
	cart.Released = now
	if err := a.PutAddresses(ctx, []federation.VirtualAddress{cart}); err != nil {
		t.Fatal(err)
	}
	if err := a.DropAddresses(ctx, []string{cart.Host}, now.Add(23*time.Hour)); !errors.Is(err, registry.ErrTooEarly) {
		t.Errorf("drop after 23 h: got %v, want ErrTooEarly", err)
	}
	if err := a.DropAddresses(ctx, []string{cart.Host}, now.Add(24*time.Hour)); err != nil {
		t.Errorf("drop after 24 h: %v", err)
	}
	if err := b.PutAddresses(ctx, []federation.VirtualAddress{web}); err != nil {
		t.Errorf("an address that has rested: %v", err)
	}
	var many []federation.VirtualAddress
	for i := range 100 {
		many = append(many, federation.VirtualAddress{Host: fmt.Sprintf("s%d", i), V4: netip.AddrFrom4([4]byte{240, 241, 0, byte(i)})})
	}
	if err := a.PutAddresses(ctx, many); err != nil {
		t.Errorf("many addresses: %v", err)
	}
	Eventually(t, b, "all addresses are known", func(s *federation.Snapshot) bool { return len(s.Addresses) == 101 })
}

func vms(t *testing.T, newReplica func(t *testing.T) registry.Store) {
	a, b := newReplica(t), newReplica(t)
	ctx := t.Context()
	vm := &registry.VM{Network: "n1", Name: "web-1", Service: federation.ServiceName{Namespace: "legacy", Name: "web"}, ServiceAccount: "web",
		Ports: []registry.VMPort{{Number: 80, Target: 8080}}}
	if _, err := a.ReportVM(ctx, vm.Key(), registry.VMHealth{Healthy: true}); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("a report of nobody: got %v, want ErrNotFound", err)
	}
	for _, want := range []registry.Outcome{registry.Created, registry.Unchanged} {
		if outcome, err := a.PutVM(ctx, vm); err != nil || outcome != want {
			t.Errorf("register: got %q, %v; want %q", outcome, err, want)
		}
	}
	health := registry.VMHealth{Healthy: true, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.9")}}
	if w, err := a.ReportVM(ctx, vm.Key(), health); err != nil || w.Transactions != 1 {
		t.Errorf("the first report: got %+v, %v", w, err)
	}
	if w, err := a.ReportVM(ctx, vm.Key(), health); err != nil || w.Transactions != 0 {
		t.Errorf("the same report again: got %+v, %v; want nothing written", w, err)
	}
	state := func(want string, is func(vm *registry.VM) bool) {
		t.Helper()
		Eventually(t, b, want, func(*federation.Snapshot) bool {
			v := b.VMs()[vm.Key()]
			return v != nil && is(v)
		})
	}
	state("it is healthy and present", func(v *registry.VM) bool { return v.Present && v.Health != nil && v.Health.Same(&health) })
	if _, err := b.ReportVM(ctx, vm.Key(), health); err != nil {
		t.Fatal(err)
	}
	if err := a.LoseVM(ctx, vm.Key()); err != nil {
		t.Fatal(err)
	}
	if v := a.VMs()[vm.Key()]; v == nil || !v.Present {
		t.Error("a replica ended the presence of a VM that another one has by now")
	}
	if err := b.LoseVM(ctx, vm.Key()); err != nil {
		t.Fatal(err)
	}
	state("it is lost, and its last report is kept", func(v *registry.VM) bool { return !v.Present && v.Health != nil })
	if err := a.RemoveVM(ctx, vm.Key()); err != nil {
		t.Fatal(err)
	}
	Eventually(t, b, "it is gone", func(*federation.Snapshot) bool { return len(b.VMs()) == 0 })
}
