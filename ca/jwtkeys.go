// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// jwtPrefix and the source make the key of a record.
const jwtPrefix = "jwt/"

func jwtRecordKey(source Source) string { return jwtPrefix + string(source) }

// jwtSkew is how far clocks of verifiers may be off.
const jwtSkew = time.Minute

// jwtRecord is all keys of one source that sign, will sign, or have signed what may still be alive.
type jwtRecord struct {
	Source Source         `json:"source"`
	Epoch  int64          `json:"epoch"` // rises with every change of this record
	Keys   []jwtKeyRecord `json:"keys"`  // in the order in which they sign

	raw json.RawMessage // as read, for the fields this release does not know
}

type jwtKeyRecord struct {
	ID     string    `json:"id"`     // SHA-256 of the public key, hexadecimal; kid of its tokens
	From   time.Time `json:"from"`   // when it begins to sign; it is published before
	Until  time.Time `json:"until"`  // when it ends to sign; it stays published for as long as its tokens live
	Public []byte    `json:"public"` // PKIX
	Key    []byte    `json:"key"`    // whatever Keys stores; empty once destroyed
}

// MarshalJSON keeps fields that a newer release wrote.
func (r jwtRecord) MarshalJSON() ([]byte, error) {
	type known jwtRecord
	return overlay(r.raw, known(r))
}

// UnmarshalJSON remembers fields that a newer release wrote.
func (r *jwtRecord) UnmarshalJSON(b []byte) error {
	type known jwtRecord
	if err := json.Unmarshal(b, (*known)(r)); err != nil {
		return err
	}
	r.raw = append(json.RawMessage(nil), b...)
	return nil
}

// signing is the key that signs at a moment, or -1.
func (r jwtRecord) signing(now time.Time) int {
	return slices.IndexFunc(r.Keys, func(k jwtKeyRecord) bool { return !now.Before(k.From) && now.Before(k.Until) })
}

// due tells whether a key has to be made: there is none that signs, or none that will follow it.
func (r jwtRecord) due(now time.Time, cfg JWTConfig) bool {
	return r.signing(now) < 0 || !now.Add(cfg.KeyLifetime/6).Before(r.Keys[len(r.Keys)-1].Until)
}

// spent tells whether a private half is there that signs no more.
func (r jwtRecord) spent(now time.Time) bool {
	return slices.ContainsFunc(r.Keys, func(k jwtKeyRecord) bool { return len(k.Key) > 0 && !now.Before(k.Until) })
}

// jwtScope is the decoded record of one source.
type jwtScope struct {
	record  jwtRecord
	version Version
	signers map[string]crypto.Signer // by key ID
}

// key is the one that signs at a moment.
func (s jwtScope) key(now time.Time) (jwtKey, bool) {
	at := s.record.signing(now)
	if at < 0 || s.signers[s.record.Keys[at].ID] == nil {
		return jwtKey{}, false
	}
	return jwtKey{s.record.Keys[at], s.signers[s.record.Keys[at].ID]}, true
}

// keyFor gives the key of a source, and makes the first one.
func (j *JWTAuthority) keyFor(ctx context.Context, source Source) (jwtKey, error) {
	if key, ok := j.view.Load().scopes[source].key(j.a.cfg.Clock()); ok {
		return key, nil
	}
	if err := j.keep(ctx, source); err != nil {
		return jwtKey{}, err
	}
	if key, ok := j.view.Load().scopes[source].key(j.a.cfg.Clock()); ok {
		return key, nil
	}
	return jwtKey{}, fmt.Errorf("%w: the record of the JWT keys of %s is not usable, see meshd's log", ErrUnavailable, source)
}

// keep makes the key that is due, and destroys what is spent. Replicas that do so at once agree on one.
func (j *JWTAuthority) keep(ctx context.Context, source Source) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.refreshLocked(ctx); err != nil {
		return err
	}
	now, have := j.a.cfg.Clock(), j.view.Load().scopes[source]
	if !have.record.due(now, j.cfg) && !have.record.spent(now) {
		return nil
	}
	r, why, err := j.planned(ctx, source, have.record, now)
	if err == nil {
		err = j.writeLocked(ctx, r, have.version, why)
	}
	if err != nil && !errors.Is(err, ErrExists) && !errors.Is(err, ErrChanged) {
		return err
	}
	return j.refreshLocked(ctx)
}

// planned takes away what has had its time, and where one is due adds a key that signs once the last one ends.
func (j *JWTAuthority) planned(ctx context.Context, source Source, have jwtRecord, now time.Time) (r jwtRecord, why string, err error) {
	r = have
	r.Source, r.Epoch, r.Keys = source, have.Epoch+1, nil
	for _, k := range have.Keys {
		if !now.Before(k.Until) {
			k.Key = []byte{} // it signs no more
		}
		if j.published(k, now) {
			r.Keys = append(r.Keys, k)
		}
	}
	if !have.due(now, j.cfg) {
		return r, "private half of a key destroyed that signs no more", nil
	}
	signer, stored, err := j.a.cfg.Keys.Generate(ctx, jwtRecordKey(source))
	if err != nil {
		return r, "", err
	}
	public, err := publicBytes(signer)
	if err != nil {
		return r, "", err
	}
	from := now.Truncate(time.Second)
	if n := len(have.Keys); n > 0 && have.Keys[n-1].Until.After(from) {
		from = have.Keys[n-1].Until
	}
	r.Keys = append(r.Keys, jwtKeyRecord{ID: digest(public), From: from.UTC(), Until: from.Add(j.cfg.KeyLifetime).UTC(), Public: public, Key: stored})
	return r, "key made", nil
}

// published tells whether a key belongs into the bundle. Whatever the lifetime of tokens is now, it may have been the
// longest one when the key signed.
func (j *JWTAuthority) published(k jwtKeyRecord, now time.Time) bool {
	return now.Before(k.Until.Add(MaxJWTLifetime + jwtSkew))
}

// writeLocked is the one way a record gets into the state; a version of 0 creates it. The audit log comes first.
func (j *JWTAuthority) writeLocked(ctx context.Context, r jwtRecord, version Version, why string) error {
	name := jwtRecordKey(r.Source)
	value, err := encodeSealed(name, r, j.a.cfg.Sealer)
	if err != nil {
		return err
	}
	id := r.Keys[len(r.Keys)-1].ID
	entry := AuditEntry{Event: AuditAuthority, Epoch: r.Epoch, Authority: id, Reason: name + ": " + why}
	if err := j.a.cfg.Audit.Append(entry); err != nil {
		return err
	}
	if version == 0 {
		_, err = j.a.cfg.State.Create(ctx, name, value)
	} else {
		_, err = j.a.cfg.State.Replace(ctx, name, value, version)
	}
	if err != nil && !errors.Is(err, ErrExists) && !errors.Is(err, ErrChanged) {
		return unavailable(err)
	}
	if err == nil {
		j.a.cfg.Log.Info("keys for JWT-SVIDs changed", "source", r.Source, "epoch", r.Epoch, "key", id, "why", why)
	}
	return err
}

// refresh reads all records and replaces the view. One that cannot be read keeps its last good form.
func (j *JWTAuthority) refresh(ctx context.Context) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.refreshLocked(ctx)
}

func (j *JWTAuthority) refreshLocked(ctx context.Context) error {
	entries, err := j.a.cfg.State.List(ctx, jwtPrefix)
	if err != nil {
		return unavailable(err)
	}
	old, next := j.view.Load(), &jwtView{scopes: make(map[Source]jwtScope, len(entries))}
	for _, e := range entries {
		source := Source(strings.TrimPrefix(e.Key, jwtPrefix))
		last, known := old.scopes[source]
		if known && last.version == e.Version {
			next.scopes[source] = last
			continue
		}
		s, err := j.decodeScope(ctx, e, last)
		if err == nil {
			next.scopes[source] = s
			continue
		}
		j.a.cfg.Log.Error("record of JWT keys not usable", "key", e.Key, "error", err, "keeping_last_good", known)
		if known {
			next.scopes[source] = last
		}
	}
	if next.bundle, err = j.encodeBundle(next); err != nil {
		return err
	}
	j.view.Store(next)
	j.wakeMu.Lock()
	defer j.wakeMu.Unlock()
	if !bytes.Equal(old.bundle, next.bundle) {
		close(j.changed)
		j.changed = make(chan struct{})
	}
	return nil
}

// decodeScope opens a record and the keys in it that sign or will.
func (j *JWTAuthority) decodeScope(ctx context.Context, e Entry, last jwtScope) (jwtScope, error) {
	s := jwtScope{version: e.Version, signers: make(map[string]crypto.Signer)}
	if err := decodeSealed(e.Key, e.Value, j.a.cfg.Sealer, &s.record); err != nil {
		return s, err
	}
	if jwtRecordKey(s.record.Source) != e.Key {
		return s, fmt.Errorf("%s: %w: holds the keys of %q", e.Key, ErrCorrupt, s.record.Source)
	}
	if s.record.Epoch < last.record.Epoch {
		return s, fmt.Errorf("%s: %w: it went back from epoch %d to %d", e.Key, ErrCorrupt, last.record.Epoch, s.record.Epoch)
	}
	for _, k := range s.record.Keys {
		public, err := k.public()
		if err != nil {
			return s, fmt.Errorf("%s: %w: %w", e.Key, ErrCorrupt, err)
		}
		if len(k.Key) == 0 {
			continue
		}
		signer, err := j.a.cfg.Keys.Signer(ctx, e.Key, k.Key)
		if err != nil {
			return s, err
		}
		if !public.Equal(signer.Public()) {
			return s, fmt.Errorf("%s: %w: key %s has another public half", e.Key, ErrCorrupt, k.ID)
		}
		s.signers[k.ID] = signer
	}
	return s, nil
}

// public is the half that verifies.
func (k jwtKeyRecord) public() (*ecdsa.PublicKey, error) {
	parsed, err := x509.ParsePKIXPublicKey(k.Public)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() || digest(k.Public) != k.ID {
		return nil, fmt.Errorf("key %s: want a P-256 key of that hash", k.ID)
	}
	return key, nil
}

// encodeBundle lists the keys whose tokens count. Those of a source that was cut off are not among them.
func (j *JWTAuthority) encodeBundle(v *jwtView) ([]byte, error) {
	now, set := j.a.cfg.Clock(), jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, source := range slices.Sorted(maps.Keys(v.scopes)) {
		if j.a.Revoked(source, "") != nil {
			continue
		}
		for _, k := range v.scopes[source].record.Keys {
			public, err := k.public()
			if err != nil {
				return nil, err // decodeScope has looked before
			}
			if j.published(k, now) {
				set.Keys = append(set.Keys, jose.JSONWebKey{Key: public, KeyID: k.ID, Use: jwtUse})
			}
		}
	}
	return json.Marshal(set)
}
