// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The world in which the state machine is tried: time in minutes, replicas that fall behind, consumers that go
// away and come back, persons who change their mind. Nothing in it waits.
const (
	worldBudget  = 60 * time.Minute
	worldLongest = 90 * time.Minute
	worldSkew    = 5 * time.Minute
)

var worldLimits = limits{longest: worldLongest, budget: worldBudget, skew: worldSkew}

// rotationWorld is a rapid state machine: each method is something that happens.
type rotationWorld struct {
	now       time.Time
	stored    record // what is in the state
	version   int
	term      int // of the leader
	made      int // roots so far
	replicas  []*modelReplica
	consumers []*modelConsumer
	left      map[string]bool // consumers that a person has left behind, ever
	history   []string
}

type modelReplica struct {
	view    record
	seen    time.Time // when it was read
	off     time.Duration
	version int
	term    int // the last one in which it led
	paused  bool
	// What it had found out when it was paused as a leader.
	stale *Standing
}

type modelConsumer struct {
	name     string
	away     bool
	sequence uint64
	trusts   []string // roots
	leaf     modelLeaf
}

type modelLeaf struct {
	root, bridge string // who signed it, and who else vouches for that
	end          time.Time
}

func newRotationWorld(t *rapid.T) *rotationWorld {
	w := &rotationWorld{now: time.Unix(1_700_000_000, 0), left: map[string]bool{}}
	w.stored = record{Scope: ScopeRoot, Epoch: 1, Sequence: 7, Issuers: []issuerRecord{{ID: "r0", Phase: PhaseActive, Epoch: 1, Since: w.now, Key: []byte("k")}}}
	off := time.Duration(rapid.IntRange(-60, 0).Draw(t, "minutes that one clock is behind")) * time.Minute
	for i := range 3 {
		r := &modelReplica{}
		if i == 2 {
			r.off = off
		}
		w.replicas = append(w.replicas, r)
		w.read(r)
	}
	for i := range 4 {
		c := &modelConsumer{name: fmt.Sprint("c", i)}
		w.consumers = append(w.consumers, c)
		w.serve(c, w.replicas[0])
		w.sign(c, w.replicas[0])
	}
	return w
}

func (w *rotationWorld) read(r *modelReplica) { r.view, r.seen, r.version = w.stored, w.now, w.version }

func trustedRoots(r record) []string {
	var out []string
	for _, i := range r.Issuers {
		if i.Phase.trusted() {
			out = append(out, i.ID)
		}
	}
	return out
}

// serve gives a consumer the bundle of a replica; it takes none that is older than its own.
func (w *rotationWorld) serve(c *modelConsumer, r *modelReplica) {
	if r.view.Sequence >= c.sequence {
		c.sequence, c.trusts = r.view.Sequence, trustedRoots(r.view)
	}
}

// sign issues a leaf by what the replica believes, if its budget allows.
func (w *rotationWorld) sign(c *modelConsumer, r *modelReplica) {
	if w.now.Sub(r.seen) > worldBudget {
		return
	}
	active := r.view.Issuers[r.view.active()]
	leaf := modelLeaf{root: active.ID, end: w.now.Add(r.off + worldLongest)}
	if from, to, ok := r.view.ends(); ok && to.ID == active.ID && len(to.Bridge) > 0 {
		leaf.bridge = from.ID
	}
	c.leaf = leaf
	w.serve(c, r)
}

// standing is what all replicas together know.
func (w *rotationWorld) standing() Standing {
	s := Standing{Sequence: w.stored.Sequence, Earliest: w.now.Add(24 * time.Hour)}
	for _, r := range w.replicas {
		at := w.now.Add(r.off)
		if at.Before(s.Earliest) {
			s.Earliest = at
		}
		if at.After(s.Latest) {
			s.Latest = at
		}
	}
	for _, c := range w.consumers {
		s.Holders = append(s.Holders, Holder{Name: c.name, Holds: !c.away && c.sequence == w.stored.Sequence})
	}
	return s
}

// commit is the transaction: the version that was read, and the term of the leader if it is one's step.
func (w *rotationWorld) commit(t *rapid.T, version, term int, next record) {
	if version != w.version || term != 0 && term != w.term {
		return
	}
	before := w.stored
	w.stored, w.version = next, w.version+1
	w.checkStep(t, before, next)
}

// checkStep holds a transaction against the invariants that are about one.
func (w *rotationWorld) checkStep(t *rapid.T, before, after record) {
	if err := after.checkRotation(); err != nil { // I6, and what a crash must find
		t.Fatalf("%v\n%+v", err, after)
	}
	changed := !slices.Equal(trustedRoots(before), trustedRoots(after))
	if changed && after.Sequence <= before.Sequence || after.Sequence < before.Sequence {
		t.Fatalf("I4: the bundle changed and its sequence went from %d to %d", before.Sequence, after.Sequence)
	}
	if after.Epoch != before.Epoch+1 {
		t.Fatalf("I7: epoch %d after %d", after.Epoch, before.Epoch)
	}
	if a, b := after.active(), before.active(); after.Issuers[a].ID != before.Issuers[b].ID && after.Issuers[a].Phase == PhaseActive {
		for _, c := range w.consumers {
			if !slices.Contains(c.trusts, after.Issuers[a].ID) && !w.left[c.name] {
				t.Fatalf("I1: %s became active, and %s does not hold it", after.Issuers[a].ID, c.name)
			}
		}
	}
}

// Check holds the world against the invariants.
func (w *rotationWorld) Check(t *rapid.T) {
	active := 0
	for _, i := range w.stored.Issuers {
		if i.Phase == PhaseActive {
			active++
		}
	}
	if active != 1 {
		t.Fatalf("I3: %d active", active)
	}
	if len(trustedRoots(w.stored)) == 0 {
		t.Fatal("I5: the bundle is empty")
	}
	for _, by := range w.consumers {
		if !by.leaf.end.After(w.now) {
			continue
		}
		for _, c := range w.consumers {
			if w.left[c.name] || w.left[by.name] {
				continue
			}
			if !slices.Contains(c.trusts, by.leaf.root) && !slices.Contains(c.trusts, by.leaf.bridge) {
				t.Fatalf("I2: the certificate of %s, signed by %s (bridge %q), is not believed by %s, which trusts %q\n%v",
					by.name, by.leaf.root, by.leaf.bridge, c.name, c.trusts, w.history)
			}
		}
	}
}

func (w *rotationWorld) consumer(t *rapid.T) *modelConsumer {
	return rapid.SampledFrom(w.consumers).Draw(t, "consumer")
}

func (w *rotationWorld) replica(t *rapid.T) *modelReplica {
	return rapid.SampledFrom(w.replicas).Draw(t, "replica")
}

// actions are what can happen, with how often.
func (w *rotationWorld) actions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"all is well for a while": func(t *rapid.T) {
			for _, c := range w.consumers {
				c.away = false
			}
			w.acknowledgeAll()
			for range rapid.IntRange(1, 3).Draw(t, "steps") {
				w.step(t, w.replicas[0])
			}
		},
		"time passes": func(t *rapid.T) {
			w.now = w.now.Add(time.Duration(rapid.IntRange(1, 45).Draw(t, "minutes")) * time.Minute)
		},
		"a replica reads":         func(t *rapid.T) { w.read(w.replica(t)) },
		"all replicas read":       func(*rapid.T) { w.readAll() },
		"a consumer acknowledges": func(t *rapid.T) { w.hear(w.consumer(t), w.replica(t)) },
		"all acknowledge":         func(*rapid.T) { w.acknowledgeAll() },
		"a consumer goes away":    func(t *rapid.T) { w.consumer(t).away = true },
		"a consumer is back":      func(t *rapid.T) { c := w.consumer(t); c.away = false; w.hear(c, w.replica(t)) },
		"a consumer renews": func(t *rapid.T) {
			if c := w.consumer(t); !c.away {
				w.sign(c, w.replica(t))
			}
		},
		"a leader takes a step":      func(t *rapid.T) { w.step(t, w.replica(t)) },
		"a leader is paused":         func(t *rapid.T) { w.pauseLeader(w.replica(t)) },
		"a paused leader goes on":    func(t *rapid.T) { w.wakeLeader(t, w.replica(t)) },
		"a person starts a rotation": w.personRotates,
		"a person changes it":        w.personChanges,
	}
}

func (w *rotationWorld) readAll() {
	for _, r := range w.replicas {
		w.read(r)
	}
}

func (w *rotationWorld) hear(c *modelConsumer, r *modelReplica) {
	if !c.away {
		w.serve(c, r)
	}
}

func (w *rotationWorld) acknowledgeAll() {
	w.readAll()
	for _, c := range w.consumers {
		w.hear(c, w.replicas[0])
	}
}

// step is a replica that is elected, reads, finds out how all are, and writes.
func (w *rotationWorld) step(t *rapid.T, r *modelReplica) {
	w.term++
	r.term = w.term
	w.read(r)
	m, _ := r.view.due(w.standing(), worldLimits)
	if m.id == "" {
		return
	}
	w.history = append(w.history, fmt.Sprint(m))
	w.commit(t, r.version, r.term, r.view.after(m, w.standing().Latest))
}

func (w *rotationWorld) pauseLeader(r *modelReplica) {
	w.term++
	r.term, r.paused = w.term, true
	w.read(r)
	s := w.standing()
	r.stale = &s
}

// wakeLeader finishes what a paused leader had begun, by what it knew then.
func (w *rotationWorld) wakeLeader(t *rapid.T, r *modelReplica) {
	if !r.paused {
		return
	}
	r.paused = false
	m, _ := r.view.due(*r.stale, worldLimits)
	// Its lease has ended since, if anybody else has led or enough time has passed.
	if w.now.Sub(r.seen) > 0 {
		w.term++
	}
	if m.id != "" {
		w.commit(t, r.version, r.term, r.view.after(m, r.stale.Latest))
	}
}

func (w *rotationWorld) personRotates(t *rapid.T) {
	w.made++
	fresh := issuerRecord{ID: fmt.Sprint("r", w.made), Key: []byte("k"), Bridge: []byte("b")}
	next, err := w.stored.begin(fresh, "ops", w.now)
	if (err == nil) != (w.stored.Rotation == nil) {
		t.Fatalf("begin: %v", err)
	}
	if err == nil {
		// Whoever was left behind and never came back has no claim on a further rotation either.
		maps.DeleteFunc(w.left, func(name string, _ bool) bool {
			for _, c := range w.consumers {
				if c.name == name {
					return slices.Equal(c.trusts, trustedRoots(w.stored)) && slices.Contains(c.trusts, c.leaf.root)
				}
			}
			return false
		})
		w.commit(t, w.version, 0, next)
	}
}

func (w *rotationWorld) personChanges(t *rapid.T) {
	var next record
	var err error
	switch rapid.SampledFrom([]string{"pause", "resume", "rollback", "proceed"}).Draw(t, "what") {
	case "pause":
		next, err = w.stored.paused(true, "ops", w.now)
	case "resume":
		next, err = w.stored.paused(false, "ops", w.now)
	case "rollback":
		next, err = w.stored.rolledBack("ops", w.standing().Latest)
	case "proceed":
		_, wait := w.stored.due(w.standing(), worldLimits)
		var names []string
		for _, h := range wait.Stragglers {
			names = append(names, h.Name)
		}
		if next, err = w.stored.proceeding("ops", names, w.standing(), worldLimits, w.now); err == nil {
			for _, n := range names {
				w.left[n] = true
			}
		}
	}
	if err == nil {
		w.commit(t, w.version, 0, next)
	} else if !errors.Is(err, ErrNoRotation) {
		t.Fatal(err)
	}
}

// The invariants of rotation hold whatever happens in whatever order, with one replica's clock behind by up to
// an hour (I9); I8 is what the story with real Envoys shows.
func TestRotationKeepsItsInvariants(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newRotationWorld(t)
		actions := w.actions()
		names := slices.Sorted(maps.Keys(actions))
		for range 150 {
			name := rapid.SampledFrom(names).Draw(t, "what happens")
			w.history = append(w.history, name)
			actions[name](t)
			w.Check(t)
		}
	})
}

// The guards are what keeps the invariants: without each, the world finds a way to break one.
func TestRotationGuardsAreNeeded(t *testing.T) {
	t.Parallel()
	world := func() record {
		r := record{Scope: ScopeRoot, Epoch: 1, Sequence: 7, Issuers: []issuerRecord{{ID: "r0", Phase: PhaseActive, Key: []byte("k")}}}
		r, err := r.begin(issuerRecord{ID: "r1", Key: []byte("k"), Bridge: []byte("b")}, "ops", time.Unix(0, 0))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	at := time.Unix(1_000_000, 0)
	all := func(r record, names ...string) Standing {
		s := Standing{Sequence: r.Sequence, Earliest: at, Latest: at}
		for _, n := range names {
			s.Holders = append(s.Holders, Holder{Name: n, Holds: n != "late"})
		}
		return s
	}
	advance := func(r record, s Standing) record {
		m, _ := r.due(s, worldLimits)
		if m.id == "" {
			t.Fatalf("it waits: %+v", r.Rotation)
		}
		return r.after(m, s.Latest)
	}
	r := world()
	r = advance(r, Standing{})
	if m, wait := r.due(all(r, "a", "late", "b"), worldLimits); m.id != "" || len(wait.Stragglers) != 1 || wait.Stragglers[0].Name != "late" {
		t.Fatalf("it does not wait for the straggler: %v %v", m, wait)
	}
	if m, wait := r.due(Standing{Sequence: r.Sequence - 1, Earliest: at}, worldLimits); m.id != "" || wait.Unknown == "" {
		t.Fatalf("acknowledgements of an older bundle count: %v", m)
	}
	if m, wait := r.due(Standing{Sequence: r.Sequence, Missing: []string{"meshd-1"}}, worldLimits); m.id != "" || wait.Unknown == "" {
		t.Fatalf("a replica that does not answer is passed over: %v", m)
	}
	if _, err := r.proceeding("ops", []string{"other"}, all(r, "late"), worldLimits, at); !errors.Is(err, ErrOthersWait) {
		t.Fatalf("a straggler that nobody named is left behind: %v", err)
	}
	r, err := r.proceeding("ops", []string{"late"}, all(r, "late"), worldLimits, at)
	if err != nil {
		t.Fatal(err)
	}
	if m, wait := r.due(Standing{Sequence: r.Sequence, Holders: []Holder{{Name: "late"}, {Name: "later"}}}, worldLimits); m.id != "" || wait.Stragglers[0].Name != "later" {
		t.Fatalf("who came later is left behind too: %v", m)
	}
	for range 2 {
		r = advance(r, all(r, "late"))
	}
	if m, wait := r.due(Standing{Earliest: at.Add(worldBudget + worldLongest + worldSkew - 1)}, worldLimits); m.id != "" || wait.Until.IsZero() {
		t.Fatalf("drained too early: %v", m)
	}
	if _, err := r.begin(issuerRecord{ID: "r2"}, "ops", at); !errors.Is(err, ErrRotating) {
		t.Fatalf("two rotations at once: %v", err)
	}
	late := Standing{Sequence: r.Sequence, Earliest: at.Add(worldBudget + worldLongest + worldSkew), Latest: at.Add(24 * time.Hour)}
	r = advance(advance(r, late), late)
	if r.Rotation != nil || r.Issuers[0].Phase != PhaseRemoved || len(r.Issuers[0].Key) > 0 || len(r.Issuers[1].Bridge) > 0 {
		t.Fatalf("at the end: %+v", r)
	}
	if _, err := r.rolledBack("ops", at); !errors.Is(err, ErrNoRotation) {
		t.Fatalf("rolled back past the point of no return: %v", err)
	}
}

// What is rolled back leaves the way it came: at once before anything was signed, by a rotation after.
func TestRollback(t *testing.T) {
	t.Parallel()
	at := time.Unix(1_000_000, 0)
	start := record{Scope: ScopeRoot, Epoch: 1, Sequence: 7, Issuers: []issuerRecord{{ID: "r0", Phase: PhaseActive, Key: []byte("k")}}}
	for steps, want := range []string{
		"r0 active, r1 removed at 7", "r0 active, r1 removed at 9", "r0 active, r1 removed at 9", "r0 active, r1 removed at 9", "r0 active, r1 removed at 9",
	} {
		r, err := start.begin(issuerRecord{ID: "r1", Key: []byte("k"), Bridge: []byte("b")}, "ops", at)
		if err != nil {
			t.Fatal(err)
		}
		s := func() Standing {
			return Standing{Sequence: r.Sequence, Earliest: at.Add(240 * time.Hour), Latest: at}
		}
		for range steps {
			m, _ := r.due(s(), worldLimits)
			r = r.after(m, at)
		}
		if r, err = r.rolledBack("ops", at); err != nil {
			t.Fatal(err)
		}
		for r.Rotation != nil {
			m, wait := r.due(s(), worldLimits)
			if m.id == "" {
				t.Fatalf("after %d steps, rolled back: it waits: %+v", steps, wait)
			}
			r = r.after(m, at)
		}
		got := fmt.Sprintf("r0 %s, r1 %s at %d", r.Issuers[0].Phase, r.Issuers[1].Phase, r.Sequence)
		if got != want || len(r.Issuers[0].Key) == 0 {
			t.Errorf("rolled back after %d steps: %s, want %s", steps, got, want)
		}
	}
}
