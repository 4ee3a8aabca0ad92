// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

func openJWT(t testing.TB, authority *ca.Authority) *ca.JWTAuthority {
	t.Helper()
	j, err := ca.OpenJWT(t.Context(), authority, ca.JWTConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func jwtRequest(audience ...string) ca.JWTRequest {
	return ca.JWTRequest{Subject: catest.Subject("kube:c1", "pod-1", "shop"), Credential: ca.Credential{Method: "test"}, Audience: audience}
}

func issueJWT(t testing.TB, j *ca.JWTAuthority, audience ...string) string {
	t.Helper()
	token, err := j.Issue(t.Context(), jwtRequest(audience...))
	if err != nil {
		t.Fatal(err)
	}
	return token.Token
}

// keysOf is the bundle of cluster.local, and of no other trust domain.
func keysOf(t testing.TB, bundle []byte) func(spiffeid.TrustDomain) ca.JWTKeys {
	t.Helper()
	keys, err := ca.ParseJWTBundle(bundle)
	if err != nil {
		t.Fatal(err)
	}
	return func(td spiffeid.TrustDomain) ca.JWTKeys {
		if td.Name() == catest.TrustDomain {
			return keys
		}
		return nil
	}
}

// part decodes a part of a token.
func part(t testing.TB, token string, n int) map[string]any {
	t.Helper()
	text, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[n])
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// What is issued is what the specification says, and the library that everybody uses accepts it.
func TestJWTIssue(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	j := openJWT(t, c.Authority)
	before := time.Now()
	token := issueJWT(t, j, "billing", "billing", "stock")
	bundle, err := jwtbundle.Parse(c.TrustDomain(), j.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	svid, err := jwtsvid.ParseAndValidate(token, bundle, []string{"stock"})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != "spiffe://cluster.local/ns/shop/sa/default" || fmt.Sprint(svid.Audience) != "[billing stock]" {
		t.Errorf("token for %s, audience %v", svid.ID, svid.Audience)
	}
	if life := svid.Expiry.Sub(before); life > ca.DefaultJWTLifetime || life < ca.DefaultJWTLifetime-2*time.Second {
		t.Errorf("it lives for %v", life)
	}
	if header := part(t, token, 0); len(header) != 3 || header["alg"] != "ES256" || header["typ"] != "JWT" || bundle.JWTAuthorities()[header["kid"].(string)] == nil {
		t.Errorf("header %v", header)
	}
	req := jwtRequest("billing")
	req.NotAfter = before.Add(time.Minute)
	short, err := j.Issue(t.Context(), req)
	if err != nil || short.Expiry.After(req.NotAfter) {
		t.Errorf("a token ends at %v, %v, its credential at %v", short.Expiry, err, req.NotAfter)
	}
	log := c.AuditEntries(t)
	last := log[len(log)-2]
	if last.Event != ca.AuditJWTIssued || last.SPIFFEID != svid.ID.String() || last.Serial != svid.Claims["jti"] || fmt.Sprint(last.Audience) != "[billing billing stock]" {
		t.Errorf("audit line %+v", last)
	}
	for _, line := range log {
		if text := string(mustJSON(t, line)); strings.Contains(text, token) || strings.Contains(text, strings.Split(token, ".")[2]) {
			t.Errorf("the audit log gives the token away: %s", text)
		}
	}
}

// What may not be issued is refused with a line in the log, and what cannot be logged is not issued.
func TestJWTRefused(t *testing.T) {
	t.Parallel()
	c := catest.New(t, func(cfg *ca.Config) {
		cfg.Grants = ca.GrantFunc(func(_ ca.Source, namespace, _ string) error {
			if namespace == "bank" {
				return errors.New("not yours")
			}
			return nil
		})
	})
	j := openJWT(t, c.Authority)
	issueJWT(t, j, "billing")
	if err := c.Revoke(t.Context(), "kube:c1", "pod-out", "test"); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]struct {
		to   func(*ca.JWTRequest)
		want error
	}{
		"no audience":        {func(r *ca.JWTRequest) { r.Audience = nil }, ca.ErrAudience},
		"an empty audience":  {func(r *ca.JWTRequest) { r.Audience = []string{"a", ""} }, ca.ErrAudience},
		"a long audience":    {func(r *ca.JWTRequest) { r.Audience = []string{strings.Repeat("\x00", 1025)} }, ca.ErrAudience},
		"many audiences":     {func(r *ca.JWTRequest) { r.Audience = strings.Split("a b c d e f g h i j k l m n o p q", " ") }, ca.ErrAudience},
		"outside its grant":  {func(r *ca.JWTRequest) { r.Subject.Namespace = "bank" }, ca.ErrNotGranted},
		"no namespace":       {func(r *ca.JWTRequest) { r.Subject.Namespace = "../x" }, ca.ErrSubject},
		"revoked":            {func(r *ca.JWTRequest) { r.Subject.Instance = "pod-out" }, ca.ErrRevoked},
		"meshd's own source": {func(r *ca.JWTRequest) { r.Subject.Source = ca.SourceMeshd }, ca.ErrNotGranted},
		"meshd's own name": {func(r *ca.JWTRequest) {
			r.Subject.Namespace, r.Subject.ServiceAccount = ca.ControlNamespace, ca.ControlAccount
		}, ca.ErrNotGranted},
		"a credential that has ended": {func(r *ca.JWTRequest) { r.NotAfter = time.Now().Add(-time.Second) }, ca.ErrUnavailable},
	} {
		req := jwtRequest("billing")
		change.to(&req)
		if _, err := j.Issue(t.Context(), req); !errors.Is(err, change.want) {
			t.Errorf("%s: %v, want %v", name, err, change.want)
		}
		log := c.AuditEntries(t)
		if last := log[len(log)-1]; last.Event != ca.AuditJWTRefused || last.Reason == "" {
			t.Errorf("%s: audit line %+v", name, last)
		}
	}
	c.Audit.Close()
	if token, err := j.Issue(t.Context(), jwtRequest("billing")); !errors.Is(err, ca.ErrAudit) || token.Token != "" {
		t.Errorf("without an audit log: %v", err)
	}
}

// A key signs for its time; its successor is known long before it signs, and it is known as long as a token of it
// may live. Its private half goes.
func TestJWTKeysFollowEachOther(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	c := catest.New(t, func(cfg *ca.Config) { cfg.Clock = clock.Now })
	j, err := ca.OpenJWT(t.Context(), c.Authority, ca.JWTConfig{KeyLifetime: 6 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	known := func() ca.JWTKeys { return keysOf(t, j.Bundle())(c.TrustDomain()) }
	kid := func() string { return part(t, issueJWT(t, j, "billing"), 0)["kid"].(string) }
	step := func(d time.Duration) {
		t.Helper()
		clock.Advance(d)
		if err := j.Upkeep(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	first := kid()
	step(4*time.Hour + 59*time.Minute)
	if len(known()) != 1 {
		t.Fatalf("%d keys before a successor is due", len(known()))
	}
	step(2 * time.Minute)
	if len(known()) != 2 || kid() != first {
		t.Fatalf("%d keys; the successor has to be published, and not to sign", len(known()))
	}
	step(time.Hour)
	second := kid()
	if second == first || known()[first] == nil {
		t.Fatal("the successor has to sign, and the tokens of the first key to count")
	}
	atRest := func() {
		t.Helper()
		for _, key := range ca.JWTKeysAtRest(t, c.State, c.Sealer(), "kube:c1") {
			if ended := !key.Until.After(clock.Now()); ended == key.Private {
				t.Errorf("of key %s, which ends at %v, the private half is there: %v", key.ID, key.Until, key.Private)
			}
		}
	}
	atRest()
	step(ca.MaxJWTLifetime + 2*time.Minute)
	if known()[first] != nil || known()[second] == nil {
		t.Fatal("the first key has to be gone, the second to stay")
	}
	step(30 * 24 * time.Hour) // nobody looked
	if third := kid(); third == second || len(known()) != 1 || known()[third] == nil {
		t.Errorf("after a long time keys %v, signing %s", known(), third)
	}
	atRest()
}

// Replicas that need the first key of a source at once agree on one, and each verifies what the other signs.
func TestJWTReplicasAgree(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	one, two := openJWT(t, c.Authority), openJWT(t, c.Authority)
	var wg sync.WaitGroup
	tokens := make([]string, 8)
	for i := range tokens {
		wg.Go(func() { tokens[i] = issueJWT(t, []*ca.JWTAuthority{one, two}[i%2], "billing") })
	}
	wg.Wait()
	for i, token := range tokens {
		if _, err := ca.VerifyJWT(token, "billing", time.Now(), keysOf(t, one.Bundle())); err != nil {
			t.Errorf("token %d: %v", i, err)
		}
		if part(t, token, 0)["kid"] != part(t, tokens[0], 0)["kid"] {
			t.Errorf("token %d has another key", i)
		}
	}
}

// A source that is cut off gets no more tokens, and those it has count no more; others' do.
func TestJWTRevokedSource(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	j := openJWT(t, c.Authority)
	mine := issueJWT(t, j, "billing")
	other := jwtRequest("billing")
	other.Subject.Source = "kube:c2"
	theirs, err := j.Issue(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	changed := j.Changed()
	if err := c.Revoke(t.Context(), "kube:c1", "", "test"); err != nil {
		t.Fatal(err)
	}
	if err := j.Upkeep(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody is told of the other bundle")
	}
	keys := keysOf(t, j.Bundle())
	if _, err := ca.VerifyJWT(mine, "billing", time.Now(), keys); !errors.Is(err, ca.ErrTokenKey) {
		t.Errorf("a token of the source that was cut off: %v", err)
	}
	if _, err := ca.VerifyJWT(theirs.Token, "billing", time.Now(), keys); err != nil {
		t.Errorf("a token of another source: %v", err)
	}
}

// forger signs anything.
type forger struct {
	key *ecdsa.PrivateKey
	now time.Time
}

func (f forger) keys(td spiffeid.TrustDomain) ca.JWTKeys {
	if td.Name() != "cluster.local" {
		return nil
	}
	return ca.JWTKeys{"k": f.key.Public()}
}

// claims of a good token.
func (f forger) claims(change map[string]any) map[string]any {
	claims := map[string]any{"sub": "spiffe://cluster.local/ns/shop/sa/default", "aud": "billing", "exp": f.now.Add(time.Minute).Unix()}
	return changed(claims, change)
}

// header of a good token.
func (forger) header(change map[string]any) map[string]any {
	return changed(map[string]any{"alg": "ES256", "kid": "k", "typ": "JWT"}, change)
}

// changed replaces members; nil takes one away.
func changed(from, change map[string]any) map[string]any {
	for name, value := range change {
		if from[name] = value; value == nil {
			delete(from, name)
		}
	}
	return from
}

func (f forger) sign(t testing.TB, header, claims []byte) string {
	t.Helper()
	return f.signBy(t, func(b []byte) []byte { s := sha256.Sum256(b); return s[:] }, 32, header, claims)
}

// signBy hashes by sum and writes numbers of that size.
func (f forger) signBy(t testing.TB, sum func([]byte) []byte, size int, header, claims []byte) string {
	t.Helper()
	input := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(claims)
	r, s, err := ecdsa.Sign(rand.Reader, f.key, sum([]byte(input)))
	if err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, 2*size)
	r.FillBytes(signature[:size])
	s.FillBytes(signature[size:])
	return input + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func (f forger) token(t testing.TB, header, claims map[string]any) string {
	t.Helper()
	return f.sign(t, mustJSON(t, f.header(header)), mustJSON(t, f.claims(claims)))
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// The rules of the JWT-SVID specification (standards/JWT-SVID.md) for whoever verifies, by the names they have in
// this project.
func TestSpiffeJWT(t *testing.T) {
	t.Parallel()
	type object = map[string]any
	f := forger{catest.Key(t), time.Now()}
	verify := func(token string) error {
		_, err := ca.VerifyJWT(token, "billing", f.now, f.keys)
		return err
	}
	if err := verify(f.token(t, nil, nil)); err != nil {
		t.Fatalf("a good token: %v", err)
	}
	for rule, bad := range map[string]func(t *testing.T) []string{
		"J-1": func(t *testing.T) []string {
			parts := strings.Split(f.token(t, nil, nil), ".")
			return []string{
				string(mustJSON(t, object{"protected": parts[0], "payload": parts[1], "signature": parts[2]})),
				strings.Join(append(parts, ""), "."), parts[0] + "." + parts[1], "", ".", "..", parts[0] + "=." + parts[1] + "." + parts[2],
			}
		},
		"J-2": func(t *testing.T) []string {
			public, err := f.key.PublicKey.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			hmac, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: public}, new(jose.SignerOptions).WithType("JWT").WithHeader("kid", "k"))
			if err != nil {
				t.Fatal(err)
			}
			signed, err := hmac.Sign(mustJSON(t, f.claims(nil)))
			if err != nil {
				t.Fatal(err)
			}
			compact, err := signed.CompactSerialize()
			if err != nil {
				t.Fatal(err)
			}
			out := []string{compact}
			for _, algorithm := range []any{"none", "None", "HS256", "EdDSA", "ES256K", "es256", "", nil, 1} {
				out = append(out, f.token(t, object{"alg": algorithm}, nil))
			}
			return out
		},
		"J-2 an algorithm for another curve": func(t *testing.T) []string {
			sum := func(b []byte) []byte { s := sha512.Sum384(b); return s[:] }
			return []string{f.signBy(t, sum, 48, mustJSON(t, f.header(object{"alg": "ES384"})), mustJSON(t, f.claims(nil)))}
		},
		"J-3": func(t *testing.T) []string {
			var out []string
			for _, header := range []object{{"typ": "at+jwt"}, {"typ": "jwt"}, {"typ": ""}, {"typ": nil, "jku": "https://evil.example/keys"}, {"jwk": object{"kty": "EC"}}, {"crit": []string{"exp"}}, {"cty": "JWT"}, {"x5u": "https://evil.example"}} {
				out = append(out, f.token(t, header, nil))
			}
			return out
		},
		"J-4 subject": func(t *testing.T) []string {
			var out []string
			for _, subject := range []any{nil, "", "default", "spiffe://cluster.local", "https://cluster.local/ns/shop/sa/default", "spiffe://cluster.local/" + strings.Repeat("a", 2048), 7} {
				out = append(out, f.token(t, nil, object{"sub": subject}))
			}
			return out
		},
		"J-4 audience": func(t *testing.T) []string {
			var out []string
			for _, audience := range []any{nil, "", []string{}, "Billing", []string{"stock"}, []string{"billing", ""}, 7, object{"billing": 1}} {
				out = append(out, f.token(t, nil, object{"aud": audience}))
			}
			return out
		},
		"J-4 end": func(t *testing.T) []string {
			var out []string
			for _, end := range []any{nil, "never", f.now.Unix(), f.now.Add(-30 * time.Second).Unix(), 0, -1, 1e300} {
				out = append(out, f.token(t, nil, object{"exp": end}))
			}
			return out
		},
		"J-4 begin": func(t *testing.T) []string {
			return []string{f.token(t, nil, object{"nbf": f.now.Add(2 * time.Minute).Unix()}), f.token(t, nil, object{"iat": f.now.Add(time.Hour).Unix()})}
		},
		"J-5": func(t *testing.T) []string {
			return []string{
				f.token(t, nil, object{"sub": "spiffe://other.example/ns/shop/sa/default"}), f.token(t, object{"kid": "other"}, nil), f.token(t, object{"kid": nil}, nil),
				forger{catest.Key(t), f.now}.token(t, nil, nil),
			}
		},
		"twice": func(t *testing.T) []string {
			return []string{
				f.sign(t, []byte(`{"alg":"none","alg":"ES256","kid":"k"}`), mustJSON(t, f.claims(nil))),
				f.sign(t, mustJSON(t, f.header(nil)), []byte(`{"sub":"spiffe://cluster.local/ns/bank/sa/root",`+string(mustJSON(t, f.claims(nil)))[1:])),
				f.sign(t, mustJSON(t, f.header(nil)), []byte(string(mustJSON(t, f.claims(nil)))+"{}")),
			}
		},
		"too long": func(t *testing.T) []string {
			return []string{f.token(t, nil, object{"x": strings.Repeat("a", 16<<10)})}
		},
	} {
		t.Run(rule, func(t *testing.T) {
			t.Parallel()
			for _, token := range bad(t) {
				if err := verify(token); !errors.Is(err, ca.ErrToken) {
					t.Errorf("%.300s was accepted: %v", token, err)
				}
			}
		})
	}
	t.Run("accepted", func(t *testing.T) {
		t.Parallel()
		for _, token := range []string{
			f.token(t, object{"typ": nil}, nil), f.token(t, object{"typ": "JOSE"}, nil), f.token(t, nil, object{"aud": []string{"stock", "billing"}}),
			f.token(t, nil, object{"exp": float64(f.now.Unix()) + 1.5, "iat": f.now.Unix(), "nbf": f.now.Add(30 * time.Second).Unix(), "extra": object{"a": 1}}),
		} {
			if err := verify(token); err != nil {
				t.Errorf("%s: %v", token, err)
			}
		}
	})
}

// Bundles: what is of no use in them concerns nothing else in them.
func TestSpiffeJWTBundle(t *testing.T) {
	t.Parallel()
	key := catest.Key(t)
	element := func(change map[string]any) map[string]any {
		var out map[string]any
		text, err := jose.JSONWebKey{Key: key.Public(), KeyID: "k", Use: "jwt-svid"}.MarshalJSON()
		if err == nil {
			err = json.Unmarshal(text, &out)
		}
		if err != nil {
			t.Fatal(err)
		}
		return changed(out, change)
	}
	bundle := func(elements ...map[string]any) []byte {
		return mustJSON(t, map[string]any{"keys": elements, "new": true})
	}
	t.Run("B-4", func(t *testing.T) {
		t.Parallel()
		for _, bad := range []string{"", "[]", "{}", `{"keys":null}`, `{"keys":{}}`, `{"keys":[],"keys":[]}`, `{"keys":[]} {}`, strings.Repeat(" ", 1<<20+1)} {
			if keys, err := ca.ParseJWTBundle([]byte(bad)); err == nil {
				t.Errorf("%.40q is accepted as %v", bad, keys)
			}
		}
		if keys, err := ca.ParseJWTBundle([]byte(`{"keys":[]}`)); err != nil || keys == nil || len(keys) != 0 {
			t.Errorf("a bundle that trusts nothing: %v, %v", keys, err)
		}
	})
	t.Run("B-5, J-7", func(t *testing.T) {
		t.Parallel()
		private, err := jose.JSONWebKey{Key: key, KeyID: "private", Use: "jwt-svid"}.MarshalJSON()
		var secret map[string]any
		if err == nil {
			err = json.Unmarshal(private, &secret)
		}
		if err != nil {
			t.Fatal(err)
		}
		useless := []map[string]any{
			element(map[string]any{"kid": "a", "kty": "PQC"}), element(map[string]any{"kid": "b", "use": nil}), element(map[string]any{"kid": "c", "use": "JWT-SVID"}),
			element(map[string]any{"kid": "d", "use": "x509-svid"}), element(map[string]any{"kid": nil}), element(map[string]any{"kid": ""}), element(map[string]any{"kid": 7}),
			element(map[string]any{"kid": "e", "x": "AA"}), element(map[string]any{"kid": strings.Repeat("f", 257)}), secret, {"kty": "oct", "k": "AAAA", "kid": "g", "use": "jwt-svid"}, {},
		}
		keys, err := ca.ParseJWTBundle(bundle(append(useless, element(nil))...))
		if err != nil || len(keys) != 1 || keys["k"] == nil {
			t.Errorf("got %v, %v; want the one good key", keys, err)
		}
	})
}

// The algorithms that others may sign with.
func TestJWTAlgorithms(t *testing.T) {
	t.Parallel()
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for algorithm, curve := range map[jose.SignatureAlgorithm]elliptic.Curve{
		jose.RS256: nil, jose.RS512: nil, jose.PS384: nil, jose.ES256: elliptic.P256(), jose.ES384: elliptic.P384(), jose.ES512: elliptic.P521(),
	} {
		var key any = small
		var public any = small.Public()
		if curve != nil {
			one, err := ecdsa.GenerateKey(curve, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			key, public = one, one.Public()
		}
		f := forger{now: time.Now()}
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign(mustJSON(t, f.claims(nil)))
		if err != nil {
			t.Fatal(err)
		}
		token, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		_, err = ca.VerifyJWT(token, "billing", f.now, func(spiffeid.TrustDomain) ca.JWTKeys { return ca.JWTKeys{"k": public} })
		if err != nil {
			t.Errorf("%s: %v", algorithm, err)
		}
	}
}

// Whatever is verified, it is refused or means exactly what it says.
func FuzzJWT(f *testing.F) {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), append(make([]byte, 31), 7))
	if err != nil {
		f.Fatal(err)
	}
	forge := forger{key, time.Unix(1_800_000_000, 0)}
	f.Add(forge.token(f, nil, nil), "billing")
	f.Add(forge.token(f, map[string]any{"typ": nil}, map[string]any{"aud": []string{"a", "b"}}), "b")
	f.Fuzz(func(t *testing.T, token, audience string) {
		id, err := ca.VerifyJWT(token, audience, forge.now, forge.keys)
		if err != nil {
			return
		}
		if id.ID.String() != part(t, token, 1)["sub"] || !id.Expiry.After(forge.now) {
			t.Errorf("%q is taken for %s until %v", token, id.ID, id.Expiry)
		}
	})
}

func FuzzJWTBundle(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"EC","use":"jwt-svid","kid":"k","crv":"P-256","x":"AA","y":"AA"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if keys, err := ca.ParseJWTBundle(text); err == nil && keys == nil {
			t.Error("neither keys nor an error")
		}
	})
}
