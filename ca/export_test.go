// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"testing"
	"time"
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

// LintLeaf makes a leaf as Sign would, but for what change does to its template, and lints it.
func LintLeaf(t testing.TB, change func(leaf *x509.Certificate)) error {
	t.Helper()
	f, err := newLintFoundry(lintConfig(t), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return f.leaf(leafPlan{subject: Subject{"kube:c1", "pod-1", "shop", "reviews"}, publicKey: lintKey().Public()}, change)
}

// LintAuthority is LintLeaf for an intermediate.
func LintAuthority(t testing.TB, change func(issuer *x509.Certificate)) error {
	t.Helper()
	f, err := newLintFoundry(lintConfig(t), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	template := intermediateTemplate(f.cfg.TrustDomain, "kube:c1", newSerial(), f.from, f.to)
	change(template)
	issuer, err := signAuthority(template, f.root, f.issuerKey.Public(), f.rootKey)
	if err != nil {
		t.Fatal(err)
	}
	return lintAuthority(f.cfg.TrustDomain, issuer, f.root, "kube:c1")
}

func lintConfig(t testing.TB) Config {
	t.Helper()
	td, err := ParseTrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	return Config{TrustDomain: td, Backdate: time.Minute}
}

// Decide shows what Prepare would decide, as text, without doing anything.
func (a *Authority) Decide(req Request, now time.Time) string {
	plan, err := a.cfg.decide(a.view.Load(), req, now)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%v %v %v %v %x", plan.subject, plan.id, plan.dns, plan.ips, plan.spki)
}

// Thin is what is left of marks at these minutes, oldest first.
func Thin(start time.Time, minutes []int) (left []time.Duration) {
	var marks []AuditMark
	for _, m := range minutes {
		marks = thin(append(marks, AuditMark{Time: start.Add(time.Duration(m) * time.Minute)}))
	}
	for _, m := range marks {
		left = append(left, m.Time.Sub(start))
	}
	return left
}
