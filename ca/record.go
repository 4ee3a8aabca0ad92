// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Phase is where an issuer stands in its life. The first issuer of a scope, and one that replaces another that
// grows old, are active at once; a rotation takes them through all phases. The last ones belong to emergencies.
type Phase string

// The phases, in order; Tainted and what follows it leave the order after Active.
const (
	PhaseGenerated   Phase = "generated"   // exists, unknown to anybody
	PhasePublished   Phase = "published"   // in the bundle
	PhaseDistributed Phase = "distributed" // in everybody's bundle
	PhaseActive      Phase = "active"      // signs
	PhaseRetiring    Phase = "retiring"    // signs no more; what it signed still counts
	PhaseDrained     Phase = "drained"     // nothing it signed is alive
	PhaseRemoved     Phase = "removed"     // out of the bundle, key destroyed
	PhaseTainted     Phase = "tainted"     // to be replaced now
	PhaseReissued    Phase = "reissued"    // everything it signed has been replaced
	PhaseRevoked     Phase = "revoked"     // what it signed counts no more
)

// trusted tells whether a root in this phase belongs into the bundle.
func (p Phase) trusted() bool {
	switch p {
	case PhasePublished, PhaseDistributed, PhaseActive, PhaseRetiring, PhaseDrained, PhaseTainted, PhaseReissued:
		return true
	}
	return false
}

// ScopeRoot is the scope of the trust domain's root; every other scope is a Source.
const ScopeRoot = "root"

// authorityPrefix and the scope make the key of a record.
const authorityPrefix = "authorities/"

func recordKey(scope string) string { return authorityPrefix + scope }

// schema is the newest schema of stored values that this release reads.
const schema = 1

// envelope is the stored form: the body as it was sealed, and a seal over it that is bound to the key, so that
// whoever can write to the state but has no sealing key cannot make, change or move an authority.
type envelope struct {
	V    int             `json:"v"`
	Body json.RawMessage `json:"body"`
	Seal []byte          `json:"seal"`
}

// record is all issuers of one scope. It is one value, so that at most one of them is active and the sequence
// of the bundle moves with its content.
type record struct {
	Scope    string         `json:"scope"`
	Epoch    int64          `json:"epoch"`                  // rises with every change of this record
	Sequence uint64         `json:"sequence"`               // of the bundle; 0 but in the root's record
	Domain   string         `json:"trust_domain,omitempty"` // in the root's record, of an authority whose certificate does not say
	Issuers  []issuerRecord `json:"issuers"`
	Rotation *rotation      `json:"rotation"` // the one that goes on, if any

	raw json.RawMessage // as read, for the fields this release does not know
}

type issuerRecord struct {
	ID          string    `json:"id"` // subject key ID of the certificate, hexadecimal
	Phase       Phase     `json:"phase"`
	Epoch       int64     `json:"epoch"` // of the record when it became active
	Since       time.Time `json:"since"` // when it entered this phase
	Certificate []byte    `json:"certificate"`
	Key         []byte    `json:"key"` // whatever Keys stores; empty once destroyed

	// Longest is the lifetime that nothing it signs exceeds, in seconds. The one number that is kept instead of
	// a row for each leaf; 0, in old records, means MaxLifetime.
	Longest int64 `json:"longest"`

	// Bridge certifies the key of a root by the root before it, for consumers that have only that one.
	Bridge []byte `json:"bridge"`

	// Of an authority that was brought along: the roots to trust instead of the certificate, and the authorities
	// between the two, the one that signed the certificate first.
	Anchors [][]byte `json:"anchors,omitempty"`
	Between [][]byte `json:"between,omitempty"`

	raw json.RawMessage
}

// MarshalJSON keeps fields that a newer release wrote.
func (r record) MarshalJSON() ([]byte, error) {
	type known record
	return overlay(r.raw, known(r))
}

// UnmarshalJSON remembers fields that a newer release wrote.
func (r *record) UnmarshalJSON(b []byte) error {
	type known record
	if err := json.Unmarshal(b, (*known)(r)); err != nil {
		return err
	}
	r.raw = append(json.RawMessage(nil), b...)
	return nil
}

// MarshalJSON keeps fields that a newer release wrote.
func (r issuerRecord) MarshalJSON() ([]byte, error) {
	type known issuerRecord
	return overlay(r.raw, known(r))
}

// UnmarshalJSON remembers fields that a newer release wrote.
func (r *issuerRecord) UnmarshalJSON(b []byte) error {
	type known issuerRecord
	if err := json.Unmarshal(b, (*known)(r)); err != nil {
		return err
	}
	r.raw = append(json.RawMessage(nil), b...)
	return nil
}

// overlay writes the fields of known over the object that was read before.
func overlay(old json.RawMessage, known any) ([]byte, error) {
	fresh, err := json.Marshal(known)
	if err != nil || len(old) == 0 {
		return fresh, err
	}
	var all, over map[string]json.RawMessage
	if err := json.Unmarshal(old, &all); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(fresh, &over); err != nil {
		return nil, err
	}
	if all == nil {
		return fresh, nil
	}
	maps.Copy(all, over)
	return json.Marshal(all)
}

// next is a copy to change, one epoch on.
func (r record) next() record {
	r.Epoch++
	r.Issuers = append([]issuerRecord(nil), r.Issuers...)
	return r
}

// active is the issuer that signs, or -1.
func (r record) active() int {
	for i := range r.Issuers {
		if r.Issuers[i].Phase == PhaseActive {
			return i
		}
	}
	return -1
}

// bridges is the bridge, if there is one.
func (i issuerRecord) bridges() [][]byte {
	if len(i.Bridge) == 0 {
		return nil
	}
	return [][]byte{i.Bridge}
}

// path is the roots to trust for an issuer of the root's record, and what lies between them and the issuers below
// it: nothing, if it is a root itself. The record has passed check.
func (i issuerRecord) path() (roots, above []*x509.Certificate, err error) {
	parse := func(ders [][]byte) (out []*x509.Certificate) {
		for _, der := range ders {
			cert, parseErr := x509.ParseCertificate(der)
			err = errors.Join(err, parseErr)
			out = append(out, cert)
		}
		return out
	}
	own := parse([][]byte{i.Certificate})
	if len(i.Anchors) == 0 {
		return own, nil, err
	}
	b := Brought{Certificate: own[0], Between: parse(i.Between), Roots: parse(i.Anchors)}
	if err != nil {
		return nil, nil, err
	}
	return b.Roots, b.above(), nil
}

// encodeRecord seals the record for its key.
func encodeRecord(r record, sealer Sealer) ([]byte, error) {
	return encodeSealed(recordKey(r.Scope), r, sealer)
}

// decodeRecord is the inverse. It refuses what was not sealed for that key.
func decodeRecord(key string, value []byte, sealer Sealer) (record, error) {
	var r record
	if err := decodeSealed(key, value, sealer, &r); err != nil {
		return record{}, err
	}
	if recordKey(r.Scope) != key {
		return record{}, fmt.Errorf("%s: %w: holds the authority of scope %q", key, ErrCorrupt, r.Scope)
	}
	return r, r.check()
}

// encodeSealed writes the envelope of any body that is kept under key.
func encodeSealed(key string, body any, sealer Sealer) ([]byte, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	seal, err := sealer.Seal(bodySeal(key, text), nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return json.Marshal(envelope{V: schema, Body: text, Seal: seal})
}

// decodeSealed reads an envelope. Nothing of the body is looked at before its seal was.
func decodeSealed(key string, value []byte, sealer Sealer, body any) error {
	var env envelope
	if err := json.Unmarshal(value, &env); err != nil {
		return fmt.Errorf("%s: %w: %v", key, ErrCorrupt, err)
	}
	if env.V > schema {
		return fmt.Errorf("%s: %w: schema %d, this one reads up to %d", key, ErrNewerSchema, env.V, schema)
	}
	if env.V < 1 {
		return fmt.Errorf("%s: %w: no schema", key, ErrCorrupt)
	}
	if _, err := sealer.Open(bodySeal(key, env.Body), env.Seal); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if err := json.Unmarshal(env.Body, body); err != nil {
		return fmt.Errorf("%s: %w: %v", key, ErrCorrupt, err)
	}
	return nil
}

func bodySeal(key string, body []byte) string { return "record " + key + " " + digest(body) }

// check reports a record that no release writes.
func (r record) check() error {
	active := 0
	for _, i := range r.Issuers {
		cert, err := x509.ParseCertificate(i.Certificate)
		if err != nil {
			return fmt.Errorf("%s: issuer %s: %w: %v", recordKey(r.Scope), i.ID, ErrCorrupt, err)
		}
		if authorityID(cert) != i.ID {
			return fmt.Errorf("%s: issuer %s: %w: its certificate is that of %s", recordKey(r.Scope), i.ID, ErrCorrupt, authorityID(cert))
		}
		for _, der := range slices.Concat(i.Anchors, i.Between, i.bridges()) {
			if _, err := x509.ParseCertificate(der); err != nil {
				return fmt.Errorf("%s: chain of issuer %s: %w: %v", recordKey(r.Scope), i.ID, ErrCorrupt, err)
			}
		}
		if i.Phase == PhaseActive {
			active++
		}
	}
	if active > 1 {
		return fmt.Errorf("%s: %w: %d active issuers", recordKey(r.Scope), ErrCorrupt, active)
	}
	return r.checkRotation()
}
