// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// replica is a further meshd on the same state, with a folder of its own.
func replica(t testing.TB, state ca.State, sealer ca.Sealer, options ...func(*ca.Config)) (*ca.Authority, error) {
	t.Helper()
	td, err := ca.ParseTrustDomain(catest.TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	audit, err := ca.OpenAudit(filepath.Join(t.TempDir(), "audit.jsonl"), "other", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { audit.Close() })
	cfg := ca.Config{
		TrustDomain: td, State: state, Sealer: sealer, Audit: audit, Log: slog.New(slog.DiscardHandler),
		Grants: ca.GrantFunc(func(ca.Source, string, string) error { return nil }),
	}
	for _, option := range options {
		option(&cfg)
	}
	return ca.Open(t.Context(), cfg)
}

func sealer(t testing.TB) *ca.FileSealer {
	t.Helper()
	s, err := ca.NewFileSealer(filepath.Join(t.TempDir(), "sealing.key"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func with(s ca.Sealer) func(*ca.Config) { return func(c *ca.Config) { c.Sealer = s } }

func TestSealedValuesOpenUnderTheirNameOnly(t *testing.T) {
	t.Parallel()
	s := sealer(t)
	sealed, err := s.Seal("a", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := s.Open("a", sealed); err != nil || string(plain) != "secret" {
		t.Errorf("Open = %q, %v", plain, err)
	}
	if _, err := s.Open("b", sealed); !errors.Is(err, ca.ErrCorrupt) {
		t.Errorf("Open under another name = %v, want ErrCorrupt", err)
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 0x40
		if _, err := s.Open("a", changed); !errors.Is(err, ca.ErrCorrupt) && !errors.Is(err, ca.ErrSealed) {
			t.Fatalf("byte %d changed: Open = %v", i, err)
		}
		if _, err := s.Open("a", sealed[:i]); !errors.Is(err, ca.ErrCorrupt) {
			t.Fatalf("cut at %d: Open = %v", i, err)
		}
	}
	if bytes.Contains(sealed, []byte("secret")) {
		t.Error("not encrypted")
	}
	again, err := ca.NewFileSealer(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := again.Open("a", sealed); err != nil || string(plain) != "secret" {
		t.Errorf("after a restart: Open = %q, %v", plain, err)
	}
	if _, err := sealer(t).Open("a", sealed); !errors.Is(err, ca.ErrSealed) || !strings.Contains(err.Error(), "copy it") {
		t.Errorf("without a key: Open = %v, want ErrSealed and what to do", err)
	}
	other := sealer(t)
	if _, err := other.Seal("x", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open("a", sealed); !errors.Is(err, ca.ErrSealed) {
		t.Errorf("with another key: Open = %v, want ErrSealed", err)
	}
	if info, err := os.Stat(s.Path()); err != nil || info.Mode() != 0o600 {
		t.Errorf("key file %v, %v", info, err)
	}
	if err := os.Chmod(s.Path(), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.NewFileSealer(s.Path()); err == nil {
		t.Error("a key that others may read is accepted")
	}
}

// A restart finds the same authorities, and a replica without the sealing key says what to do.
func TestReplicasShareTheAuthority(t *testing.T) {
	t.Parallel()
	s := sealer(t)
	c := catest.New(t, with(s))
	leaf := c.Leaf(t, reviews)
	second, err := replica(t, c.State, s)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Verify(chain(t, leaf)); err != nil {
		t.Error(err)
	}
	issued, err := second.Issue(t.Context(), request(t, nil))
	if err != nil || !issued.Intermediate.Equal(chain(t, leaf)[1]) {
		t.Errorf("the replica signs with an intermediate of its own, %v", err)
	}
	if _, err := replica(t, c.State, sealer(t)); !errors.Is(err, ca.ErrSealed) {
		t.Errorf("without the sealing key: %v, want ErrSealed", err)
	}
	td, err := ca.ParseTrustDomain("other.test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := replica(t, c.State, s, func(cfg *ca.Config) { cfg.TrustDomain = td }); err == nil {
		t.Error("a replica of another trust domain is accepted")
	}
}

func TestTrustDomainThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	td, err := ca.ParseTrustDomain("10.0.0.1") // legal for SPIFFE, not for name constraints
	if err != nil {
		t.Fatal(err)
	}
	if _, err := replica(t, new(ca.Memory), sealer(t), func(c *ca.Config) { c.TrustDomain = td }); err == nil {
		t.Error("Open succeeded")
	}
}

// A34: bytes flipped, values swapped between keys, a root that somebody else made, an older value put back.
func TestAttackA34TamperedState(t *testing.T) {
	t.Parallel()
	s, ctx := sealer(t), t.Context()
	c := catest.New(t, with(s))
	c.Leaf(t, reviews)
	c.Leaf(t, catest.Subject("kube:other", "x", "shop"))
	entries, err := c.State.List(ctx, "")
	if err != nil || len(entries) != 3 {
		t.Fatalf("%d records, %v; want the root and two intermediates", len(entries), err)
	}
	foreign := catest.New(t)
	theirs, err := foreign.State.Fetch(ctx, "authorities/root")
	if err != nil {
		t.Fatal(err)
	}
	var root ca.Entry
	byKey := map[string][]byte{}
	for _, e := range entries {
		byKey[e.Key] = e.Value
		if e.Key == "authorities/root" {
			root = e
		}
		if bytes.Contains(e.Value, []byte("PRIVATE KEY")) {
			t.Errorf("%s holds a private key", e.Key)
		}
	}
	open := func(values map[string][]byte) error {
		state := new(ca.Memory)
		for key, value := range values {
			if _, err := state.Create(ctx, key, value); err != nil {
				t.Fatal(err)
			}
		}
		a, err := replica(t, state, s)
		if err != nil {
			return err
		}
		_, err = a.Issue(ctx, request(t, nil))
		return err
	}
	if err := open(byKey); err != nil {
		t.Fatalf("untouched: %v", err)
	}
	if err := open(map[string][]byte{root.Key: theirs.Value}); !errors.Is(err, ca.ErrSealed) {
		t.Errorf("somebody else's root: %v, want ErrSealed", err)
	}
	if err := open(map[string][]byte{root.Key: byKey["authorities/kube:other"]}); !errors.Is(err, ca.ErrCorrupt) {
		t.Errorf("an intermediate as root: %v, want ErrCorrupt", err)
	}
	if err := open(map[string][]byte{root.Key: root.Value, "authorities/" + string(east): byKey["authorities/kube:other"]}); err == nil {
		t.Error("another cluster's intermediate is used")
	}
	for i := 0; i < len(root.Value); i += 7 {
		changed := bytes.Clone(root.Value)
		changed[i] ^= 1
		if bytes.Equal(normal(changed), normal(root.Value)) {
			continue
		}
		if err := open(map[string][]byte{root.Key: changed}); err == nil {
			t.Errorf("byte %d of the root's record changed unnoticed", i)
		}
	}
}

// normal is the JSON value, for changes that mean nothing to JSON.
func normal(b []byte) []byte {
	var v any
	if json.Unmarshal(b, &v) != nil {
		return b
	}
	out, _ := json.Marshal(v)
	return out
}

func TestRollbackOfOneRecordIsNotServed(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	ctx := t.Context()
	old, err := c.State.Fetch(ctx, "authorities/root")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.RaiseSequence(ctx); err != nil {
		t.Fatal(err)
	}
	raised := c.Bundle().Sequence
	now, err := c.State.Fetch(ctx, "authorities/root")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.State.Replace(ctx, old.Key, old.Value, now.Version); err != nil {
		t.Fatal(err)
	}
	if err := c.Revoke(ctx, east, "", "any change makes it read the state"); err != nil {
		t.Fatal(err)
	}
	if got := c.Bundle().Sequence; got != raised {
		t.Errorf("sequence %d, want %d", got, raised)
	}
}

// A newer release's fields stay when this one rewrites, and its schema is left alone.
func TestNewerReleases(t *testing.T) {
	t.Parallel()
	s, ctx := sealer(t), t.Context()
	c := catest.New(t, with(s))
	e, err := c.State.Fetch(ctx, "authorities/root")
	if err != nil {
		t.Fatal(err)
	}
	extended := ca.ReencodeRecord(t, e, s, func(body map[string]any) {
		body["emergency"] = map[string]any{"step": 7}
		body["issuers"].([]any)[0].(map[string]any)["note"] = "kept"
	})
	state := new(ca.Memory)
	if _, err := state.Create(ctx, e.Key, extended); err != nil {
		t.Fatal(err)
	}
	a, err := replica(t, state, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.RaiseSequence(ctx); err != nil {
		t.Fatal(err)
	}
	after, err := state.Fetch(ctx, e.Key)
	if err != nil {
		t.Fatal(err)
	}
	if text := string(after.Value); !strings.Contains(text, `"emergency":{"step":7}`) || !strings.Contains(text, `"note":"kept"`) {
		t.Errorf("fields are lost: %s", text)
	}
	if a.Bundle().Sequence <= c.Bundle().Sequence {
		t.Errorf("sequence %d, want more than %d", a.Bundle().Sequence, c.Bundle().Sequence)
	}
	newer := bytes.Replace(e.Value, []byte(`"v":1`), []byte(`"v":2`), 1)
	state = new(ca.Memory)
	if _, err := state.Create(ctx, e.Key, newer); err != nil {
		t.Fatal(err)
	}
	if _, err := replica(t, state, s); !errors.Is(err, ca.ErrNewerSchema) {
		t.Errorf("Open of a newer schema = %v, want ErrNewerSchema", err)
	}
}

// flakyState is away when it is told to be.
type flakyState struct {
	ca.State
	away atomic.Bool
}

var errAway = errors.New("etcd is away")

func (f *flakyState) List(ctx context.Context, prefix string) ([]ca.Entry, error) {
	if f.away.Load() {
		return nil, errAway
	}
	return f.State.List(ctx, prefix)
}

func (f *flakyState) Replace(ctx context.Context, key string, value []byte, version ca.Version) (ca.Version, error) {
	if f.away.Load() {
		return 0, errAway
	}
	return f.State.Replace(ctx, key, value, version)
}

// Leaves are signed while etcd is away, for an hour; authorities are not made.
func TestOfflineBudget(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	state := &flakyState{State: new(ca.Memory)}
	c := catest.New(t, func(cfg *ca.Config) { cfg.State, cfg.Clock = state, clock.Now })
	ctx := t.Context()
	if _, err := c.Issue(ctx, request(t, nil)); err != nil {
		t.Fatal(err)
	}
	state.away.Store(true)
	clock.Advance(59 * time.Minute)
	if _, err := c.Issue(ctx, request(t, nil)); err != nil {
		t.Errorf("after 59 minutes: %v", err)
	}
	fresh := ca.Request{Subject: catest.Subject("kube:new", "p", "shop"), CSR: catest.CSR(t, catest.Key(t), nil)}
	if _, err := c.Issue(ctx, fresh); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("an intermediate while away: %v, want ErrUnavailable", err)
	}
	clock.Advance(2 * time.Minute)
	if _, err := c.Issue(ctx, request(t, nil)); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("after 61 minutes: %v, want ErrUnavailable", err)
	}
	state.away.Store(false)
	if _, err := c.Issue(ctx, request(t, nil)); err != nil {
		t.Errorf("back again: %v", err)
	}
}

func TestIntermediateIsReplacedInTime(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	c := catest.New(t, func(cfg *ca.Config) { cfg.Clock = clock.Now })
	ctx := t.Context()
	first, err := c.Issue(ctx, request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	clock.Advance(200 * 24 * time.Hour)
	if same, err := c.Issue(ctx, request(t, nil)); err != nil || !same.Intermediate.Equal(first.Intermediate) {
		t.Errorf("replaced too early, %v", err)
	}
	clock.Advance(80 * 24 * time.Hour)
	next, err := c.Issue(ctx, request(t, nil))
	if err != nil || next.Intermediate.Equal(first.Intermediate) {
		t.Fatalf("not replaced after 280 of 365 days, %v", err)
	}
	phases := map[ca.Phase]int{}
	for _, i := range c.Issuers() {
		if i.Scope == string(east) {
			phases[i.Phase]++
		}
	}
	if phases[ca.PhaseActive] != 1 || phases[ca.PhaseRetiring] != 1 {
		t.Errorf("phases %v, want one active and one retiring", phases)
	}
	if e, err := c.State.Fetch(ctx, "authorities/"+string(east)); err != nil || !strings.Contains(string(e.Value), `"key":""`) {
		t.Errorf("the retired key is still there, %v", err)
	}
}

func TestIntermediateNeverOutlivesTheRoot(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	c := catest.New(t, func(cfg *ca.Config) { cfg.Clock, cfg.RootLifetime = clock.Now, 36*time.Hour })
	clock.Advance(30 * time.Hour)
	var before ca.Issued
	for range 3 {
		issued, err := c.Issue(t.Context(), request(t, nil))
		if err != nil {
			t.Fatal(err)
		}
		root := issued.Roots[0].NotAfter
		if issued.Leaf.NotAfter.After(root) || issued.Intermediate.NotAfter.After(root) {
			t.Errorf("leaf until %v, intermediate until %v, root until %v", issued.Leaf.NotAfter, issued.Intermediate.NotAfter, root)
		}
		if before.Leaf != nil && !before.Intermediate.Equal(issued.Intermediate) {
			t.Error("replaced by one that lives no longer")
		}
		before = issued
		clock.Advance(2 * time.Minute)
	}
}

func TestRevocation(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	s := sealer(t)
	c := catest.New(t, with(s), func(cfg *ca.Config) { cfg.Clock = clock.Now })
	ctx := t.Context()
	identity := func() ca.Identity {
		t.Helper()
		id, err := c.Verify(chain(t, c.Leaf(t, reviews)))
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	old := identity()
	changed := c.Changed()
	for range 2 { // repeating is harmless
		if err := c.Revoke(ctx, east, "pod-1", "offboard"); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-changed:
	default:
		t.Error("nobody was told")
	}
	if err := c.RevokedIdentity(old); !errors.Is(err, ca.ErrRevoked) || !strings.Contains(err.Error(), "offboard") {
		t.Errorf("RevokedIdentity = %v", err)
	}
	if err := c.Revoked(east, "pod-2"); err != nil {
		t.Errorf("another pod: %v", err)
	}
	if _, err := c.Issue(ctx, request(t, nil)); !errors.Is(err, ca.ErrRevoked) {
		t.Errorf("Issue = %v, want ErrRevoked", err)
	}
	clock.Advance(10 * time.Second)
	if err := c.Reinstate(ctx, east, "pod-1", "back"); err != nil {
		t.Fatal(err)
	}
	clock.Advance(2 * time.Second)
	if err := c.Revoked(east, "pod-1"); err != nil {
		t.Errorf("reinstated: %v", err)
	}
	if err := c.RevokedIdentity(old); !errors.Is(err, ca.ErrRevoked) {
		t.Errorf("the old certificate came back with its subject: %v", err)
	}
	if err := c.RevokedIdentity(identity()); err != nil {
		t.Errorf("the new certificate: %v", err)
	}
	if err := c.Revoke(ctx, east, "", "leave"); err != nil {
		t.Fatal(err)
	}
	other, err := replica(t, c.State, s)
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range map[string]*ca.Authority{"here": c.Authority, "elsewhere": other} {
		if err := a.Revoked(east, "pod-2"); !errors.Is(err, ca.ErrRevoked) {
			t.Errorf("%s: a revoked cluster's pod: %v", name, err)
		}
		if err := a.Revoked("kube:west", "pod-2"); err != nil {
			t.Errorf("%s: another cluster: %v", name, err)
		}
	}
	if err := c.Revoke(ctx, ca.SourceMeshd, "", "oops"); err == nil {
		t.Error("meshd as a whole can be revoked")
	}
	if got := len(c.Revocations()); got != 2 {
		t.Errorf("%d revocations, want 2", got)
	}
	// When in doubt, out.
	e, err := c.State.Fetch(ctx, "revoked/"+string(east)+"/pod-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.State.Replace(ctx, e.Key, []byte("{"), e.Version); err != nil {
		t.Fatal(err)
	}
	if err := c.Reinstate(ctx, east, "", "back"); err != nil {
		t.Fatal(err)
	}
	clock.Advance(2 * time.Second)
	if err := c.Revoked(east, "pod-1"); !errors.Is(err, ca.ErrRevoked) {
		t.Errorf("a damaged revocation is void: %v", err)
	}
}

// Run hears of what another replica did.
func TestRunFollowsTheState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := sealer(t)
		c := catest.New(t, with(s))
		other, err := replica(t, c.State, s)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- other.Run(ctx) }()
		synctest.Wait()
		changed := other.Changed()
		if err := c.Revoke(ctx, east, "", "leave"); err != nil {
			t.Fatal(err)
		}
		<-changed
		if err := other.Revoked(east, "x"); !errors.Is(err, ca.ErrRevoked) {
			t.Errorf("Revoked = %v, want ErrRevoked", err)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run = %v", err)
		}
	})
}

// A38: a fleet that got its certificates at the same moment does not renew them at the same moment.
func TestAttackA38RenewalsAreSpread(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	var first, last time.Time
	var life time.Duration
	seen := map[time.Time]int{}
	const leaves = 200
	csr := catest.CSR(t, catest.Key(t), nil)
	for range leaves {
		issued, err := c.Issue(t.Context(), ca.Request{Subject: reviews, CSR: csr})
		if err != nil {
			t.Fatal(err)
		}
		at := ca.RenewAt(issued.Leaf)
		if again := ca.RenewAt(issued.Leaf); !again.Equal(at) {
			t.Fatalf("drawn anew: %v, then %v", at, again)
		}
		life = issued.Leaf.NotAfter.Sub(issued.Leaf.NotBefore)
		seen[at.Truncate(life/1000)]++
		if first.IsZero() || at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	if spread := last.Sub(first); spread < life*8/100 || spread > life*11/100 {
		t.Errorf("spread over %v of %v; want about a tenth", spread, life)
	}
	for at, n := range seen {
		if n > leaves/10 {
			t.Errorf("%d of %d renew within a thousandth of their life at %v", n, leaves, at)
		}
	}
}
