// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// rotate begins a rotation and runs it as far as it goes with these consumers. It must be in a synctest bubble.
func rotate(t *testing.T, c *catest.CA, holders ...ca.Holder) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r := &ca.Rotator{Authority: c.Authority, Replica: "test", Log: slog.New(slog.DiscardHandler), Standing: func(context.Context) ca.Standing {
		return ca.Standing{Sequence: c.Bundle().Sequence, Holders: holders}
	}}
	done := make(chan struct{})
	go func() { r.Run(ctx); close(done) }()
	time.Sleep(time.Minute)
	cancel()
	<-done
}

func issue(t *testing.T, c *catest.CA) ca.Issued {
	t.Helper()
	issued, err := c.Issue(t.Context(), request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

func pool(certs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, cert := range certs {
		p.AddCert(cert)
	}
	return p
}

// While one root replaces another, a certificate below the new one is believed by who has the old root, the new
// one, or both; and at the end by who has the new one.
func TestBridge(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := catest.New(t)
		old := issue(t, c)
		if err := c.Rotate(t.Context(), ca.ScopeRoot, "ops"); err != nil {
			t.Fatal(err)
		}
		rotate(t, c, ca.Holder{Name: "east/shop/web", Holds: true})
		fresh := issue(t, c)
		roots := c.Bundle().Roots
		if len(roots) != 2 || len(fresh.Chain()) != 3 || !fresh.Roots[1].Equal(roots[1]) || fresh.Intermediate.Equal(old.Intermediate) {
			t.Fatalf("%d roots, a chain of %d", len(roots), len(fresh.Chain()))
		}
		if n := len(fresh.Above[0].Raw); n > 600 {
			t.Errorf("the bridge has %d bytes", n)
		}
		if pem := fresh.PEM(); len(pem) != 4 || strings.Count(pem[3], "BEGIN CERTIFICATE") != 2 {
			t.Errorf("an answer of %d elements", len(pem))
		}
		for name, p := range map[string]*x509.CertPool{"old": pool(roots[0]), "new": pool(roots[1]), "both": pool(roots...)} {
			if _, err := ca.VerifyChain(c.TrustDomain(), p, time.Now(), fresh.Chain()); err != nil {
				t.Errorf("who has the %s root: %v", name, err)
			}
		}
		if _, err := c.Verify(old.Chain()); err != nil {
			t.Errorf("what was issued before: %v", err)
		}
		time.Sleep(time.Until(c.Rotations(ca.Standing{})[0].Drains))
		rotate(t, c, ca.Holder{Name: "east/shop/web", Holds: true})
		if n := len(c.Bundle().Roots); n != 1 || len(c.Rotations(ca.Standing{})) != 0 {
			t.Fatalf("%d roots after the drain, %+v", n, c.Rotations(ca.Standing{}))
		}
		if _, err := c.Verify(old.Chain()); !errors.Is(err, ca.ErrUntrusted) {
			t.Errorf("what the old root vouched for: %v", err)
		}
		if again := issue(t, c); len(again.Chain()) != 2 || !again.Intermediate.Equal(fresh.Intermediate) {
			t.Errorf("a chain of %d", len(again.Chain()))
		}
	})
}

// A root waits for its stragglers by name, and a person decides about those he was shown; a pause is a pause.
func TestStragglersAreWaitedFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, ctx := catest.New(t), t.Context()
		late := ca.Holder{Name: "west/shop/pay", Why: "not connected"}
		standing := func() ca.Standing {
			return ca.Standing{Sequence: c.Bundle().Sequence, Holders: []ca.Holder{late}}
		}
		if err := c.Rotate(ctx, ca.ScopeRoot, "ops"); err != nil {
			t.Fatal(err)
		}
		rotate(t, c, late)
		if one := c.Rotations(standing())[0]; one.ToPhase != ca.PhasePublished || len(one.Wait.Stragglers) != 1 || one.Wait.Stragglers[0].Name != late.Name {
			t.Fatalf("it does not wait: %+v", one)
		}
		if err := c.Proceed(ctx, ca.ScopeRoot, "ops", []string{"west/shop/other"}, standing()); !errors.Is(err, ca.ErrOthersWait) {
			t.Errorf("Proceed without the one that waits = %v, want ErrOthersWait", err)
		}
		if err := c.PauseRotation(ctx, ca.ScopeRoot, "ops"); err != nil {
			t.Fatal(err)
		}
		rotate(t, c)
		if one := c.Rotations(standing())[0]; one.ToPhase != ca.PhasePublished || !one.Paused {
			t.Fatalf("it went on while paused: %+v", one)
		}
		if err := c.ResumeRotation(ctx, ca.ScopeRoot, "ops"); err != nil {
			t.Fatal(err)
		}
		if err := c.Proceed(ctx, ca.ScopeRoot, "ops", []string{late.Name}, standing()); err != nil {
			t.Fatal(err)
		}
		rotate(t, c, late)
		if one := c.Rotations(standing())[0]; one.ToPhase != ca.PhaseActive || len(one.Left) != 1 || len(one.Decisions) != 4 {
			t.Fatalf("it does not proceed: %+v", one)
		}
	})
}

func TestRotationThatCannotBegin(t *testing.T) {
	t.Parallel()
	c, ctx := catest.New(t), t.Context()
	if err := c.Rotate(ctx, string(east), "ops"); !errors.Is(err, ca.ErrNotRotatable) {
		t.Errorf("a cluster without an authority: %v", err)
	}
	for _, err := range []error{
		c.PauseRotation(ctx, ca.ScopeRoot, "ops"), c.RollBack(ctx, ca.ScopeRoot, "ops", ca.Standing{}), c.Proceed(ctx, "kube:x", "ops", nil, ca.Standing{}),
	} {
		if !errors.Is(err, ca.ErrNoRotation) {
			t.Errorf("without a rotation: %v, want ErrNoRotation", err)
		}
	}
	issue(t, c)
	if err := c.Rotate(ctx, string(east), "ops"); err != nil {
		t.Fatal(err)
	}
	if err := c.Rotate(ctx, string(east), "ops"); !errors.Is(err, ca.ErrRotating) {
		t.Errorf("twice: %v", err)
	}
	if err := c.Rotate(ctx, ca.ScopeRoot, "ops"); !errors.Is(err, ca.ErrRotating) {
		t.Errorf("the root below which a cluster is about to get a new authority: %v", err)
	}
	if err := c.RollBack(ctx, string(east), "ops", ca.Standing{}); err != nil {
		t.Fatal(err)
	}
	if err := c.Rotate(ctx, ca.ScopeRoot, "ops"); err != nil {
		t.Fatal(err)
	}
	if err := c.Rotate(ctx, string(east), "ops"); !errors.Is(err, ca.ErrRotating) {
		t.Errorf("a cluster while the root rotates: %v", err)
	}
}

// How long an authority is drained depends on what it may have signed, not on what is configured at the end.
func TestLongestLifetimeIsRemembered(t *testing.T) {
	t.Parallel()
	s := sealer(t)
	c := catest.New(t, with(s), func(cfg *ca.Config) { cfg.Lifetime = time.Hour })
	issue(t, c)
	rest := ca.DefaultOfflineBudget + ca.DefaultClockSkew
	if d := c.DrainTime(string(east)); d != time.Hour+rest {
		t.Errorf("drains for %v", d)
	}
	longer, err := replica(t, c.State, s, func(cfg *ca.Config) { cfg.Lifetime = 48 * time.Hour })
	if err != nil {
		t.Fatal(err)
	}
	issued, err := longer.Issue(t.Context(), request(t, nil))
	if err != nil || time.Until(issued.Leaf.NotAfter) < 47*time.Hour {
		t.Fatalf("issued until %v, %v", issued.Leaf.NotAfter, err)
	}
	shorter, err := replica(t, c.State, s, func(cfg *ca.Config) { cfg.Lifetime = time.Hour })
	if err != nil {
		t.Fatal(err)
	}
	for _, scope := range []string{string(east), ca.ScopeRoot} {
		if d := shorter.DrainTime(scope); d != 48*time.Hour+rest {
			t.Errorf("%s drains for %v", scope, d)
		}
	}
}

// A replica that cannot write the new number signs no longer than the old one.
func TestLongerLifetimeWaitsForTheState(t *testing.T) {
	t.Parallel()
	s := sealer(t)
	c := catest.New(t, with(s), func(cfg *ca.Config) { cfg.Lifetime = time.Hour })
	issue(t, c)
	away := &flakyState{State: c.State}
	longer, err := replica(t, away, s, func(cfg *ca.Config) { cfg.Lifetime = 48 * time.Hour })
	if err != nil {
		t.Fatal(err)
	}
	away.away.Store(true)
	issued, err := longer.Issue(t.Context(), request(t, nil))
	if err != nil || time.Until(issued.Leaf.NotAfter) > time.Hour {
		t.Errorf("issued until %v, %v", issued.Leaf.NotAfter, err)
	}
}
