// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/isthmus-mesh/isthmus/ca"
)

// The audiences a token may have been made for.
const (
	Audience      = "isthmus-ca"
	IstioAudience = "istio-ca" // for clusters that opted in
)

const (
	maxToken = 16 << 10
	leeway   = time.Minute // between the clocks of a member and of meshd
)

// tokenAlgorithms is what API servers sign with. Neither "none" nor anything with a shared secret.
var tokenAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512,
}

// ClusterKeys is one joined cluster as far as its tokens are concerned.
type ClusterKeys struct {
	// ClusterID is the UID of the cluster's kube-system namespace.
	ClusterID string
	// Name is what the cluster is called; only compared with hints.
	Name string
	// Issuer that its tokens must name. Many clusters have the same.
	Issuer string
	// JWKS is its key set as its API server publishes it.
	JWKS []byte
	// IstioAudience accepts tokens that were made for Istio's agent.
	IstioAudience bool
}

// Clusters is where the joined clusters are kept.
type Clusters interface {
	// Keys lists all of them. It answers from memory.
	Keys(ctx context.Context) ([]ClusterKeys, error)
}

// tokenClaims is what a projected token says (Kubernetes: pkg/serviceaccount/claims.go).
type tokenClaims struct {
	Issuer     string           `json:"iss"`
	Subject    string           `json:"sub"`
	Audience   jwt.Audience     `json:"aud"`
	Expiry     *jwt.NumericDate `json:"exp"`
	NotBefore  *jwt.NumericDate `json:"nbf"`
	Kubernetes struct {
		Namespace      string    `json:"namespace"`
		ServiceAccount reference `json:"serviceaccount"`
		Pod            reference `json:"pod"`
	} `json:"kubernetes.io"`
}

type reference struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// kubernetesToken verifies a projected service account token.
func (a *Attestor) kubernetesToken(ctx context.Context, e Evidence) (Identity, error) {
	id := Identity{Credential: credential(MethodKubernetes, []byte(e.Bearer), e)}
	if a.cfg.Clusters == nil {
		return id, fmt.Errorf("%w: Kubernetes tokens are not accepted here", ErrCredential)
	}
	all, err := a.cfg.Clusters.Keys(ctx)
	if err != nil {
		return id, away(err)
	}
	cluster, payload, err := a.verifyToken(e.Bearer, all)
	if err != nil {
		return id, fmt.Errorf("%w: %w", ErrCredential, err)
	}
	id.Source = ca.Source("kube:" + cluster.ClusterID)
	if other := named(all, e.ClusterHint); other != "" && other != cluster.ClusterID {
		return id, fmt.Errorf("%w: the caller says cluster %q, the token is of %s", ErrCredential, e.ClusterHint, cluster.ClusterID)
	}
	var claims tokenClaims
	if err := json.Unmarshal(payload, &claims); err != nil {
		return id, fmt.Errorf("%w: claims: %w", ErrCredential, err)
	}
	if err := claims.check(cluster, a.cfg.Clock()); err != nil {
		return id, fmt.Errorf("%w: token of %s: %w", ErrCredential, cluster.ClusterID, err)
	}
	id.Subject = ca.Subject{
		Source: id.Source, Instance: claims.Kubernetes.Pod.UID,
		Namespace: claims.Kubernetes.Namespace, ServiceAccount: claims.Kubernetes.ServiceAccount.Name,
	}
	id.Pod, id.Expires = claims.Kubernetes.Pod.Name, claims.Expiry.Time()
	id.IstioAgent = !slices.Contains(claims.Audience, Audience)
	if err := id.Check(); err != nil {
		return id, fmt.Errorf("%w: %w", ErrCredential, err)
	}
	if err := a.cfg.Authority.Revoked(id.Source, id.Instance); err != nil {
		return id, err
	}
	presence, err := a.present(ctx, id.Subject)
	if presence == Away {
		id.LifetimeLimit = a.cfg.AwayLifetime
		id.Credential.Note = "the cluster is away: pod not checked"
	}
	return id, err
}

// verifyToken finds the one cluster whose key verifies the token, and gives back what was verified.
func (a *Attestor) verifyToken(token string, all []ClusterKeys) (ClusterKeys, []byte, error) {
	if len(token) > maxToken {
		return ClusterKeys{}, nil, fmt.Errorf("token of %d bytes, at most %d", len(token), maxToken)
	}
	jws, err := jose.ParseSignedCompact(token, tokenAlgorithms)
	if err != nil {
		return ClusterKeys{}, nil, err
	}
	header := jws.Signatures[0].Header
	if header.KeyID == "" {
		return ClusterKeys{}, nil, fmt.Errorf("token names no key (kid)")
	}
	var found ClusterKeys
	var payload []byte
	known := false
	for _, cluster := range all {
		for _, key := range a.keys.of(cluster) {
			known = known || key.KeyID == header.KeyID
			if key.KeyID != header.KeyID || key.Algorithm != "" && key.Algorithm != header.Algorithm {
				continue
			}
			verified, err := jws.Verify(key.Key)
			if err != nil {
				continue
			}
			if payload != nil && found.ClusterID != cluster.ClusterID {
				return ClusterKeys{}, nil, fmt.Errorf("clusters %s and %s have the same signing key", found.ClusterID, cluster.ClusterID)
			}
			found, payload = cluster, verified
		}
	}
	if !known {
		a.tellUnknown()
	}
	if payload == nil {
		return ClusterKeys{}, nil, fmt.Errorf("no joined cluster has signed this token (key %.80q)", header.KeyID)
	}
	return found, payload, nil
}

// named is the ID of the joined cluster that a hint means, or nothing.
func named(all []ClusterKeys, hint string) string {
	for _, c := range all {
		if hint != "" && (c.ClusterID == hint || c.Name == hint) {
			return c.ClusterID
		}
	}
	return ""
}

// check applies everything that is not a matter of signatures.
func (c *tokenClaims) check(cluster ClusterKeys, now time.Time) error {
	k := c.Kubernetes
	switch {
	case cluster.Issuer != "" && c.Issuer != cluster.Issuer:
		return fmt.Errorf("issuer %.200q; want %q", c.Issuer, cluster.Issuer)
	case c.Expiry == nil:
		return fmt.Errorf("it never expires; want a projected token")
	case now.After(c.Expiry.Time().Add(leeway)):
		return fmt.Errorf("expired at %s", c.Expiry.Time().UTC().Format(time.RFC3339))
	case c.NotBefore != nil && now.Before(c.NotBefore.Time().Add(-leeway)):
		return fmt.Errorf("not valid before %s", c.NotBefore.Time().UTC().Format(time.RFC3339))
	case k.Namespace == "" || k.ServiceAccount.Name == "" || k.ServiceAccount.UID == "":
		return fmt.Errorf("no namespace or service account")
	case k.Pod.Name == "" || k.Pod.UID == "":
		return fmt.Errorf("not bound to a pod; want a projected token")
	case c.Subject != "system:serviceaccount:"+k.Namespace+":"+k.ServiceAccount.Name:
		return fmt.Errorf("subject %.300q does not match its service account", c.Subject)
	case slices.Contains(c.Audience, Audience):
		return nil
	case slices.Contains(c.Audience, IstioAudience) && cluster.IstioAudience:
		return nil
	case slices.Contains(c.Audience, IstioAudience):
		return fmt.Errorf("audience %s, and this cluster did not opt in to Istio's agent", IstioAudience)
	}
	return fmt.Errorf("audience %.200q; want %s", []string(c.Audience), Audience)
}
