// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"
)

// leadName is who may take the automatic steps of rotations.
const leadName = "rotation"

// rotatorEvery is how often a rotation that waits is looked at.
const rotatorEvery = 2 * time.Second

// Rotation is one that goes on, as people see it.
type Rotation struct {
	Scope              string // ScopeRoot or a source
	From, To           string // IDs of issuers
	FromPhase, ToPhase Phase
	Started            time.Time
	Paused             bool
	Back               bool // it was rolled back after To had signed: From is what was to be new
	Left               []string
	Decisions          []Decision
	Wait               Wait
	// Drains is when nothing is alive that From signed; zero while it may still sign.
	Drains time.Time
	// Longest is the lifetime of what From signed, at most.
	Longest time.Duration
}

// Rotate starts the rotation of the root or of one source's intermediate: a new issuer is made, and the Rotator
// of whichever replica leads takes it through its phases. Errors wrap ErrRotating or ErrNotRotatable where that
// is the reason.
func (a *Authority) Rotate(ctx context.Context, scope, by string) error {
	return a.rewrite(ctx, scope, nil, func(r record, now time.Time) (record, string, error) {
		if err := a.rotatable(scope); err != nil {
			return r, "", err
		}
		var fresh issuerRecord
		var err error
		if scope == ScopeRoot {
			fresh, err = a.nextRoot(ctx, now)
		} else {
			fresh, err = a.newIntermediate(ctx, Source(scope), now)
		}
		if err == nil {
			r, err = r.begin(fresh, by, now)
		}
		return r, "rotation to " + fresh.ID + " begun by " + by, err
	})
}

// rotatable says what keeps a rotation from starting.
func (a *Authority) rotatable(scope string) error {
	v := a.view.Load()
	root := v.scopes[ScopeRoot]
	if own := v.scopes[scope]; own.record.Rotation != nil {
		return fmt.Errorf("%w: of %s, since %s", ErrRotating, scope, own.record.Rotation.Started.Format(time.RFC3339))
	}
	if scope != ScopeRoot {
		switch {
		case v.scopes[scope].issuer == nil:
			return fmt.Errorf("%w: %s has none yet; one is made with its first certificate", ErrNotRotatable, scope)
		case root.record.Rotation != nil:
			return fmt.Errorf("%w: of the root, which gives every cluster and network a new authority by itself", ErrRotating)
		}
		return nil
	}
	if root.record.Domain != "" {
		return fmt.Errorf("%w: it was brought along, and the key of its root is not here", ErrNotRotatable)
	}
	for name, s := range v.scopes {
		if from, _, ok := s.record.ends(); ok && from.Phase == PhaseActive {
			return fmt.Errorf("%w: of %s; let it come to its new authority first, or roll it back", ErrRotating, name)
		}
	}
	return nil
}

// nextRoot makes a root, and the certificate of its key by the present one.
func (a *Authority) nextRoot(ctx context.Context, now time.Time) (issuerRecord, error) {
	present := a.view.Load().scopes[ScopeRoot].issuer
	signer, stored, err := a.cfg.Keys.Generate(ctx, recordKey(ScopeRoot))
	if err != nil {
		return issuerRecord{}, err
	}
	td := a.cfg.TrustDomain
	template := rootTemplate(td, newSerial(), now.Add(-a.cfg.Backdate), now.Add(a.cfg.RootLifetime))
	cert, err := signAuthority(template, nil, signer.Public(), signer)
	if err == nil {
		err = lintAuthority(td, cert, cert, "")
	}
	if err != nil {
		return issuerRecord{}, fmt.Errorf("root of %s: %w", td, err)
	}
	from, to := latest(cert.NotBefore, present.cert.NotBefore), earliest(cert.NotAfter, present.cert.NotAfter)
	crossed := rootTemplate(td, newSerial(), from, to)
	crossed.RawSubject = cert.RawSubject
	bridge, err := signAuthority(crossed, present.cert, signer.Public(), present.signer)
	if err == nil {
		err = lintAuthority(td, bridge, present.cert, "")
	}
	if err != nil {
		return issuerRecord{}, fmt.Errorf("bridge from %s: %w", present.id, err)
	}
	return issuerRecord{ID: authorityID(cert), Certificate: cert.Raw, Key: stored, Bridge: bridge.Raw}, nil
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// PauseRotation stops a rotation where it is, and ResumeRotation lets it go on.
func (a *Authority) PauseRotation(ctx context.Context, scope, by string) error {
	return a.decide(ctx, scope, "rotation paused by "+by, func(r record, now time.Time) (record, error) { return r.paused(true, by, now) })
}

// ResumeRotation is the opposite of PauseRotation.
func (a *Authority) ResumeRotation(ctx context.Context, scope, by string) error {
	return a.decide(ctx, scope, "rotation resumed by "+by, func(r record, now time.Time) (record, error) { return r.paused(false, by, now) })
}

// RollBack takes a rotation back, until the old issuer is removed. What has signed already is rotated out in turn.
// The standing gives the clocks.
func (a *Authority) RollBack(ctx context.Context, scope, by string, s Standing) error {
	return a.decide(ctx, scope, "rotation rolled back by "+by, func(r record, now time.Time) (record, error) {
		return r.rolledBack(by, latest(now, s.Latest))
	})
}

// Proceed leaves behind the stragglers that somebody was shown and names. Errors wrap ErrOthersWait if there are
// others by now.
func (a *Authority) Proceed(ctx context.Context, scope, by string, named []string, s Standing) error {
	return a.decide(ctx, scope, fmt.Sprintf("rotation proceeds without %d stragglers, decided by %s: %q", len(named), by, named), func(r record, now time.Time) (record, error) {
		return r.proceeding(by, named, a.clocked(s, now), a.limits(r), now)
	})
}

func (a *Authority) decide(ctx context.Context, scope, why string, change func(record, time.Time) (record, error)) error {
	return a.rewrite(ctx, scope, nil, func(r record, now time.Time) (record, string, error) {
		if r.Rotation == nil {
			return r, "", fmt.Errorf("%w: of %s", ErrNoRotation, scope)
		}
		r, err := change(r, now)
		return r, why, err
	})
}

// Rotations are those that go on, the root's first.
func (a *Authority) Rotations(s Standing) []Rotation {
	var out []Rotation
	now := a.cfg.Clock()
	for _, scope := range a.view.Load().scopes {
		r := scope.record
		from, to, ok := r.ends()
		if !ok {
			continue
		}
		l := a.limits(r)
		one := Rotation{
			Scope: r.Scope, From: from.ID, To: to.ID, FromPhase: from.Phase, ToPhase: to.Phase,
			Started: r.Rotation.Started, Paused: r.Rotation.Paused, Back: r.Rotation.Back, Left: r.Rotation.Left,
			Decisions: r.Rotation.Decisions, Longest: l.longest,
		}
		_, one.Wait = r.due(a.clocked(s, now), l)
		if from.Phase == PhaseRetiring {
			one.Drains = l.drainedAt(from.Since)
		}
		out = append(out, one)
	}
	slices.SortFunc(out, func(x, y Rotation) int {
		if rank := cmp.Compare(map[bool]int{true: 1}[x.Scope != ScopeRoot], map[bool]int{true: 1}[y.Scope != ScopeRoot]); rank != 0 {
			return rank
		}
		return cmp.Compare(x.Scope, y.Scope)
	})
	return out
}

// DrainTime is how long the old issuer of a scope would stay after it was replaced now.
func (a *Authority) DrainTime(scope string) time.Duration {
	r := a.view.Load().scopes[scope].record
	if at := r.active(); at >= 0 && r.Rotation == nil {
		r.Rotation = &rotation{From: r.Issuers[at].ID}
	}
	return a.limits(r).drainedAt(time.Time{}).Sub(time.Time{})
}

// limits are the numbers by which the issuer that a rotation replaces is drained.
func (a *Authority) limits(r record) limits {
	l := limits{budget: a.cfg.OfflineBudget, skew: a.cfg.ClockSkew}
	if r.Rotation == nil {
		return l
	}
	// A root signs no leaf: what counts are the issuers below it.
	signs := func(scope string, i issuerRecord) bool {
		if r.Scope != ScopeRoot {
			return scope == r.Scope && i.ID == r.Rotation.From
		}
		return scope != ScopeRoot && i.Phase != PhaseRemoved && i.signedBy() == r.Rotation.From
	}
	for name, scope := range a.view.Load().scopes {
		for _, i := range scope.record.Issuers {
			if signs(name, i) {
				l.longest = max(l.longest, i.longest())
			}
		}
	}
	return l
}

// longest is the lifetime that nothing exceeds which the issuer signed.
func (i issuerRecord) longest() time.Duration {
	if i.Longest <= 0 {
		return MaxLifetime
	}
	return time.Duration(i.Longest) * time.Second
}

// signedBy is the ID of what signed the issuer.
func (i issuerRecord) signedBy() string {
	cert, err := x509.ParseCertificate(i.Certificate)
	if err != nil {
		return "" // the record has passed check
	}
	return hex.EncodeToString(cert.AuthorityKeyId)
}

// clocked adds this replica's own clock to a standing.
func (a *Authority) clocked(s Standing, now time.Time) Standing {
	if s.Earliest.IsZero() || now.Before(s.Earliest) {
		s.Earliest = now
	}
	s.Latest = latest(s.Latest, now)
	return s
}

// rewrite changes the newest record of a scope in one transaction, and again if somebody was faster.
func (a *Authority) rewrite(ctx context.Context, scope string, term *Term, change func(record, time.Time) (record, string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, refreshEvery/3) // issuing may wait for the lock
	defer cancel()
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		if err := a.refreshLocked(ctx); err != nil {
			return err
		}
		have := a.view.Load().scopes[scope]
		r, why, err := change(have.record, a.cfg.Clock())
		if err != nil {
			return err
		}
		err = a.writeAsLocked(ctx, term, r, have.version, why)
		if errors.Is(err, ErrChanged) {
			continue
		}
		return errors.Join(err, a.refreshLocked(ctx))
	}
}

// Rotator takes the automatic steps of an authority's rotations, in whichever replica leads.
type Rotator struct {
	Authority *Authority
	// Standing finds out how far the consumers are. It is asked while there is a rotation.
	Standing func(ctx context.Context) Standing
	// Replica names this one in the state.
	Replica string
	// Every is how often a rotation that waits is looked at; 2 s if zero.
	Every time.Duration
	// Log takes what keeps it from working; slog.Default() if nil.
	Log *slog.Logger
}

// Run works until ctx ends. It leads, and writes, only while there is a rotation.
func (r *Rotator) Run(ctx context.Context) error {
	if r.Every == 0 {
		r.Every = rotatorEvery
	}
	if r.Log == nil {
		r.Log = slog.Default()
	}
	for {
		changed := r.Authority.Changed()
		if r.Authority.rotating() {
			if err := r.lead(ctx); err != nil && ctx.Err() == nil {
				r.Log.Warn("rotation cannot go on", "error", err)
				changed = nil // not at once
			}
		}
		var again <-chan time.Time
		if r.Authority.rotating() {
			again = time.After(r.Every)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-again:
		}
	}
}

// rotating tells whether there is a rotation.
func (a *Authority) rotating() bool {
	for _, s := range a.view.Load().scopes {
		if s.record.Rotation != nil {
			return true
		}
	}
	return false
}

// lead takes steps until there is no rotation, or somebody else leads.
func (r *Rotator) lead(ctx context.Context) error {
	term, err := r.Authority.cfg.State.Lead(ctx, leadName, r.Replica)
	if err != nil {
		return unavailable(err)
	}
	defer term.Resign()
	for r.Authority.rotating() {
		changed := r.Authority.Changed()
		moved, err := r.turn(ctx, term)
		if err != nil {
			return err
		}
		if moved {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-term.Done:
			return fmt.Errorf("%w: somebody else leads", ErrFenced)
		case <-changed:
		case <-time.After(r.Every):
		}
	}
	return nil
}

// turn takes every step that is due, each in a transaction of its own.
func (r *Rotator) turn(ctx context.Context, term Term) (moved bool, err error) {
	s := r.Standing(ctx)
	for _, one := range r.Authority.Rotations(s) {
		if one.Wait.waits() {
			continue
		}
		ok, err := r.Authority.step(ctx, one.Scope, term, s)
		moved = moved || ok
		if err != nil {
			return moved, err
		}
	}
	return moved, nil
}

// waits tells whether there is anything to wait for.
func (w Wait) waits() bool {
	return w.Paused || w.Unknown != "" || !w.Until.IsZero() || len(w.Stragglers) > 0
}

// errNothing: the record is further than it was thought to be.
var errNothing = errors.New("nothing to do")

// step takes the step of a scope's rotation that is due by what is stored at that moment.
func (a *Authority) step(ctx context.Context, scope string, term Term, s Standing) (bool, error) {
	err := a.rewrite(ctx, scope, &term, func(r record, now time.Time) (record, string, error) {
		seen := a.clocked(s, now)
		m, _ := r.due(seen, a.limits(r))
		if m.id == "" {
			return r, "", errNothing
		}
		return r.after(m, seen.Latest), fmt.Sprintf("%s is %s", m.id, m.to), nil
	})
	if errors.Is(err, errNothing) {
		return false, nil
	}
	return err == nil, err
}
