// SPDX-License-Identifier: Apache-2.0

package attest_test

import (
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// FuzzToken: no text but the one that the cluster signed is accepted.
func FuzzToken(f *testing.F) {
	cluster := catest.NewCluster(f, "c1")
	a := attestor(f, attest.Config{Clusters: clusters{joined(cluster, "c1")}})
	good := cluster.Sign(f, cluster.Claims("shop", "reviews", "p", "u", time.Now()), nil)
	f.Add(good)
	f.Add(ca.JoinTokenPrefix + "00.00")
	f.Add("..")
	f.Fuzz(func(t *testing.T, text string) {
		id, err := a.Authenticate(t.Context(), attest.Evidence{Bearer: text})
		if err == nil && id.Source != cluster.Source() {
			t.Errorf("%q is accepted as %+v", text, id)
		}
	})
}

// FuzzJWKS: whatever a member's API server says about its keys is an error or a set of usable keys.
func FuzzJWKS(f *testing.F) {
	f.Add(catest.NewCluster(f, "c1").JWKS())
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AA","kid":"x"},{"kty":"OKP"},null,7]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		keys, err := attest.ParseJWKS(text)
		if (err == nil) != (len(keys) > 0) {
			t.Errorf("ParseJWKS = %d keys, %v", len(keys), err)
		}
		for _, key := range keys {
			if !key.IsPublic() || key.KeyID == "" {
				t.Errorf("key %q is not usable", key.KeyID)
			}
		}
	})
}

// FuzzJoinToken: what parses is written in one way only.
func FuzzJoinToken(f *testing.F) {
	token, _, _ := ca.NewJoinToken()
	f.Add(token)
	f.Add(ca.JoinTokenPrefix)
	f.Fuzz(func(t *testing.T, text string) {
		id, secret, err := ca.ParseJoinToken(text)
		if err == nil && ca.JoinTokenPrefix+id+"."+secret != text {
			t.Errorf("%q parses as %q and %q", text, id, secret)
		}
	})
}
