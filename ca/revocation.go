// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Revocation cuts off one instance of a source, or all of the source.
type Revocation struct {
	Source   Source
	Instance string // empty: the whole source
	// At is when; certificates from before stay refused, also after the subject is let in again. Whole seconds.
	At     time.Time
	Lifted bool
	Reason string
}

const revocationPrefix = "revoked/"

type storedRevocation struct {
	Source   Source    `json:"source"`
	Instance string    `json:"instance"`
	At       time.Time `json:"at"`
	Lifted   bool      `json:"lifted"`
	Reason   string    `json:"reason"`
}

// revocationKey is one key for each source, and below it one for each instance.
func revocationKey(source Source, instance string) string {
	if instance == "" {
		return revocationPrefix + string(source) + "/"
	}
	return revocationPrefix + string(source) + "/" + instance
}

func decodeRevocation(e Entry, sealer Sealer) (Revocation, error) {
	var s storedRevocation
	if err := decodeSealed(e.Key, e.Value, sealer, &s); err != nil {
		return Revocation{}, err
	}
	if revocationKey(s.Source, s.Instance) != e.Key {
		return Revocation{}, fmt.Errorf("%s: %w: it is about %q, instance %q", e.Key, ErrCorrupt, s.Source, s.Instance)
	}
	return Revocation(s), nil
}

// fallbackRevocation stands in for a value that does not decode: when in doubt, the subject stays out. Its key
// tells whom it is about.
func fallbackRevocation(e Entry, why error) (Revocation, error) {
	source, instance, ok := strings.Cut(strings.TrimPrefix(e.Key, revocationPrefix), "/")
	if !ok {
		return Revocation{}, fmt.Errorf("%s: %w: the key names no source", e.Key, ErrCorrupt)
	}
	return Revocation{Source: Source(source), Instance: instance, Reason: why.Error()}, nil
}

// covers tells whether a certificate that is valid from notBefore is cut off.
func (r Revocation) covers(notBefore time.Time) bool { return !r.Lifted || !notBefore.After(r.At) }

// Revoke cuts off an instance, or with an empty instance a whole source: nothing is issued to it any more, and
// Revoked says so at every replica as soon as the state has told it. Repeating it is harmless.
func (a *Authority) Revoke(ctx context.Context, source Source, instance, reason string) error {
	return a.setRevocation(ctx, Revocation{Source: source, Instance: instance, Reason: reason})
}

// Reinstate lets an instance or a source in again. Certificates from before the revocation stay refused.
func (a *Authority) Reinstate(ctx context.Context, source Source, instance, reason string) error {
	return a.setRevocation(ctx, Revocation{Source: source, Instance: instance, Lifted: true, Reason: reason})
}

func (a *Authority) setRevocation(ctx context.Context, want Revocation) error {
	if _, err := ParseSource(string(want.Source)); err != nil {
		return err
	}
	if want.Source == SourceMeshd && want.Instance == "" {
		return errors.New("source meshd cannot be revoked as a whole: nothing could be served any more")
	}
	if want.Instance != "" && (len(want.Instance) > 64 || !instanceShape.MatchString(want.Instance)) {
		return fmt.Errorf("instance %.80q: want 1 to 64 letters, digits, dots, underscores or dashes", want.Instance)
	}
	for {
		done, err := a.tryRevocation(ctx, want)
		if errors.Is(err, ErrExists) || errors.Is(err, ErrChanged) {
			continue
		}
		if err != nil || done {
			return err
		}
		event := AuditRevoked
		if want.Lifted {
			event = AuditReinstated
		}
		err = a.cfg.Audit.Append(AuditEntry{Event: event, Source: want.Source, Instance: want.Instance, Reason: want.Reason})
		return errors.Join(err, a.refresh(ctx))
	}
}

// tryRevocation writes once. It reports done when there was nothing to write.
func (a *Authority) tryRevocation(ctx context.Context, want Revocation) (done bool, err error) {
	key := revocationKey(want.Source, want.Instance)
	stored := storedRevocation{
		Source: want.Source, Instance: want.Instance,
		At: a.cfg.Clock().UTC().Truncate(time.Second), Lifted: want.Lifted, Reason: want.Reason,
	}
	old, err := a.cfg.State.Fetch(ctx, key)
	missing := errors.Is(err, ErrNotFound)
	if err != nil && !missing {
		return false, unavailable(err)
	}
	if missing && want.Lifted {
		return true, nil
	}
	if !missing {
		before, err := decodeRevocation(old, a.cfg.Sealer)
		if errors.Is(err, ErrNewerSchema) {
			return false, err
		}
		if err == nil && before.Lifted == want.Lifted {
			return true, a.refresh(ctx)
		}
	}
	value, err := encodeSealed(key, stored, a.cfg.Sealer)
	if err != nil {
		return false, err
	}
	if missing {
		_, err = a.cfg.State.Create(ctx, key, value)
	} else {
		_, err = a.cfg.State.Replace(ctx, key, value, old.Version)
	}
	if err != nil && !errors.Is(err, ErrExists) && !errors.Is(err, ErrChanged) {
		return false, unavailable(err)
	}
	return false, err
}

// Revoked reports why nothing may be issued or served to the instance of the source now; nil if nothing speaks
// against it. The error wraps ErrRevoked. It asks memory only.
func (a *Authority) Revoked(source Source, instance string) error {
	return a.view.Load().revoked(source, instance, a.cfg.Clock())
}

// RevokedIdentity is Revoked for the holder of a certificate: one from before a revocation stays refused even
// when its subject was let in again.
func (a *Authority) RevokedIdentity(id Identity) error {
	return a.view.Load().revoked(id.Source, id.Instance, id.NotBefore)
}

// revoked says why a certificate that is valid from notBefore is refused.
func (v *view) revoked(source Source, instance string, notBefore time.Time) error {
	for _, key := range []string{revocationKey(source, ""), revocationKey(source, instance)} {
		r, ok := v.revocations[key]
		if !ok || !r.covers(notBefore) {
			continue
		}
		if r.Instance == "" {
			return fmt.Errorf("%w: source %s, since %s: %s", ErrRevoked, source, r.At.Format(time.RFC3339), r.Reason)
		}
		return fmt.Errorf("%w: instance %s of %s, since %s: %s", ErrRevoked, instance, source, r.At.Format(time.RFC3339), r.Reason)
	}
	return nil
}

// lastRevocation is the latest moment whose certificates are refused for the subject; zero if none are.
func (v *view) lastRevocation(source Source, instance string) time.Time {
	own, whole := v.revocations[revocationKey(source, instance)].At, v.revocations[revocationKey(source, "")].At
	if whole.After(own) {
		return whole
	}
	return own
}

// Revocations lists what is revoked or was, by source and instance.
func (a *Authority) Revocations() []Revocation {
	var out []Revocation
	for _, r := range a.view.Load().revocations {
		out = append(out, r)
	}
	slices.SortFunc(out, func(x, y Revocation) int {
		return strings.Compare(revocationKey(x.Source, x.Instance), revocationKey(y.Source, y.Instance))
	})
	return out
}
