// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// refresh reads the whole state and replaces the view. A record that cannot be read keeps its last good form,
// and concerns nobody but its own source.
func (a *Authority) refresh(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.refreshLocked(ctx)
}

func (a *Authority) refreshLocked(ctx context.Context) error {
	now := a.cfg.Clock()
	records, err := a.cfg.State.List(ctx, authorityPrefix)
	if err != nil {
		return unavailable(err)
	}
	revoked, err := a.cfg.State.List(ctx, revocationPrefix)
	if err != nil {
		return unavailable(err)
	}
	old := a.view.Load()
	next := &view{scopes: make(map[string]scope, len(records))}
	for _, e := range records {
		s, err := a.decodeScope(ctx, old, e)
		if err == nil {
			next.scopes[s.record.Scope] = s
			continue
		}
		name := e.Key[len(authorityPrefix):]
		last, known := old.scopes[name]
		if !known && name == ScopeRoot {
			return err
		}
		a.cfg.Log.Error("authority record not usable", "key", e.Key, "error", err, "keeping_last_good", known)
		if known {
			next.scopes[name] = last
		}
	}
	if last, known := old.scopes[ScopeRoot]; known && next.scopes[ScopeRoot].version == 0 {
		// A root does not vanish. Somebody emptied the state; what is out there still trusts the old one.
		a.cfg.Log.Error("the root's record is gone from the state", "keeping", authorityIDs(last.record))
		next.scopes[ScopeRoot] = last
	}
	a.readRevocations(old, next, revoked)
	if err := next.fillBundle(a.cfg); err != nil {
		return err
	}
	if slices.EqualFunc(old.bundle.Roots, next.bundle.Roots, (*x509.Certificate).Equal) && old.pool != nil {
		next.pool = old.pool // what was verified against it still is
	}
	a.confirmed.Store(now.UnixNano())
	a.publishLocked(old, next)
	return nil
}

// publishLocked makes the view the current one and wakes who waits for changes.
func (a *Authority) publishLocked(old, next *view) {
	a.view.Store(next)
	a.wakeMu.Lock()
	defer a.wakeMu.Unlock()
	same := func(x, y scope) bool { return x.version == y.version }
	if !maps.EqualFunc(old.scopes, next.scopes, same) || !maps.Equal(old.revocations, next.revocations) {
		close(a.changed)
		a.changed = make(chan struct{})
	}
}

// decodeScope turns a stored value into an issuer that can sign. What has not changed is taken over.
func (a *Authority) decodeScope(ctx context.Context, old *view, e Entry) (scope, error) {
	before, known := old.scopes[e.Key[len(authorityPrefix):]]
	if known && before.version == e.Version {
		return before, nil
	}
	r, err := decodeRecord(e.Key, e.Value, a.cfg.Sealer)
	if err != nil {
		return scope{}, err
	}
	if known && r.Epoch < before.record.Epoch {
		return scope{}, fmt.Errorf("%s: %w: it went back from epoch %d to %d", e.Key, ErrCorrupt, before.record.Epoch, r.Epoch)
	}
	s := scope{record: r, version: e.Version}
	s.issuer, err = a.openIssuer(ctx, r)
	return s, err
}

// openIssuer gives the active issuer its key and checks that it is its key.
func (a *Authority) openIssuer(ctx context.Context, r record) (*issuer, error) {
	at := r.active()
	if at < 0 {
		return nil, nil
	}
	stored := r.Issuers[at]
	cert, err := x509.ParseCertificate(stored.Certificate)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %v", recordKey(r.Scope), ErrCorrupt, err)
	}
	signer, err := a.cfg.Keys.Signer(ctx, recordKey(r.Scope), stored.Key)
	if err != nil {
		return nil, err
	}
	spki, err := publicBytes(signer)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(spki, cert.RawSubjectPublicKeyInfo) {
		return nil, fmt.Errorf("%s: %w: the key is not that of certificate %s", recordKey(r.Scope), ErrCorrupt, stored.ID)
	}
	return &issuer{id: stored.ID, scope: r.Scope, epoch: stored.Epoch, cert: cert, signer: signer, longest: stored.longest()}, nil
}

func publicBytes(signer crypto.Signer) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("public key of an authority: %w", err)
	}
	return spki, nil
}

// readRevocations fills in the revocations. One that cannot be read counts as a revocation: what was meant to
// be out must not come back because a byte flipped. One that vanished while this replica ran stays.
func (a *Authority) readRevocations(old, next *view, entries []Entry) {
	next.revocations, next.versions = make(map[string]Revocation), make(map[string]Version)
	maps.Copy(next.revocations, old.revocations)
	maps.Copy(next.versions, old.versions)
	for _, e := range entries {
		if old.versions[e.Key] == e.Version {
			continue
		}
		r, err := decodeRevocation(e, a.cfg.Sealer)
		if err != nil {
			a.cfg.Log.Error("revocation not readable, taken as in force", "key", e.Key, "error", err)
			if r, err = fallbackRevocation(e, err); err != nil {
				continue
			}
		}
		next.revocations[e.Key], next.versions[e.Key] = r, e.Version
	}
}

// fillBundle derives the bundle from the root's record.
func (v *view) fillBundle(cfg Config) error {
	root := v.scopes[ScopeRoot]
	v.bundle = Bundle{TrustDomain: cfg.TrustDomain, Sequence: root.record.Sequence}
	v.above = make(map[string][]*x509.Certificate)
	for _, i := range root.record.Issuers {
		roots, above, err := i.path()
		if err != nil {
			return fmt.Errorf("%s: %w: %v", recordKey(ScopeRoot), ErrCorrupt, err)
		}
		if len(i.Bridge) > 0 {
			bridge, err := x509.ParseCertificate(i.Bridge)
			if err != nil {
				return fmt.Errorf("%s: %w: %v", recordKey(ScopeRoot), ErrCorrupt, err)
			}
			above = append(above, bridge)
		}
		v.above[i.ID] = above
		for _, cert := range roots {
			if i.Phase.trusted() && !slices.ContainsFunc(v.bundle.Roots, cert.Equal) {
				v.bundle.Roots = append(v.bundle.Roots, cert)
			}
		}
	}
	v.pool = v.bundle.Pool()
	if root.version != 0 && len(v.bundle.Roots) == 0 {
		return errors.New("the bundle would be empty, which distrusts everybody")
	}
	return nil
}

func authorityIDs(r record) []string {
	var ids []string
	for _, i := range r.Issuers {
		ids = append(ids, i.ID)
	}
	return ids
}
