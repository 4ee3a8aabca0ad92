// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
)

// announce keeps a replica announced until the test, or what it returns, ends it.
func announce(t *testing.T, store *etcd.Store, r etcd.Replica) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- store.Announce(ctx, r) }()
	ended := false
	end = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("announcing %s: %v", r.Name, err)
		}
	}
	t.Cleanup(end)
	return end
}

func names(replicas []etcd.Replica) string {
	var out []string
	for _, r := range replicas {
		out = append(out, r.Name+"="+r.AdminAddress)
	}
	return strings.Join(out, " ")
}

func knows(t *testing.T, store *etcd.Store, want string) {
	t.Helper()
	until(t, "the other replicas are "+want, func() bool { return names(store.Replicas()) == want })
}

func TestReplicasKnowEachOther(t *testing.T) {
	t.Parallel()
	db := openDatabase(t, t.TempDir())
	store := func(name string) *etcd.Store {
		return newStore(t, etcd.StoreConfig{Client: db.Client(), Replica: name})
	}
	a, b, c := store("a"), store("b"), store("c")
	began := time.Date(2026, 11, 22, 5, 0, 0, 1234567, time.UTC)
	announce(t, a, etcd.Replica{Name: "a", AdminAddress: "a:8443", Version: "v1", Started: began})
	end := announce(t, b, etcd.Replica{Name: "b", AdminAddress: "b:8443"})
	knows(t, a, "b=b:8443")
	knows(t, b, "a=a:8443")
	knows(t, c, "a=a:8443 b=b:8443")
	if r := c.Replicas()[0]; r.Version != "v1" || !r.Started.Equal(began.Truncate(time.Millisecond)) {
		t.Errorf("a is known as %+v", r)
	}

	end() // it says farewell: nobody waits for its lease
	knows(t, a, "")
	knows(t, c, "a=a:8443")

	if _, err := db.Client().Delete(t.Context(), "/isthmus/replicas/a"); err != nil {
		t.Fatal(err)
	}
	put(t, db.Client(), "replicas/z", `{"v":1,"name":"z"}`)
	until(t, "what has no address is quarantined", func() bool {
		return slices.ContainsFunc(c.Health().Quarantined, func(q registry.Quarantined) bool { return q.Key == "replicas/z" })
	})
	knows(t, c, "a=a:8443") // it has come back
}

func TestReplicaThatIsKilledIsForgotten(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	db := openDatabase(t, dir)
	way := newLink(t, dir)
	config := etcd.StoreConfig{Client: db.Client(), Replica: "near", Patience: 300 * time.Millisecond}
	near := newStore(t, config)
	config.Client, config.Replica, config.ReplicaTTL = way.database().Client(), "far", 2*time.Second
	far := newStore(t, config)
	announce(t, far, etcd.Replica{Name: "far", AdminAddress: "far:8443"})
	knows(t, near, "far=far:8443")

	way.set(true) // etcd hears of it no more
	knows(t, near, "")
	way.set(false)
	knows(t, near, "far=far:8443")
}

func TestReplicasOfOneName(t *testing.T) {
	t.Parallel()
	db := openDatabase(t, t.TempDir())
	store := func(name string) *etcd.Store {
		return newStore(t, etcd.StoreConfig{Client: db.Client(), Replica: name})
	}
	watcher := store("watcher")
	// What an earlier process at this address left behind hangs on a lease that goes on.
	put(t, db.Client(), "replicas/a", `{"v":1,"name":"a","adminAddress":"one:8443","version":"v0"}`)
	endFirst := announce(t, store("a"), etcd.Replica{Name: "a", AdminAddress: "one:8443", Version: "v1"})
	until(t, "the new process is known", func() bool {
		r := watcher.Replicas()
		return len(r) == 1 && r[0].Version == "v1"
	})

	// Another one of that name, elsewhere, does not take its place while it lives.
	other := store("a")
	endOther := announce(t, other, etcd.Replica{Name: "a", AdminAddress: "two:8443"})
	announce(t, store("b"), etcd.Replica{Name: "b", AdminAddress: "b:8443"})
	knows(t, watcher, "a=one:8443 b=b:8443")
	endFirst()
	knows(t, watcher, "a=two:8443 b=b:8443")
	endOther()
	knows(t, watcher, "b=b:8443")
}
