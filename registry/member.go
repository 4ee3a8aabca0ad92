// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Member is a joined cluster with what is needed to reach it and to know its tokens.
type Member struct {
	federation.Cluster

	// CertificateAuthority is PEM of the authorities of the API server; empty means those
	// of the system. TLSServerName is verified where it differs from the URL's host.
	CertificateAuthority []byte `json:"certificateAuthority,omitempty"`
	TLSServerName        string `json:"tlsServerName,omitempty"`

	// GatewayAddresses are "host:port" of its east-west gateways where the Service does
	// not tell.
	GatewayAddresses []string `json:"gatewayAddresses,omitempty"`

	// AllowIstioCA accepts tokens of the audience istio-ca.
	AllowIstioCA bool `json:"allowIstioCA,omitempty"`

	// Issuer of the service account tokens and its public keys, a JSON Web Key Set. The
	// issuer is often the same in many clusters; the keys never are.
	Issuer     string          `json:"issuer,omitempty"`
	IssuerKeys json.RawMessage `json:"issuerKeys,omitempty"`

	// CredentialsVersion changes whenever the stored credentials do. It is not stored.
	CredentialsVersion uint64 `json:"-"`
}

// Source is the source of the cluster's records.
func (m *Member) Source() federation.SourceID { return federation.KubeSource(m.ID) }

// Clone returns a copy that shares nothing with m.
func (m *Member) Clone() *Member {
	c := *m
	c.CertificateAuthority = slices.Clone(m.CertificateAuthority)
	c.GatewayAddresses = slices.Clone(m.GatewayAddresses)
	c.IssuerKeys = slices.Clone(m.IssuerKeys)
	c.Conditions = slices.Clone(m.Conditions)
	c.Grant.Namespaces = slices.Clone(m.Grant.Namespaces)
	c.Grant.ServiceAccounts = slices.Clone(m.Grant.ServiceAccounts)
	return &c
}

// Validate names the first field that cannot be right.
func (m *Member) Validate() error {
	switch {
	case m.ID == "" || strings.ContainsAny(string(m.ID), "/ "):
		return fmt.Errorf("cluster %q: uid %q must be the UID of the namespace kube-system", m.Name, m.ID)
	case m.Name == "" || strings.ContainsAny(m.Name, "/ ") || len(m.Name) > 63:
		return fmt.Errorf("cluster %q: name must have 1 to 63 characters and no slash or space", m.Name)
	case m.Network == "" || strings.ContainsAny(string(m.Network), "/ "):
		return fmt.Errorf("cluster %q: network %q must be a name without slash or space", m.Name, m.Network)
	case m.Role != federation.Primary && m.Role != federation.Remote:
		return fmt.Errorf("cluster %q: role %q must be %q or %q", m.Name, m.Role, federation.Primary, federation.Remote)
	}
	if u, err := url.Parse(m.APIServer); err != nil || u.Host == "" || u.Scheme != "https" {
		return fmt.Errorf("cluster %q: apiServer %q must be an https URL", m.Name, m.APIServer)
	}
	if _, err := KeyThumbprints(m.IssuerKeys); err != nil {
		return fmt.Errorf("cluster %q: issuerKeys: %w", m.Name, err)
	}
	return nil
}

// KeyThumbprints returns the SHA-256 thumbprints (RFC 7638, base64url) of the keys of a
// JSON Web Key Set (RFC 7517), ordered and without repetition; none for empty input.
func KeyThumbprints(jwks []byte) ([]string, error) {
	if len(jwks) == 0 {
		return nil, nil
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(jwks, &set); err != nil {
		return nil, fmt.Errorf("not a JSON Web Key Set: %w", err)
	}
	seen := map[string]bool{}
	for i := range set.Keys {
		key := &set.Keys[i]
		if !key.Valid() || !key.IsPublic() {
			return nil, fmt.Errorf("key %q is not a valid public key", key.KeyID)
		}
		sum, err := key.Thumbprint(crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("key %q: %w", key.KeyID, err)
		}
		seen[base64.RawURLEncoding.EncodeToString(sum)] = true
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

// Credentials are how meshd authenticates to a member's API server: a reader that only
// reads, and a writer that only keeps the root's ConfigMap.
type Credentials struct {
	Reader Credential `json:"reader"`
	Writer Credential `json:"writer,omitzero"`
}

// Credential is a bearer token, or a client certificate with its key.
type Credential struct {
	Token   string    `json:"token,omitempty"`
	Issued  time.Time `json:"issued,omitzero"`  // when meshd got it
	Expires time.Time `json:"expires,omitzero"` // zero means never

	ClientCertificate []byte `json:"clientCertificate,omitempty"` // PEM
	ClientKey         []byte `json:"clientKey,omitempty"`         // PEM
}

// Empty tells that there is nothing to authenticate with.
func (c *Credential) Empty() bool { return c.Token == "" && len(c.ClientCertificate) == 0 }

// String never shows the secret.
func (c Credential) String() string {
	switch {
	case c.Token != "":
		return "token"
	case len(c.ClientCertificate) > 0:
		return "client certificate"
	}
	return "none"
}

// ParseTokenTimes reads issue and expiry time from a service account token (a JWT)
// without verifying it, which is up to the API server it is for. Expiry is zero for a
// token without one.
func ParseTokenTimes(token string) (issued, expires time.Time, err error) {
	claims, err := parseClaims(token)
	if err != nil {
		return issued, expires, err
	}
	if claims.Issued > 0 {
		issued = time.Unix(int64(claims.Issued), 0)
	}
	if claims.Expires > 0 {
		expires = time.Unix(int64(claims.Expires), 0)
	}
	return issued, expires, nil
}

// TokenSubject reads whose a service account token is, without verifying it:
// "system:serviceaccount:<namespace>:<name>".
func TokenSubject(token string) (string, error) {
	claims, err := parseClaims(token)
	return claims.Subject, err
}

type tokenClaims struct {
	Issued  float64 `json:"iat"`
	Expires float64 `json:"exp"`
	Subject string  `json:"sub"`
}

func parseClaims(token string) (claims tokenClaims, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return claims, errors.New("token is not a JWT: it has no three parts")
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return claims, fmt.Errorf("token is not a JWT: %w", err)
	}
	if err := json.Unmarshal(body, &claims); err != nil {
		return claims, fmt.Errorf("token's claims: %w", err)
	}
	return claims, nil
}

// Sealer protects credentials at rest with a key that is not in the store. What was
// sealed under a name opens under that name only, so that it cannot be moved elsewhere.
type Sealer interface {
	Seal(name string, plain []byte) ([]byte, error)
	Open(name string, sealed []byte) ([]byte, error)
}
