// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"testing"
	"time"
)

// Upkeep is what Run does each time.
func (j *JWTAuthority) Upkeep(ctx context.Context) error { return j.upkeep(ctx) }

// StoredJWTKey is what the state has of a key.
type StoredJWTKey struct {
	ID      string
	Until   time.Time
	Private bool
}

// JWTKeysAtRest reads the record of a source.
func JWTKeysAtRest(t testing.TB, state State, sealer Sealer, source Source) (out []StoredJWTKey) {
	t.Helper()
	e, err := state.Fetch(t.Context(), jwtRecordKey(source))
	if err != nil {
		t.Fatal(err)
	}
	var r jwtRecord
	if err := decodeSealed(e.Key, e.Value, sealer, &r); err != nil {
		t.Fatal(err)
	}
	for _, k := range r.Keys {
		out = append(out, StoredJWTKey{k.ID, k.Until, len(k.Key) > 0})
	}
	return out
}

// Sealer is the one that protects the authority's records.
func (a *Authority) Sealer() Sealer { return a.cfg.Sealer }
