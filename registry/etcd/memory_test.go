// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"context"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// watcher is a replica that syncs sources, at the end of a link of its own.
type watcher struct {
	*link
	store  *etcd.Store
	source *registrytest.Source
	runner *registry.Runner
	stop   func()
}

// newWatchers are two of them, and a store beside them whose link cannot be cut.
func newWatchers(t *testing.T) (a, b *watcher, near *etcd.Store, member *registry.Member) {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	db := openDatabase(t, dir)
	near = newStore(t, etcd.StoreConfig{Client: db.Client(), Replica: "near"})
	member = registrytest.Member(t, "uid-1", "east")
	if _, err := near.Join(t.Context(), member, registrytest.Token("t"), false); err != nil {
		t.Fatal(err)
	}
	watch := func(name string) *watcher {
		w := &watcher{link: newLink(t, dir), source: &registrytest.Source{}}
		log := slog.New(slog.NewTextHandler(t.Output(), nil)).With("replica", name)
		w.store = newStore(t, etcd.StoreConfig{
			Client: w.database().Client(), Replica: name, SessionTTL: time.Second, Heartbeat: 50 * time.Millisecond, Patience: 300 * time.Millisecond, Log: log,
		})
		w.runner = registry.NewRunner(registry.RunnerConfig{
			Store: w.store, Log: log, Retry: 50 * time.Millisecond, Exposure: 100 * time.Millisecond, Absence: 300 * time.Millisecond, Linger: 2 * time.Second,
			Cluster: func(*registry.Member) registry.Source { return w.source },
		})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); w.runner.Run(ctx) }()
		w.stop = func() { cancel(); <-done }
		t.Cleanup(w.stop)
		return w
	}
	return watch("a"), watch("b"), near, member
}

// state of its one source.
func (w *watcher) state() registry.SourceState {
	if s := w.runner.Sources(); len(s) == 1 {
		return s[0]
	}
	return registry.SourceState{}
}

// endpointsOf the one service.
func endpointsOf(s *federation.Snapshot, name federation.ServiceName) int {
	if records := s.Records[name]; len(records) == 1 {
		return len(records[0].Endpoints)
	}
	return -1
}

// history notes every number of endpoints that a store shows from now on.
func history(t *testing.T, store *etcd.Store, name federation.ServiceName) func() []int {
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var seen []int
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			s, changed := store.Snapshot()
			mu.Lock()
			seen = append(seen, endpointsOf(s, name))
			mu.Unlock()
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() []int { cancel(); <-done; return slices.Compact(seen) }
}

func TestSourcesAreShownFromMemoryWhileEtcdIsAway(t *testing.T) {
	t.Parallel()
	a, b, near, member := newWatchers(t)
	cart := func(n int) *federation.Record { return registrytest.Record(member.Source(), "shop", "cart", n) }
	name := cart(1).Name
	report := func(n int) {
		for _, w := range []*watcher{a, b} {
			w.source.Set(registry.Level{Records: registrytest.Records(cart(n), registrytest.Record(member.Source(), "shop", "web", 2))})
		}
	}
	shows := func(store *etcd.Store, n int) {
		t.Helper()
		registrytest.Eventually(t, store, "it shows what the source says", func(s *federation.Snapshot) bool { return endpointsOf(s, name) == n })
	}
	report(3)
	for _, store := range []*etcd.Store{a.store, b.store, near} {
		shows(store, 3)
	}
	for round := range 3 {
		a.set(true)
		b.set(true)
		report(2 - round%2)
		for _, w := range []*watcher{a, b} {
			shows(w.store, 2-round%2)
			if s := w.state(); !s.Watching || s.Exposed.IsZero() {
				t.Errorf("round %d: %+v, want it exposed", round, s)
			}
		}
		report(1) // one more goes
		shows(a.store, 1)
		shows(b.store, 1)
		if s, _ := near.Snapshot(); endpointsOf(s, name) != 3 {
			t.Errorf("round %d: written although etcd is away", round)
		}
		seenByA, seenByB := history(t, a.store, name), history(t, b.store, name)
		first, second := a, b
		if round%2 == 1 {
			first, second = b, a
		}
		first.set(false)
		shows(near, 1)
		second.set(false)
		until(t, "one replica looks at the source, and shows what is stored", func() bool {
			x, y := a.state(), b.state()
			return x.Holding != y.Holding && x.Watching == x.Holding && y.Watching == y.Holding && x.Exposed.IsZero() && y.Exposed.IsZero()
		})
		if x, y := seenByA(), seenByB(); len(x) != 1 || len(y) != 1 {
			t.Errorf("round %d: on the way back they showed %v and %v endpoints, want 1 at all times", round, x, y)
		}
		report(3)
		for _, store := range []*etcd.Store{a.store, b.store, near} {
			shows(store, 3)
		}
	}
}

// The replica that lingered after one outage gets the session after the next one. Others
// have stored something since its caches were made, so it reads the source anew, and goes on
// showing what it showed meanwhile: what is stored is older.
func TestASecondOutageBringsNothingBack(t *testing.T) {
	t.Parallel()
	a, b, near, member := newWatchers(t)
	name := federation.ServiceName{Namespace: "shop", Name: "cart"}
	report := func(n int) {
		for _, w := range []*watcher{a, b} {
			w.source.Set(registry.Level{Records: registrytest.Records(registrytest.Record(member.Source(), "shop", "cart", n))})
		}
	}
	shows := func(store *etcd.Store, n int) {
		t.Helper()
		registrytest.Eventually(t, store, "it shows what the source says", func(s *federation.Snapshot) bool { return endpointsOf(s, name) == n })
	}
	until(t, "one of them syncs", func() bool { return a.state().Holding || b.state().Holding })
	if b.state().Holding {
		a, b = b, a
	}
	report(3)
	for _, store := range []*etcd.Store{a.store, b.store, near} {
		shows(store, 3)
	}
	a.set(true)
	b.set(true)
	report(2)
	shows(a.store, 2)
	shows(b.store, 2)
	until(t, "the session is lost", func() bool { return !a.state().Holding && !b.state().Holding })
	before := near.Settled(member.Source())
	a.set(false)
	shows(near, 2)
	b.set(false)
	until(t, "the second knows that the first has synced again", func() bool { return b.store.Settled(member.Source()) != before })
	if s := b.state(); !s.Watching || s.Holding {
		t.Fatalf("the second does not linger: %+v", s)
	}

	a.set(true)
	b.set(true)
	report(1)
	shows(a.store, 1)
	shows(b.store, 1)
	b.source.Reading(500 * time.Millisecond)
	seen := history(t, b.store, name)
	b.set(false)
	shows(near, 1)
	until(t, "the second shows what is stored", func() bool { return b.state().Holding && b.state().Exposed.IsZero() })
	if numbers := seen(); len(numbers) != 1 {
		t.Errorf("on the way back it showed %v endpoints, want 1 at all times", numbers)
	}
}

func TestCachesFromBeforeAnotherSessionAreNotWritten(t *testing.T) {
	t.Parallel()
	a, b, near, member := newWatchers(t)
	until(t, "one of them syncs", func() bool { return a.state().Holding || b.state().Holding })
	late, other := a, b
	if b.state().Holding {
		late, other = b, a
	}
	cart := func(n int) registry.Level {
		return registry.Level{Records: registrytest.Records(registrytest.Record(member.Source(), "shop", "cart", n))}
	}
	name := federation.ServiceName{Namespace: "shop", Name: "cart"}
	shows := func(n int) {
		t.Helper()
		registrytest.Eventually(t, near, "it is stored", func(s *federation.Snapshot) bool { return endpointsOf(s, name) == n })
	}
	late.source.Set(cart(1))
	shows(1)
	late.set(true) // to everybody else a replica that is cut off is a paused one
	other.source.Set(cart(2))
	shows(2)
	until(t, "the late one has lost its session", func() bool { return !late.state().Holding })
	other.stop()
	late.set(false)
	until(t, "the late one syncs", func() bool { return late.state().Holding })
	if runs, _ := late.source.Runs(); runs < 2 {
		t.Errorf("its source was started %d times: what it stores is what it knew before", runs)
	}
}
