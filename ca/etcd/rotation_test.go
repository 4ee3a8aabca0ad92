// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// A35: a leader that was paused until its lease had ended does not change an authority any more, although nobody
// else has changed it meanwhile.
func TestAttackA35PausedLeader(t *testing.T) {
	t.Parallel()
	s, ctx := state(t), t.Context()
	version, err := s.Create(ctx, "authorities/x", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.Lead(ctx, "rotation", "meshd-0")
	if err != nil {
		t.Fatal(err)
	}
	if version, err = s.ReplaceAs(ctx, first, "authorities/x", []byte("2"), version); err != nil {
		t.Fatalf("the leader cannot write: %v", err)
	}
	follower := make(chan ca.Term)
	go func() {
		second, err := s.Lead(ctx, "rotation", "meshd-1")
		if err != nil {
			t.Error(err)
		}
		follower <- second
	}()
	first.Resign() // as etcd does when the lease runs out
	second := <-follower
	if _, err := s.ReplaceAs(ctx, first, "authorities/x", []byte("3"), version); !errors.Is(err, ca.ErrFenced) {
		t.Errorf("a leader of the past writes: %v", err)
	}
	if _, err := s.ReplaceAs(ctx, second, "authorities/x", []byte("3"), version); err != nil {
		t.Errorf("the present leader cannot: %v", err)
	}
	if _, err := s.ReplaceAs(ctx, second, "authorities/x", []byte("4"), version); !errors.Is(err, ca.ErrChanged) {
		t.Errorf("the present leader overwrites what it has not read: %v", err)
	}
	select {
	case <-first.Done:
	case <-time.After(10 * time.Second):
		t.Error("the first leader is not told")
	}
	second.Resign()
}

// crashState is the state of a replica that dies at its nth write of an authority: just before, or just after.
type crashState struct {
	ca.State
	left  int
	after bool
	die   context.CancelFunc
}

var errDied = errors.New("the replica died")

func (c *crashState) crash(write func() (ca.Version, error)) (ca.Version, error) {
	c.left--
	if c.left != 0 {
		return write()
	}
	if c.after {
		if _, err := write(); err != nil {
			return 0, err
		}
	}
	c.die()
	return 0, errDied
}

func (c *crashState) Replace(ctx context.Context, key string, value []byte, version ca.Version) (ca.Version, error) {
	return c.crash(func() (ca.Version, error) { return c.State.Replace(ctx, key, value, version) })
}

func (c *crashState) ReplaceAs(ctx context.Context, term ca.Term, key string, value []byte, version ca.Version) (ca.Version, error) {
	return c.crash(func() (ca.Version, error) { return c.State.ReplaceAs(ctx, term, key, value, version) })
}

// turning is a mesh whose root or cluster is rotated.
type turning struct {
	state  ca.State
	sealer ca.Sealer
	clock  *catest.Clock
}

func newTurning(t *testing.T) *turning {
	t.Helper()
	sealer, err := ca.NewFileSealer(filepath.Join(t.TempDir(), "sealing.key"))
	if err != nil {
		t.Fatal(err)
	}
	return &turning{state: state(t), sealer: sealer, clock: catest.NewClock()}
}

func (m *turning) open(t *testing.T, s ca.State) *catest.CA {
	t.Helper()
	return catest.New(t, func(c *ca.Config) { c.State, c.Sealer, c.Clock, c.Lifetime = s, m.sealer, m.clock.Now, time.Hour })
}

// rotator is that of a replica whose consumers all have what it sends.
func rotator(c *catest.CA) *ca.Rotator {
	return &ca.Rotator{
		Authority: c.Authority, Replica: "test", Every: time.Millisecond, Log: slog.New(slog.DiscardHandler),
		Standing: func(context.Context) ca.Standing { return ca.Standing{Sequence: c.Bundle().Sequence} },
	}
}

// phases are those of a scope's issuers, the oldest first.
func phases(c *catest.CA, scope string) string {
	var all []ca.Issuer
	for _, i := range c.Issuers() {
		if i.Scope == scope {
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b ca.Issuer) int { return a.NotBefore.Compare(b.NotBefore) })
	var out []string
	for _, i := range all {
		out = append(out, string(i.Phase))
	}
	return strings.Join(out, " ")
}

// journey are the states that a rotation goes through, in order.
var journey = []string{
	"active", "active generated", "active published", "active distributed", "retiring active", "drained active", "removed active",
}

// turn lets replicas work on the rotation until it has ended. One dies at its nth write, and another goes on. Every
// state that is seen is one of the journey, and none comes after a later one.
func (m *turning) turn(t *testing.T, scope string, nth int, after bool) (died bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	last := 0
	see := func(c *catest.CA) {
		at := slices.Index(journey, phases(c, scope))
		if at < last {
			t.Fatalf("died at write %d (after it: %v): %q after %q", nth, after, phases(c, scope), journey[last])
		}
		last = at
	}
	mortal := m.open(t, &crashState{State: m.state, left: nth, after: after, die: cancel})
	m.clock.Advance(time.Second) // so that issuers can be told apart
	err := mortal.Rotate(ctx, scope, "ops")
	if err == nil {
		err = m.drive(ctx, mortal, see)
	}
	died = ctx.Err() != nil
	if !died && err != nil {
		t.Fatalf("write %d: %v", nth, err)
	}
	heir := m.open(t, m.state)
	see(heir)
	if last == 0 && len(heir.Rotations(ca.Standing{})) == 0 {
		if err := heir.Rotate(t.Context(), scope, "ops"); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.drive(t.Context(), heir, see); err != nil {
		t.Fatal(err)
	}
	if last != len(journey)-1 {
		t.Fatalf("write %d: it ended at %q", nth, journey[last])
	}
	return died
}

// drive runs the rotator, and the clock, until there is no rotation.
func (m *turning) drive(ctx context.Context, c *catest.CA, see func(*catest.CA)) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- rotator(c).Run(ctx) }()
	defer func() { stop(); <-ended }()
	for {
		changed := c.Changed()
		see(c)
		rotations := c.Rotations(ca.Standing{Sequence: c.Bundle().Sequence})
		if len(rotations) == 0 {
			return nil
		}
		if at := rotations[0].Drains; !at.IsZero() && m.clock.Now().Before(at) {
			m.clock.Advance(at.Sub(m.clock.Now()))
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Wherever a replica dies in a rotation, the next one takes it up at the same step or the one after it, and what
// was issued before is believed until the end, and what is issued after, too.
func TestRotationSurvivesAReplicaThatDies(t *testing.T) {
	t.Parallel()
	for _, scope := range []string{ca.ScopeRoot, "kube:c1"} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s after %v", strings.ReplaceAll(scope, ":", "-"), after), func(t *testing.T) {
				t.Parallel()
				for nth := 1; nth <= len(journey); nth++ {
					t.Run(fmt.Sprint(nth), func(t *testing.T) {
						t.Parallel()
						m := newTurning(t)
						c := m.open(t, m.state)
						old := c.Leaf(t, catest.Subject("kube:c1", "pod-1", "shop"))
						died := m.turn(t, scope, nth, after)
						if died != (nth < len(journey)) {
							t.Fatalf("a rotation has %d writes, and the one before %d is none of them", len(journey)-1, nth)
						}
						fresh := m.open(t, m.state)
						issued, err := fresh.Issue(t.Context(), ca.Request{Subject: catest.Subject("kube:c1", "pod-1", "shop"), CSR: catest.CSR(t, catest.Key(t), nil)})
						if err != nil {
							t.Fatal(err)
						}
						if _, err := fresh.Verify(issued.Chain()); err != nil {
							t.Error(err)
						}
						if string(issued.Intermediate.Raw) == string(old.Certificate[1]) {
							t.Error("the old authority signs")
						}
						if n := len(issued.Chain()); n != 2 {
							t.Errorf("a chain of %d after the rotation", n)
						}
					})
				}
			})
		}
	}
}

// Two replicas work on one rotation and issue all the time: nobody refuses anybody's certificate.
func TestReplicasRotateTogether(t *testing.T) {
	t.Parallel()
	m := newTurning(t)
	replicas := []*catest.CA{m.open(t, m.state), m.open(t, m.state)}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 4)
	for _, c := range replicas {
		go func() { ended <- c.Run(ctx) }()
		go func() { ended <- rotator(c).Run(ctx) }()
	}
	if err := replicas[0].Rotate(ctx, ca.ScopeRoot, "ops"); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Minute)
	var last []ca.Issued
	for n := 0; len(replicas[0].Rotations(ca.Standing{}))+len(replicas[1].Rotations(ca.Standing{})) > 0 || n < 2; n++ {
		if time.Now().After(deadline) {
			t.Fatalf("it does not end: %+v", replicas[0].Rotations(ca.Standing{}))
		}
		c, other := replicas[n%2], replicas[(n+1)%2]
		issued, err := c.Issue(ctx, ca.Request{
			Subject: catest.Subject("kube:c1", fmt.Sprint("pod-", n), "shop"), CSR: catest.CSR(t, catest.Key(t), nil),
		})
		if err != nil {
			t.Fatal(err)
		}
		last = append(last, issued)
		for _, one := range last[max(0, len(last)-5):] {
			if _, err := other.Verify(one.Chain()); err != nil && m.clock.Now().Before(one.Leaf.NotAfter) {
				t.Fatalf("certificate %d is not believed: %v", n, err)
			}
		}
		for _, r := range c.Rotations(ca.Standing{}) {
			if !r.Drains.IsZero() && n%10 == 0 {
				m.clock.Advance(5 * time.Minute)
			}
		}
	}
	if got := phases(replicas[0], ca.ScopeRoot); got != "removed active" {
		t.Errorf("at the end: %s", got)
	}
	cancel()
	for range 4 {
		<-ended
	}
}
