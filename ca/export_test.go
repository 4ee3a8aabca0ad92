// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"encoding/json"
	"testing"
)

// ReencodeRecord changes the body of a record and seals it again, as a newer release would.
func ReencodeRecord(t testing.TB, e Entry, sealer Sealer, change func(body map[string]any)) []byte {
	t.Helper()
	var body map[string]any
	if err := decodeSealed(e.Key, e.Value, sealer, &body); err != nil {
		t.Fatal(err)
	}
	change(body)
	out, err := encodeSealed(e.Key, json.RawMessage(mustJSON(t, body)), sealer)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// plainSealer seals nothing, so that a fuzzer reaches what is behind a seal.
type plainSealer struct{}

func (plainSealer) Seal(string, []byte) ([]byte, error) { return nil, nil }
func (plainSealer) Open(string, []byte) ([]byte, error) { return nil, nil }

// DecodeUnsealed decodes every kind of stored value without looking at its seal, and encodes records again.
func DecodeUnsealed(key string, value []byte) (again []byte, err error) {
	if _, err := decodeRevocation(Entry{Key: key, Value: value}, plainSealer{}); err == nil {
		return value, nil
	}
	r, err := decodeRecord(key, value, plainSealer{})
	if err != nil {
		return nil, err
	}
	r.active()
	return encodeRecord(r.next(), plainSealer{})
}
