// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// linked is a replica whose link to etcd can be cut, and one beside it whose cannot.
type linked struct {
	*link
	far, near *etcd.Store
	client    *clientv3.Client // of the near one
	member    *registry.Member
}

func newLinked(t *testing.T) *linked {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	db := openDatabase(t, dir)
	l := &linked{link: newLink(t, dir), client: db.Client()}
	config := func(client *clientv3.Client, name string) etcd.StoreConfig {
		return etcd.StoreConfig{Client: client, Replica: name, SessionTTL: time.Second, Heartbeat: 50 * time.Millisecond, Patience: 300 * time.Millisecond}
	}
	l.near = newStore(t, config(db.Client(), "near"))
	l.far = newStore(t, config(l.database().Client(), "far"))
	l.member = registrytest.Member(t, "uid-1", "east")
	if _, err := l.near.Join(t.Context(), l.member, registrytest.Token("t"), false); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, l.far, "the far replica knows the member", func(s *federation.Snapshot) bool { return len(s.Clusters) == 1 })
	return l
}

// until polls what has no channel to wait on.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(registrytest.Patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not true: %s", registrytest.Patience, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func begin(t *testing.T, store *etcd.Store, source federation.SourceID) registry.Session {
	t.Helper()
	deadline := time.Now().Add(registrytest.Patience)
	for {
		session, err := store.Begin(t.Context(), source)
		if err == nil {
			t.Cleanup(func() { session.Close(context.Background()) })
			return session
		}
		if !errors.Is(err, registry.ErrHeld) || time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestEtcdIsAwayAndComesBack(t *testing.T) {
	t.Parallel()
	l := newLinked(t)
	session := begin(t, l.far, l.member.Source())
	cart := registrytest.Record(l.member.Source(), "shop", "cart", 3)
	if _, err := session.Apply(t.Context(), &registry.Level{Records: registrytest.Records(cart)}); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, l.far, "the record is seen", func(s *federation.Snapshot) bool { return len(s.Records) == 1 })

	l.set(true)
	began := time.Now()
	until(t, "the store is degraded", func() bool { return l.far.Health().Degraded })
	if h := l.far.Health(); h.Since.Before(began.Add(-time.Second)) || h.Since.After(time.Now()) || h.Reason == "" {
		t.Errorf("health: %+v", h)
	}
	if s, _ := l.far.Snapshot(); len(s.Records) != 1 {
		t.Error("what was known is not served any more")
	}
	joined := make(chan error, 1)
	go func() { // a write that waits
		_, err := l.far.Join(t.Context(), registrytest.Member(t, "uid-2", "west"), registrytest.Token("t"), false)
		joined <- err
	}()
	select {
	case err := <-joined:
		t.Errorf("a write did not wait: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	l.set(false)
	if err := <-joined; err != nil {
		t.Errorf("the write that waited: %v", err)
	}
	until(t, "the store is not degraded", func() bool { return !l.far.Health().Degraded })
	registrytest.Eventually(t, l.near, "both members are there", func(s *federation.Snapshot) bool { return len(s.Clusters) == 2 })
}

func TestHistoryIsCompactedWhileTheWatchIsAway(t *testing.T) {
	t.Parallel()
	l := newLinked(t)
	session := begin(t, l.near, l.member.Source())
	apply := func(names ...string) {
		t.Helper()
		var records []*federation.Record
		for _, name := range names {
			records = append(records, registrytest.Record(l.member.Source(), "shop", name, 2))
		}
		if _, err := session.Apply(t.Context(), &registry.Level{Records: registrytest.Records(records...)}); err != nil {
			t.Fatal(err)
		}
	}
	apply("goes", "stays")
	before := registrytest.Eventually(t, l.far, "both are seen", func(s *federation.Snapshot) bool { return len(s.Records) == 2 })
	l.set(true)
	apply("stays", "comes")
	response, err := l.client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.client.Compact(t.Context(), response.Header.Revision); err != nil {
		t.Fatal(err)
	}
	l.set(false)
	stays, goes := federation.ServiceName{Namespace: "shop", Name: "stays"}, federation.ServiceName{Namespace: "shop", Name: "goes"}
	after := registrytest.Eventually(t, l.far, "one came and one went", func(s *federation.Snapshot) bool {
		return s.Records[federation.ServiceName{Namespace: "shop", Name: "comes"}] != nil && s.Records[goes] == nil
	})
	if before.Records[stays][0] != after.Records[stays][0] {
		t.Error("a record that did not change was copied")
	}
}

func TestPausedReplicaWritesNothingWhenItResumes(t *testing.T) {
	t.Parallel()
	l := newLinked(t)
	source := l.member.Source()
	late := begin(t, l.far, source)
	l.set(true) // to everybody else a replica that is cut off is a paused one
	session := begin(t, l.near, source)
	cart := registrytest.Record(source, "shop", "cart", 3)
	if _, err := session.Apply(t.Context(), &registry.Level{Records: registrytest.Records(cart)}); err != nil {
		t.Fatal(err)
	}
	l.set(false)
	stale := registrytest.Record(source, "shop", "cart", 1)
	if _, err := late.Apply(t.Context(), &registry.Level{Records: registrytest.Records(stale)}); !errors.Is(err, registry.ErrFenced) {
		t.Errorf("a late write: got %v, want ErrFenced", err)
	}
	select {
	case <-late.Lost():
	case <-time.After(registrytest.Patience):
		t.Error("the late session does not know that it is over")
	}
	s := registrytest.Eventually(t, l.far, "the record is seen", func(s *federation.Snapshot) bool { return len(s.Records) == 1 })
	if got := len(s.Records[cart.Name][0].Endpoints); got != 3 {
		t.Errorf("%d endpoints, want 3", got)
	}
}

func TestOwnSessionIsTakenBackAtOnce(t *testing.T) {
	t.Parallel()
	l := newLinked(t)
	store := newStore(t, etcd.StoreConfig{Client: l.database().Client(), Replica: "far", SessionTTL: time.Hour, Patience: 300 * time.Millisecond})
	first := begin(t, store, l.member.Source())
	if _, err := store.Begin(t.Context(), l.member.Source()); !errors.Is(err, registry.ErrHeld) {
		t.Errorf("a second session beside one that lives: got %v, want ErrHeld", err)
	}
	l.set(true)
	first.Close(t.Context()) // etcd does not hear of it
	l.set(false)
	second, err := store.Begin(t.Context(), l.member.Source())
	for deadline := time.Now().Add(registrytest.Patience); err != nil; second, err = store.Begin(t.Context(), l.member.Source()) {
		if errors.Is(err, registry.ErrHeld) || time.Now().After(deadline) {
			t.Fatalf("its own abandoned session is in the way: %v", err)
		}
	}
	defer second.Close(context.Background())
	if _, err := l.near.Begin(t.Context(), l.member.Source()); !errors.Is(err, registry.ErrHeld) {
		t.Errorf("a session of another replica: got %v, want ErrHeld", err)
	}
	if _, err := first.Apply(t.Context(), &registry.Level{Records: registrytest.Records()}); !errors.Is(err, registry.ErrFenced) {
		t.Errorf("a write of the abandoned session: got %v, want ErrFenced", err)
	}
}

func TestCredentialsAreReadFromMemory(t *testing.T) {
	t.Parallel()
	l := newLinked(t)
	l.set(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if c, err := l.far.Credentials(ctx, l.member.ID); err != nil || c.Reader.Token != "t" {
		t.Errorf("while etcd is away: %v, %v", c, err)
	}
}

func TestSleeperIsNotCurrentUntilItHasCaughtUp(t *testing.T) {
	t.Parallel()
	l := newLinked(t)
	var slept atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(slept.Load())) }
	store := newStore(t, etcd.StoreConfig{Client: l.database().Client(), Replica: "sleeper", Heartbeat: 50 * time.Millisecond, Patience: time.Second, Now: now})
	if err := store.Current(t.Context()); err != nil {
		t.Fatal(err)
	}
	for round := range 5 {
		id := federation.ClusterID(fmt.Sprint("uid-late-", round))
		if _, err := l.near.Join(t.Context(), registrytest.Member(t, id, "late-"+fmt.Sprint(round)), registrytest.Token("t"), false); err != nil {
			t.Fatal(err)
		}
		slept.Add(int64(time.Minute))
		if err := store.Current(t.Context()); err != nil {
			t.Fatal(err)
		}
		if store.Members()[id] == nil {
			t.Errorf("round %d: it is current, and does not know what happened while it slept", round)
		}
	}
	l.set(true)
	slept.Add(int64(time.Minute))
	began := time.Now()
	if err := store.Current(t.Context()); err != nil || time.Since(began) > registrytest.Patience {
		t.Errorf("with etcd away: %v after %v", err, time.Since(began))
	}
}

// writerEnv makes the test binary a program that writes until it is killed.
const writerEnv = "ISTHMUS_TEST_WRITE_TO"

func TestKilledWhileWriting(t *testing.T) {
	t.Parallel()
	if dir := os.Getenv(writerEnv); dir != "" {
		writeForever(t, dir)
		return
	}
	dir := t.TempDir()
	for round := range 2 {
		child := exec.Command(os.Args[0], "-test.run=^TestKilledWhileWriting$", "-test.v")
		child.Env = append(os.Environ(), writerEnv+"="+dir)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		child.Stderr = os.Stderr
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		acknowledged, lines := -1, bufio.NewScanner(out)
		for acknowledged < 60 && lines.Scan() {
			if n, ok := strings.CutPrefix(lines.Text(), "written "); ok {
				if acknowledged, err = strconv.Atoi(n); err != nil {
					t.Fatal(err)
				}
			}
		}
		child.Process.Kill()
		for lines.Scan() { // what it still said is acknowledged too
			if n, ok := strings.CutPrefix(lines.Text(), "written "); ok {
				acknowledged, _ = strconv.Atoi(n)
			}
		}
		child.Wait()
		if acknowledged < 60 {
			t.Fatalf("round %d: the writer ended by itself after %d", round, acknowledged)
		}
		checkKilled(t, dir, round, acknowledged)
	}
}

// checkKilled opens what a killed process left: whatever it acknowledged is there.
func checkKilled(t *testing.T, dir string, round, acknowledged int) {
	t.Helper()
	db, err := etcd.Open(t.Context(), etcd.DatabaseConfig{DataDir: dir})
	if err != nil {
		t.Fatalf("round %d: open again: %v", round, err)
	}
	defer db.Close()
	began := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	store := etcd.New(etcd.StoreConfig{Client: db.Client(), Sealer: fakeSealer{}, Sole: true})
	done := make(chan struct{})
	go func() { defer close(done); store.Run(ctx) }()
	defer func() { cancel(); <-done }()
	<-store.Ready()
	s, _ := store.Snapshot()
	records := s.Records[federation.ServiceName{Namespace: "shop", Name: "cart"}]
	if len(records) != 1 {
		t.Fatalf("round %d: the record is lost", round)
	}
	// Versions are written one after the other: that of the port is the last one stored.
	if got := int(records[0].Ports[0].Number); got < acknowledged {
		t.Errorf("round %d: version %d is stored, %d was acknowledged", round, got, acknowledged)
	}
	if n := len(records[0].Endpoints); n != 200 {
		t.Errorf("round %d: %d endpoints, want 200", round, n)
	}
	session, err := store.Begin(t.Context(), records[0].Source)
	if err != nil {
		t.Fatalf("round %d: the session of the killed process is in the way: %v", round, err)
	}
	session.Close(t.Context())
	t.Logf("round %d: killed after %d, loaded in %v", round, acknowledged, time.Since(began).Round(time.Millisecond))
}

// writeForever applies one version after the other and says so.
func writeForever(t *testing.T, dir string) {
	db, err := etcd.Open(t.Context(), etcd.DatabaseConfig{DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	store := newStore(t, etcd.StoreConfig{Client: db.Client(), Sole: true})
	m := registrytest.Member(t, "uid-1", "east")
	if known := store.Members()["uid-1"]; known != nil {
		m = known
	} else if _, err := store.Join(t.Context(), m, registrytest.Token("t"), false); err != nil {
		t.Fatal(err)
	}
	session := begin(t, store, m.Source())
	for i := 1; ; i++ {
		record := registrytest.Record(m.Source(), "shop", "cart", 200)
		record.Ports = []federation.Port{{Number: uint32(i)}}
		for e := range record.Endpoints {
			record.Endpoints[e].Locality.Subzone = strconv.Itoa(i)
		}
		if _, err := session.Apply(t.Context(), &registry.Level{Records: registrytest.Records(record)}); err != nil {
			t.Fatal(err)
		}
		fmt.Println("written", i)
	}
}
