// SPDX-License-Identifier: Apache-2.0

package catest

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"maps"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/isthmus-mesh/isthmus/ca"
)

// Issuer is the issuer string of every cluster made here: clusters that were made by the same tool share it.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// Cluster signs service account tokens as a Kubernetes API server does.
type Cluster struct {
	UID   string
	KeyID string
	key   jose.SigningKey
	jwks  []byte
}

// NewCluster is a cluster with a key of its own.
func NewCluster(t testing.TB, uid string) *Cluster {
	t.Helper()
	key := Key(t)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{UID: uid, KeyID: base64.RawURLEncoding.EncodeToString(spki[len(spki)-32:])}
	c.key = jose.SigningKey{Algorithm: jose.ES256, Key: key}
	c.jwks, err = json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: key.Public(), KeyID: c.KeyID, Algorithm: string(jose.ES256), Use: "sig"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Source is the cluster as certificates name it.
func (c *Cluster) Source() ca.Source { return ca.Source("kube:" + c.UID) }

// JWKS is what the cluster's API server publishes about its keys.
func (c *Cluster) JWKS() []byte { return c.jwks }

// Claims of a token for a pod, as the API server writes them: audience isthmus-ca, valid for an hour from now.
// The test may change them before it has them signed.
func (c *Cluster) Claims(namespace, account, pod, podUID string, now time.Time) map[string]any {
	return map[string]any{
		"iss": Issuer, "aud": []string{"isthmus-ca"}, "sub": "system:serviceaccount:" + namespace + ":" + account,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(), "jti": podUID,
		"kubernetes.io": map[string]any{
			"namespace":      namespace,
			"serviceaccount": map[string]any{"name": account, "uid": "uid-of-" + account},
			"pod":            map[string]any{"name": pod, "uid": podUID},
		},
	}
}

// Token is a signed token of a pod.
func (c *Cluster) Token(t testing.TB, namespace, account, pod, podUID string) string {
	t.Helper()
	return c.Sign(t, c.Claims(namespace, account, pod, podUID, time.Now()), nil)
}

// Sign signs any claims. Headers are added to, or replace, those of a real token.
func (c *Cluster) Sign(t testing.TB, claims map[string]any, headers map[string]any) string {
	t.Helper()
	extra := map[jose.HeaderKey]any{"kid": c.KeyID}
	for name, value := range maps.All(headers) {
		extra[jose.HeaderKey(name)] = value
	}
	signer, err := jose.NewSigner(c.key, &jose.SignerOptions{ExtraHeaders: extra})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}
