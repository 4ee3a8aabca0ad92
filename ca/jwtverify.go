// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of what comes from outside, in bytes.
const (
	maxJWT       = 16 << 10
	maxJWTBundle = 1 << 20
	maxKeyID     = 256
)

// jwtUse marks the keys of JWT-SVIDs in a bundle.
const jwtUse = "jwt-svid"

// ErrToken: the token is no JWT-SVID, or not one for this audience of a trust domain that is known.
var ErrToken = errors.New("JWT-SVID not trusted")

// ErrTokenKey: the token's key is not in the bundle of its trust domain; it may be newer than the bundle. It comes
// together with ErrToken.
var ErrTokenKey = errors.New("unknown key")

// jwtAlgorithms are all that a JWT-SVID may be signed with (J-2).
var jwtAlgorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"}

// JWTKeys are the keys of one trust domain, by key ID.
type JWTKeys map[string]crypto.PublicKey

// JWTIdentity is what a verified token says.
type JWTIdentity struct {
	ID       spiffeid.ID
	Audience []string
	Expiry   time.Time
	Claims   map[string]any
}

// ParseJWTBundle reads the keys for JWT-SVIDs out of a JWK set. An element that is of no use is left out, and
// concerns no other (B-5, J-7); no element means that nothing is trusted.
func ParseJWTBundle(jwks []byte) (JWTKeys, error) {
	if len(jwks) > maxJWTBundle {
		return nil, fmt.Errorf("bundle of %d bytes; at most %d", len(jwks), maxJWTBundle)
	}
	all, err := members(jwks)
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	var elements []json.RawMessage
	if err := json.Unmarshal(all["keys"], &elements); err != nil || elements == nil {
		return nil, errors.New("bundle: keys is missing, or no array (B-4)")
	}
	keys := JWTKeys{}
	for _, element := range elements {
		var head struct{ Use, KeyID string }
		fields, err := members(element)
		if err != nil || json.Unmarshal(fields["use"], &head.Use) != nil || json.Unmarshal(fields["kid"], &head.KeyID) != nil {
			continue
		}
		var key jose.JSONWebKey
		if head.Use != jwtUse || head.KeyID == "" || len(head.KeyID) > maxKeyID || key.UnmarshalJSON(element) != nil || !key.IsPublic() {
			continue
		}
		switch public := key.Key.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey:
			keys[head.KeyID] = public
		}
	}
	return keys, nil
}

// VerifyJWT tells whom a JWT-SVID speaks for, if it is meant for the audience. It applies the rules of the
// specification and, where common libraries are looser, the specification's: the header is looked at before
// anything is computed, the key is that of the subject's own trust domain, and a token ends when it says so.
// Errors wrap ErrToken.
func VerifyJWT(token, audience string, now time.Time, keysOf func(spiffeid.TrustDomain) JWTKeys) (JWTIdentity, error) {
	id, err := verifyJWT(token, audience, now, keysOf)
	if err != nil {
		return JWTIdentity{}, fmt.Errorf("%w: %w", ErrToken, err)
	}
	return id, nil
}

func verifyJWT(token, audience string, now time.Time, keysOf func(spiffeid.TrustDomain) JWTKeys) (JWTIdentity, error) {
	if len(token) > maxJWT {
		return JWTIdentity{}, fmt.Errorf("%d bytes; at most %d", len(token), maxJWT)
	}
	header, payload, err := splitJWT(token)
	if err != nil {
		return JWTIdentity{}, err
	}
	algorithm, kid, err := checkHeader(header)
	if err != nil {
		return JWTIdentity{}, err
	}
	id, err := readClaims(payload)
	if err != nil {
		return JWTIdentity{}, err
	}
	key, ok := keysOf(id.ID.TrustDomain())[kid]
	if !ok {
		return JWTIdentity{}, fmt.Errorf("%w: %.80q of trust domain %q (J-5)", ErrTokenKey, kid, id.ID.TrustDomain())
	}
	// It also refuses a key that is not of the algorithm's kind and curve.
	signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(algorithm)})
	if err != nil {
		return JWTIdentity{}, err
	}
	if verified, err := signed.Verify(key); err != nil || !bytes.Equal(verified, payload) {
		return JWTIdentity{}, errors.Join(errors.New("the signature is not that of the key"), err)
	}
	switch {
	case !now.Before(id.Expiry):
		return JWTIdentity{}, fmt.Errorf("it has ended at %s (J-4)", id.Expiry.UTC().Format(time.RFC3339))
	case !slices.Contains(id.Audience, audience):
		return JWTIdentity{}, fmt.Errorf("audience %.200q; want %q among them (J-4)", id.Audience, audience)
	}
	return id, notYet(id.Claims, now)
}

// splitJWT takes the compact serialization apart, and no other (J-1).
func splitJWT(token string) (header, payload []byte, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, nil, fmt.Errorf("%d parts; want the three of a compact serialization (J-1)", len(parts))
	}
	for i, to := range []*[]byte{&header, &payload} {
		if *to, err = base64.RawURLEncoding.Strict().DecodeString(parts[i]); err != nil {
			return nil, nil, fmt.Errorf("part %d: %w", i+1, err)
		}
	}
	return header, payload, nil
}

// checkHeader applies J-2 and J-3.
func checkHeader(header []byte) (algorithm, kid string, err error) {
	fields, err := members(header)
	if err != nil {
		return "", "", fmt.Errorf("header: %w", err)
	}
	var kind string
	for name, value := range fields {
		to := map[string]*string{"alg": &algorithm, "kid": &kid, "typ": &kind}[name]
		if to == nil {
			return "", "", fmt.Errorf("header %.80q; want alg, kid and typ only (J-3)", name)
		}
		if err := json.Unmarshal(value, to); err != nil {
			return "", "", fmt.Errorf("header %s: %w", name, err)
		}
	}
	if !slices.Contains(jwtAlgorithms, algorithm) {
		return "", "", fmt.Errorf("algorithm %.20q is not one of those for JWT-SVIDs (J-2)", algorithm)
	}
	if _, present := fields["typ"]; present && kind != "JWT" && kind != "JOSE" {
		return "", "", fmt.Errorf("type %.20q; want JWT or JOSE (J-3)", kind)
	}
	if kid == "" || len(kid) > maxKeyID {
		return "", "", errors.New("no key ID in the header")
	}
	return algorithm, kid, nil
}

// readClaims reads what every JWT-SVID has (J-4). Nothing of it is believed yet.
func readClaims(payload []byte) (JWTIdentity, error) {
	fields, err := members(payload)
	if err != nil {
		return JWTIdentity{}, fmt.Errorf("claims: %w", err)
	}
	var id JWTIdentity
	var subject string
	if err := json.Unmarshal(fields["sub"], &subject); err != nil {
		return id, errors.New("no subject (J-4)")
	}
	if id.ID, err = ParseID(subject); err != nil {
		return id, err
	}
	if id.ID.Path() == "" {
		return id, fmt.Errorf("subject %q names a trust domain, not a workload", id.ID)
	}
	if id.Audience, err = readAudience(fields["aud"]); err != nil {
		return id, err
	}
	if err := json.Unmarshal(payload, &id.Claims); err != nil {
		return id, err
	}
	end, ok, err := timeClaim(id.Claims, "exp")
	if err != nil || !ok {
		return id, errors.Join(errors.New("no end (J-4)"), err)
	}
	id.Expiry = end
	return id, nil
}

// readAudience accepts one audience, or an array of them.
func readAudience(claim json.RawMessage) ([]string, error) {
	var one string
	if json.Unmarshal(claim, &one) == nil && one != "" {
		return []string{one}, nil
	}
	var several []string
	if json.Unmarshal(claim, &several) == nil && len(several) > 0 && !slices.Contains(several, "") {
		return several, nil
	}
	return nil, errors.New("no audience (J-4)")
}

// timeClaim reads a number of seconds.
func timeClaim(claims map[string]any, name string) (at time.Time, present bool, err error) {
	value, present := claims[name]
	seconds, ok := value.(float64)
	switch {
	case !present:
		return at, false, nil
	case !ok || math.Abs(seconds) > 1<<40:
		return at, true, fmt.Errorf("claim %s is no time", name)
	}
	return time.Unix(int64(math.Floor(seconds)), 0), true, nil
}

// notYet refuses a token from the future, as far as that is not a matter of clocks.
func notYet(claims map[string]any, now time.Time) error {
	for _, name := range []string{"nbf", "iat"} {
		at, present, err := timeClaim(claims, name)
		if err != nil {
			return err
		}
		if present && now.Add(jwtSkew).Before(at) {
			return fmt.Errorf("it begins at %s (%s)", at.UTC().Format(time.RFC3339), name)
		}
	}
	return nil
}

// members reads a JSON object whose members are all different: what another reader makes of a name that is there
// twice is its own affair.
func members(object []byte) (map[string]json.RawMessage, error) {
	decoder := json.NewDecoder(bytes.NewReader(object))
	if token, err := decoder.Token(); err != nil || token != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	fields := map[string]json.RawMessage{}
	for decoder.More() {
		name, err := decoder.Token()
		if err != nil {
			return nil, err
		}
		var value json.RawMessage
		if err := decoder.Decode(&value); err != nil {
			return nil, err
		}
		if _, twice := fields[name.(string)]; twice {
			return nil, fmt.Errorf("%.80q is there twice", name)
		}
		fields[name.(string)] = value
	}
	if _, err := decoder.Token(); err != nil {
		return nil, err
	}
	if decoder.More() {
		return nil, errors.New("something follows the JSON object")
	}
	return fields, nil
}
