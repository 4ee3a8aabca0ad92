// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// successorRetry is the least time between two attempts to replace an issuer that grows old.
const successorRetry = time.Minute

// makeRoot creates the root unless another replica has.
func (a *Authority) makeRoot(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.cfg.Clock()
	r, why, err := a.firstRoot(ctx, now)
	if err != nil {
		return err
	}
	err = a.writeLocked(ctx, r, 0, why)
	if err != nil && !errors.Is(err, ErrExists) {
		return err
	}
	return a.refreshLocked(ctx)
}

// firstRoot is the record of the root that was brought along, or of one that is made now.
func (a *Authority) firstRoot(ctx context.Context, now time.Time) (r record, why string, err error) {
	r = record{Scope: ScopeRoot, Epoch: 1, Sequence: sequenceFloor(now)}
	if b := a.cfg.Root; b != nil {
		if err := b.try(a.cfg, now); err != nil {
			return r, "", err
		}
		i, err := b.record(ctx, a.cfg.Keys, now)
		r.Issuers, r.Domain = []issuerRecord{i}, a.cfg.TrustDomain.Name()
		return r, "root brought along", err
	}
	signer, stored, err := a.cfg.Keys.Generate(ctx, recordKey(ScopeRoot))
	if err != nil {
		return r, "", err
	}
	template := rootTemplate(a.cfg.TrustDomain, newSerial(), now.Add(-a.cfg.Backdate), now.Add(a.cfg.RootLifetime))
	cert, err := signAuthority(template, nil, signer.Public(), signer)
	if err == nil {
		err = lintAuthority(a.cfg.TrustDomain, cert, cert, "")
	}
	if err != nil {
		return r, "", fmt.Errorf("root of %s: %w", a.cfg.TrustDomain, err)
	}
	r.Issuers = []issuerRecord{{ID: authorityID(cert), Phase: PhaseActive, Epoch: 1, Since: now.UTC(), Certificate: cert.Raw, Key: stored}}
	return r, "root made", nil
}

// sequenceFloor makes sequences rise also after a backup was restored that knows nothing of the last ones.
func sequenceFloor(now time.Time) uint64 { return uint64(max(now.Unix(), 1)) }

// RaiseSequence gives the bundle a higher sequence than any it can have had. To be called after a restore.
func (a *Authority) RaiseSequence(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		if err := a.refreshLocked(ctx); err != nil {
			return err
		}
		root := a.view.Load().scopes[ScopeRoot]
		r := root.record.next()
		r.Sequence = max(r.Sequence+1, sequenceFloor(a.cfg.Clock()))
		err := a.writeLocked(ctx, r, root.version, "sequence of the bundle raised")
		if errors.Is(err, ErrChanged) {
			continue
		}
		return errors.Join(err, a.refreshLocked(ctx))
	}
}

// writeLocked is the one way a record gets into the state; a version of 0 creates it. The audit log comes
// first: an authority that nobody can account for must not exist.
func (a *Authority) writeLocked(ctx context.Context, r record, version Version, why string) error {
	return a.writeAsLocked(ctx, nil, r, version, why)
}

// writeAsLocked is writeLocked for a leader's step, if there is a term.
func (a *Authority) writeAsLocked(ctx context.Context, term *Term, r record, version Version, why string) error {
	value, err := encodeRecord(r, a.cfg.Sealer)
	if err != nil {
		return err
	}
	entry := AuditEntry{Event: AuditAuthority, Epoch: r.Epoch, Reason: r.Scope + ": " + why}
	if at := r.active(); at >= 0 {
		entry.Authority = r.Issuers[at].ID
	}
	if err := a.cfg.Audit.Append(entry); err != nil {
		return err
	}
	switch {
	case version == 0:
		_, err = a.cfg.State.Create(ctx, recordKey(r.Scope), value)
	case term != nil:
		_, err = a.cfg.State.ReplaceAs(ctx, *term, recordKey(r.Scope), value, version)
	default:
		_, err = a.cfg.State.Replace(ctx, recordKey(r.Scope), value, version)
	}
	if err != nil && !errors.Is(err, ErrExists) && !errors.Is(err, ErrChanged) && !errors.Is(err, ErrFenced) {
		return unavailable(err)
	}
	if err == nil {
		a.cfg.Log.Info("authority changed", "scope", r.Scope, "epoch", r.Epoch, "authority", entry.Authority, "why", why)
	}
	return err
}

// issuerFor gives the active intermediate of a source, and makes it when there is none or when it grows old.
func (a *Authority) issuerFor(ctx context.Context, source Source) (*issuer, error) {
	now := a.cfg.Clock()
	current := a.view.Load().scopes[string(source)].issuer
	if current != nil && !a.aged(current, now) && current.longest >= a.cfg.longestLifetime() {
		return current, nil
	}
	fresh, err := a.makeIntermediate(ctx, source)
	if err == nil {
		return fresh, nil
	}
	if current != nil && now.Add(a.cfg.MinLifetime).Before(current.cert.NotAfter) && now.Before(a.endOf(current)) {
		return current, nil // it still can; the reason was logged
	}
	return nil, err
}

// endOf is until when an issuer may sign at most: with a root that was replaced, as long as a replica that has
// not heard of that.
func (a *Authority) endOf(i *issuer) time.Time {
	root := a.view.Load().scopes[ScopeRoot].record
	if at := root.find(i.under()); at >= 0 && root.Issuers[at].Phase != PhaseActive {
		return root.Issuers[at].Since.Add(a.cfg.OfflineBudget)
	}
	return i.cert.NotAfter
}

// aged tells whether an issuer is below a root that was replaced, or is in the last quarter of its life, or too
// old for a whole leaf, and could be replaced by one that lives longer.
func (a *Authority) aged(i *issuer, now time.Time) bool {
	if root := a.view.Load().scopes[ScopeRoot].issuer; root != nil && i.under() != root.id {
		return true
	}
	end := i.cert.NotAfter
	if !a.intermediateEnd(now).After(end.Add(successorRetry)) {
		return false
	}
	return now.After(end.Add(-end.Sub(i.cert.NotBefore)/4)) || now.Add(a.cfg.longestLifetime()).After(end)
}

// intermediateEnd is when an intermediate made now ends: never after the root.
func (a *Authority) intermediateEnd(now time.Time) time.Time {
	end := now.Add(a.cfg.IntermediateLifetime)
	if root := a.view.Load().scopes[ScopeRoot].issuer; root != nil && end.After(root.cert.NotAfter) {
		return root.cert.NotAfter
	}
	return end
}

// makeIntermediate makes the first or the next intermediate of a source. Replicas that do so at once agree on one.
func (a *Authority) makeIntermediate(ctx context.Context, source Source) (*issuer, error) {
	ctx, cancel := context.WithTimeout(ctx, refreshEvery/3)
	defer cancel()
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.cfg.Clock()
	have := a.view.Load().scopes[string(source)]
	if again := a.attempt(source); have.issuer != nil && now.Before(a.tried[again].Add(successorRetry)) {
		if !now.Before(a.endOf(have.issuer)) {
			return nil, fmt.Errorf("%w: no intermediate of %s below the present root, see meshd's log", ErrUnavailable, source)
		}
		return have.issuer, nil
	}
	a.tried[a.attempt(source)] = now
	if err := a.refreshLocked(ctx); err != nil {
		return nil, err
	}
	have = a.view.Load().scopes[string(source)]
	switch {
	case have.issuer != nil && !a.aged(have.issuer, now):
		return a.raiseLongest(ctx, have)
	case have.issuer == nil && have.version != 0:
		return nil, fmt.Errorf("%w: %s has no active issuer", ErrRevoked, source)
	}
	r, err := a.plannedIntermediate(ctx, source, have, now)
	if err == nil {
		err = a.writeLocked(ctx, r, have.version, "intermediate made")
	}
	if err != nil && !errors.Is(err, ErrExists) && !errors.Is(err, ErrChanged) {
		a.cfg.Log.Error("intermediate not made", "source", source, "error", err)
		return nil, err
	}
	if err := a.refreshLocked(ctx); err != nil {
		return nil, err
	}
	if i := a.view.Load().scopes[string(source)].issuer; i != nil {
		return i, nil
	}
	return nil, fmt.Errorf("%w: the authority record of %s is not usable, see meshd's log", ErrUnavailable, source)
}

// attempt is what is tried once in a while only: to get a source an issuer below the present root, whose leaves
// may live as long as this replica is configured for.
func (a *Authority) attempt(source Source) string {
	root := ""
	if i := a.view.Load().scopes[ScopeRoot].issuer; i != nil {
		root = i.id
	}
	return fmt.Sprintf("%s %s %v", source, root, a.cfg.longestLifetime())
}

// raiseLongest notes that an issuer signs leaves that live longer than before, before it does. If that fails, they
// do not.
func (a *Authority) raiseLongest(ctx context.Context, have scope) (*issuer, error) {
	if have.issuer.longest >= a.cfg.longestLifetime() {
		return have.issuer, nil
	}
	r := have.record.next()
	r.Issuers[r.active()].Longest = wholeSeconds(a.cfg.longestLifetime())
	if err := a.writeLocked(ctx, r, have.version, "leaves live up to "+a.cfg.longestLifetime().String()); err != nil {
		a.cfg.Log.Warn("longer lifetime not noted, and not used yet", "scope", r.Scope, "error", err)
		return have.issuer, nil
	}
	if err := a.refreshLocked(ctx); err != nil {
		return have.issuer, nil // it signs as before
	}
	return a.view.Load().scopes[r.Scope].issuer, nil
}

func wholeSeconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// newIntermediate signs a new intermediate with the root.
func (a *Authority) newIntermediate(ctx context.Context, source Source, now time.Time) (issuerRecord, error) {
	root := a.view.Load().scopes[ScopeRoot].issuer
	if root == nil {
		return issuerRecord{}, fmt.Errorf("%w: no active root", ErrUnavailable)
	}
	signer, stored, err := a.cfg.Keys.Generate(ctx, recordKey(string(source)))
	if err != nil {
		return issuerRecord{}, err
	}
	from := now.Add(-a.cfg.Backdate)
	if from.Before(root.cert.NotBefore) {
		from = root.cert.NotBefore
	}
	template := intermediateTemplate(a.cfg.TrustDomain, source, newSerial(), from, a.intermediateEnd(now))
	cert, err := signAuthority(template, root.cert, signer.Public(), root.signer)
	if err == nil {
		err = lintAuthority(a.cfg.TrustDomain, cert, root.cert, source)
	}
	if err != nil {
		return issuerRecord{}, fmt.Errorf("intermediate of %s: %w", source, err)
	}
	return issuerRecord{ID: authorityID(cert), Certificate: cert.Raw, Key: stored, Longest: wholeSeconds(a.cfg.longestLifetime())}, nil
}

// plannedIntermediate puts a new intermediate in the place of the old one, whose key goes. A rotation of the old
// one has thereby ended.
func (a *Authority) plannedIntermediate(ctx context.Context, source Source, have scope, now time.Time) (record, error) {
	fresh, err := a.newIntermediate(ctx, source, now)
	if err != nil {
		return record{}, err
	}
	r := have.record.next()
	r.Scope = string(source)
	r.Issuers = slices.DeleteFunc(r.Issuers, func(i issuerRecord) bool {
		cert, err := x509.ParseCertificate(i.Certificate)
		return err == nil && i.Phase == PhaseRetiring && now.After(cert.NotAfter.Add(a.cfg.Backdate))
	})
	r.Rotation = nil
	for _, i := range r.Issuers {
		switch i.Phase {
		case PhaseActive:
			r.enter(i.ID, PhaseRetiring, now)
		case PhaseGenerated, PhasePublished, PhaseDistributed:
			r.enter(i.ID, PhaseRemoved, now)
		}
		r.Issuers[r.find(i.ID)].Key = []byte{}
	}
	fresh.Phase, fresh.Epoch, fresh.Since = PhaseActive, r.Epoch, now.UTC()
	r.Issuers = append(r.Issuers, fresh)
	return r.pruned(), nil
}
