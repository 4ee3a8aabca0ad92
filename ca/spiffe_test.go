// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/ca"
)

// The rules of the SPIFFE ID specification (standards/SPIFFE-ID.md), by the names they have in this project. What
// is stricter here is stricter on purpose: nothing is folded, cleaned or decoded.
func TestSpiffeID(t *testing.T) {
	t.Parallel()
	long := func(n int) string { return "spiffe://td/" + strings.Repeat("a", n-len("spiffe://td/")) }
	for rule, inputs := range map[string]map[string]bool{ // IDs, and whether they are accepted
		"ID-1": {"spiffe://td/x": true, "https://td/x": false, "spiffe:///x": false, "spiffe://td/x?q": false, "spiffe://td/x#f": false, "spiffe://": false, "td/x": false, "": false},
		"ID-2": {"spiffe://u@td/x": false, "spiffe://u:p@td/x": false, "spiffe://td:80/x": false, "spiffe://td:/x": false},
		"ID-3": {"spiffe://a.b-c_9/x": true, "spiffe://10.0.0.1/x": true, "spiffe://TD/x": false, "spiffe://a%2eb/x": false, "spiffe://ä/x": false, "spiffe://[::1]/x": false, "spiffe://t d/x": false},
		"ID-4": {"spiffe://" + strings.Repeat("a", 255) + "/x": true, "spiffe://" + strings.Repeat("a", 256) + "/x": false},
		"ID-5": {long(2048): true, long(2049): false},
		"ID-6": {"spiffe://td/...": true, "spiffe://td/a/b": true, "spiffe://td//x": false, "spiffe://td/./x": false, "spiffe://td/../x": false, "spiffe://td/x/": false, "spiffe://td/a%2fb": false, "spiffe://td/ä": false, "spiffe://td/a b": false, "spiffe://td/": false},
		"ID-7": {"SPIFFE://td/x": false, "spiffe://Td/x": false, "spiffe://td/X": true},
	} {
		t.Run(rule, func(t *testing.T) {
			t.Parallel()
			for input, want := range inputs {
				id, err := ca.ParseID(input)
				if (err == nil) != want {
					t.Errorf("ParseID(%.60q) = %v, want ok %v", input, err, want)
				}
				if err == nil && id.String() != input {
					t.Errorf("ParseID(%.60q) became %.60q", input, id)
				}
			}
		})
	}
	t.Run("ID-4 of a trust domain", func(t *testing.T) {
		t.Parallel()
		for name, ok := range map[string]bool{
			"cluster.local": true, "a": true, "a_b-c.d": true, strings.Repeat("a", 255): true,
			"": false, strings.Repeat("a", 256): false, "Cluster.local": false, "a%2eb": false, "ä": false,
			"[::1]": false, "a:80": false, "u@a": false, "spiffe://a": false, "a/b": false, "a?b": false,
		} {
			if _, err := ca.ParseTrustDomain(name); (err == nil) != ok {
				t.Errorf("ParseTrustDomain(%.40q) = %v, want ok %v", name, err, ok)
			}
		}
	})
	t.Run("ID-8", func(t *testing.T) {
		t.Parallel()
		td, err := ca.ParseTrustDomain("cluster.local")
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range []string{"..", ".", "", "a/../../x", "a/b", "%2e%2e", "A", "a ", "a\x00b"} {
			for _, s := range []ca.Subject{
				{Source: "kube:c1", Instance: "i", Namespace: bad, ServiceAccount: "x"}, {Source: "kube:c1", Instance: "i", Namespace: "x", ServiceAccount: bad},
			} {
				if err := s.Check(); err == nil {
					t.Errorf("%q is accepted", s)
				}
			}
		}
		// Whatever a credential says, the ID is made of exactly those parts, or there is none.
		rapid.Check(t, func(t *rapid.T) {
			part := rapid.OneOf(rapid.StringMatching(`[a-z0-9.-]{0,8}`), rapid.String())
			s := ca.Subject{Source: "kube:c1", Instance: "i", Namespace: part.Draw(t, "namespace"), ServiceAccount: part.Draw(t, "account")}
			if s.Check() != nil {
				return
			}
			id, err := s.ID(td)
			if err != nil {
				t.Fatalf("%+v passes Check and has no ID: %v", s, err)
			}
			if want := "spiffe://cluster.local/ns/" + s.Namespace + "/sa/" + s.ServiceAccount; id.String() != want {
				t.Fatalf("ID %s, want %s", id, want)
			}
		})
	})
}
