// SPDX-License-Identifier: Apache-2.0

package attest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// clusters is a fixed set of joined clusters.
type clusters []attest.ClusterKeys

func (c clusters) Keys(context.Context) ([]attest.ClusterKeys, error) { return c, nil }

func joined(c *catest.Cluster, name string) attest.ClusterKeys {
	return attest.ClusterKeys{ClusterID: c.UID, Name: name, Issuer: catest.Issuer, JWKS: c.JWKS()}
}

// registry is a fixed answer for each instance; Known for what is not listed.
type registry map[string]attest.Workload

func (r registry) Workload(_ context.Context, _ ca.Source, instance string) (attest.Workload, error) {
	if w, ok := r[instance]; ok {
		return w, nil
	}
	return attest.Workload{Presence: attest.Known}, nil
}

// joinTokens is one token, good once.
type joinTokens struct {
	mu    sync.Mutex
	token string
	what  ca.JoinToken
	spent bool
}

func (j *joinTokens) Read(_ context.Context, token string) (ca.JoinToken, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if token != j.token || j.spent {
		return ca.JoinToken{}, ca.ErrJoinToken
	}
	return j.what, nil
}

func (j *joinTokens) Spend(ctx context.Context, token string) error {
	if _, err := j.Read(ctx, token); err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.spent = true
	return nil
}

func attestor(t testing.TB, cfg attest.Config) *attest.Attestor {
	t.Helper()
	if cfg.Authority == nil {
		cfg.Authority = catest.New(t).Authority
	}
	a, err := attest.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// The cluster is the one whose key verifies the token, although the issuer string is the same in all of them.
func TestClusterIsTheOneWhoseKeyVerifies(t *testing.T) {
	t.Parallel()
	east, west, stranger := catest.NewCluster(t, "east-uid"), catest.NewCluster(t, "west-uid"), catest.NewCluster(t, "stranger")
	a := attestor(t, attest.Config{Clusters: clusters{joined(east, "east"), joined(west, "west")}})
	for _, test := range []struct {
		of     *catest.Cluster
		hint   string
		source ca.Source // empty: refused
	}{
		{east, "", "kube:east-uid"},
		{west, "", "kube:west-uid"},
		{west, "west", "kube:west-uid"},
		{west, "west-uid", "kube:west-uid"},
		{west, "Kubernetes", "kube:west-uid"}, // what Istio's agent says by default
		{west, "east", ""},
		{west, "east-uid", ""},
		{stranger, "", ""},
		{stranger, "east", ""},
	} {
		id, err := a.Authenticate(t.Context(), attest.Evidence{
			Bearer: test.of.Token(t, "shop", "reviews", "reviews-0", "uid-0"), ClusterHint: test.hint,
		})
		if test.source == "" {
			if !errors.Is(err, attest.ErrCredential) {
				t.Errorf("token of %s, hint %q: %v, want ErrCredential", test.of.UID, test.hint, err)
			}
			continue
		}
		want := ca.Subject{Source: test.source, Instance: "uid-0", Namespace: "shop", ServiceAccount: "reviews"}
		if err != nil || id.Subject != want || id.Pod != "reviews-0" {
			t.Errorf("token of %s, hint %q: %+v, %v; want %+v", test.of.UID, test.hint, id, err, want)
		}
	}
}

// Whoever keeps the keys of clusters hears of a token of a key that none of them has, and of no other.
func TestUnknownKeysAreTold(t *testing.T) {
	t.Parallel()
	east, stranger := catest.NewCluster(t, "east-uid"), catest.NewCluster(t, "stranger")
	a := attestor(t, attest.Config{Clusters: clusters{joined(east, "east")}})
	told := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	known := east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	for _, test := range []struct {
		what, token string
		want        bool
	}{
		{"a good token", known, false},
		{"one with a broken signature", known[:len(known)-4] + "AAAA", false},
		{"no token", "x.y.z", false},
		{"a token of a key nobody has", stranger.Token(t, "shop", "reviews", "reviews-0", "uid-0"), true},
	} {
		next := a.UnknownKeys()
		a.Authenticate(t.Context(), attest.Evidence{Bearer: test.token})
		if got := told(next); got != test.want {
			t.Errorf("%s: told %v, want %v", test.what, got, test.want)
		}
	}
}

// A claim that is missing, wrong or too weak (A10, A11).
func TestTokenClaims(t *testing.T) {
	t.Parallel()
	cluster := catest.NewCluster(t, "c1")
	now := time.Now()
	kubernetes := func(change func(map[string]any)) func(map[string]any) {
		return func(c map[string]any) {
			k := maps.Clone(c["kubernetes.io"].(map[string]any))
			change(k)
			c["kubernetes.io"] = k
		}
	}
	set := func(name string, value any) func(map[string]any) { return func(c map[string]any) { c[name] = value } }
	for name, test := range map[string]struct {
		change func(map[string]any)
		istio  bool // the cluster opted in
		ok     bool
	}{
		"as it is":                     {func(map[string]any) {}, false, true},
		"audience as a string":         {set("aud", "isthmus-ca"), false, true},
		"one of two audiences":         {set("aud", []string{"other", "isthmus-ca"}), false, true},
		"default audience":             {set("aud", []string{catest.Issuer}), false, false},
		"no audience":                  {set("aud", nil), false, false},
		"Istio's audience":             {set("aud", []string{"istio-ca"}), false, false},
		"Istio's audience, opted in":   {set("aud", []string{"istio-ca"}), true, true},
		"another issuer":               {set("iss", "https://evil.test"), false, false},
		"expired":                      {set("exp", now.Add(-2*time.Minute).Unix()), false, false},
		"expired within the leeway":    {set("exp", now.Add(-30*time.Second).Unix()), false, true},
		"not yet":                      {set("nbf", now.Add(2*time.Minute).Unix()), false, false},
		"not yet, within the leeway":   {set("nbf", now.Add(30*time.Second).Unix()), false, true},
		"endless":                      {set("exp", nil), false, false},
		"an exp that is text":          {set("exp", "tomorrow"), false, false},
		"not bound to a pod":           {kubernetes(func(k map[string]any) { delete(k, "pod") }), false, false},
		"no pod UID":                   {kubernetes(func(k map[string]any) { k["pod"] = map[string]any{"name": "x"} }), false, false},
		"no pod name":                  {kubernetes(func(k map[string]any) { k["pod"] = map[string]any{"uid": "uid-0"} }), false, false},
		"no account UID":               {kubernetes(func(k map[string]any) { k["serviceaccount"] = map[string]any{"name": "reviews"} }), false, false},
		"no namespace":                 {kubernetes(func(k map[string]any) { k["namespace"] = "" }), false, false},
		"a subject of another account": {set("sub", "system:serviceaccount:shop:admin"), false, false},
		"an account that is a path": {func(c map[string]any) {
			c["sub"] = "system:serviceaccount:shop:../admin"
			kubernetes(func(k map[string]any) { k["serviceaccount"] = map[string]any{"name": "../admin", "uid": "u"} })(c)
		}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			keys := joined(cluster, "c1")
			keys.IstioAudience = test.istio
			a := attestor(t, attest.Config{Clusters: clusters{keys}})
			claims := cluster.Claims("shop", "reviews", "reviews-0", "uid-0", now)
			test.change(claims)
			id, err := a.Authenticate(t.Context(), attest.Evidence{Bearer: cluster.Sign(t, claims, nil)})
			if test.ok && (err != nil || id.IstioAgent != test.istio) {
				t.Errorf("Authenticate = %+v, %v", id, err)
			}
			if !test.ok && !errors.Is(err, attest.ErrCredential) {
				t.Errorf("Authenticate = %v, want ErrCredential", err)
			}
		})
	}
}

// Tokens whose signature is none, or none that counts.
func TestTokenSignatures(t *testing.T) {
	t.Parallel()
	cluster := catest.NewCluster(t, "c1")
	a := attestor(t, attest.Config{Clusters: clusters{joined(cluster, "c1")}})
	good := cluster.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	parts := strings.Split(good, ".")
	b64 := base64.RawURLEncoding.EncodeToString
	secret, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: cluster.JWKS()},
		&jose.SignerOptions{ExtraHeaders: map[jose.HeaderKey]any{"kid": cluster.KeyID}})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	shared, err := secret.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	hs256, err := shared.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{
		"alg none":            b64([]byte(`{"alg":"none","kid":"`+cluster.KeyID+`"}`)) + "." + parts[1] + ".",
		"alg HS256":           hs256,
		"no signature":        parts[0] + "." + parts[1] + ".",
		"another payload":     parts[0] + "." + b64([]byte(strings.Replace(string(payload), "reviews", "admin", 1))) + "." + parts[2],
		"kid that is a list":  b64([]byte(`{"alg":"ES256","kid":["x"]}`)) + "." + parts[1] + "." + parts[2],
		"no kid":              b64([]byte(`{"alg":"ES256"}`)) + "." + parts[1] + "." + parts[2],
		"JSON serialisation":  shared.FullSerialize(),
		"too long":            good + strings.Repeat("A", 17<<10),
		"garbage":             "hello",
		"unknown critical":    cluster.Sign(t, cluster.Claims("shop", "reviews", "r", "u", time.Now()), map[string]any{"crit": []string{"x"}, "x": 1}),
		"two tokens in a row": good + "." + good,
	} {
		if _, err := a.Authenticate(t.Context(), attest.Evidence{Bearer: token}); !errors.Is(err, attest.ErrCredential) {
			t.Errorf("%s: Authenticate = %v, want ErrCredential", name, err)
		}
	}
	twin := joined(cluster, "twin")
	twin.ClusterID = "c2"
	ambiguous := attestor(t, attest.Config{Clusters: clusters{joined(cluster, "c1"), twin}})
	if _, err := ambiguous.Authenticate(t.Context(), attest.Evidence{Bearer: good}); !errors.Is(err, attest.ErrCredential) {
		t.Errorf("two clusters with one key: %v, want ErrCredential", err)
	}
}

// A10: a token of our agent is worth nothing with another key than the one it came with first.
func TestAttackA10TokenReplay(t *testing.T) {
	t.Parallel()
	cluster := catest.NewCluster(t, "c1")
	keys := joined(cluster, "c1")
	keys.IstioAudience = true
	a := attestor(t, attest.Config{Clusters: clusters{keys}})
	commit := func(bearer, key string) error {
		t.Helper()
		att, err := a.Attest(t.Context(), attest.Evidence{Bearer: bearer})
		if err != nil {
			t.Fatal(err)
		}
		return att.Commit(t.Context(), key)
	}
	token := cluster.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	if err := commit(token, "key-1"); err != nil {
		t.Fatal(err)
	}
	if err := commit(token, "key-1"); err != nil {
		t.Errorf("the same key again: %v", err)
	}
	if err := commit(token, "key-2"); !errors.Is(err, attest.ErrReplayed) {
		t.Errorf("another key: %v, want ErrReplayed", err)
	}
	if err := commit(cluster.Token(t, "shop", "reviews", "reviews-0", "uid-1"), "key-2"); err != nil {
		t.Errorf("another token: %v", err)
	}
	claims := cluster.Claims("shop", "reviews", "reviews-0", "uid-0", time.Now())
	claims["aud"] = []string{attest.IstioAudience}
	istio := cluster.Sign(t, claims, nil)
	for _, key := range []string{"key-3", "key-4"} {
		if err := commit(istio, key); err != nil {
			t.Errorf("Istio's agent with a new key: %v", err)
		}
	}
}

func TestPresenceDecides(t *testing.T) {
	t.Parallel()
	cluster := catest.NewCluster(t, "c1")
	for name, test := range map[string]struct {
		workload attest.Workload
		want     error
		limit    time.Duration
	}{
		"known":                {attest.Workload{Presence: attest.Known, Namespace: "shop", ServiceAccount: "reviews"}, nil, 0},
		"known by name only":   {attest.Workload{Presence: attest.Known}, nil, 0},
		"known as another":     {attest.Workload{Presence: attest.Known, Namespace: "shop", ServiceAccount: "admin"}, attest.ErrCredential, 0},
		"known elsewhere":      {attest.Workload{Presence: attest.Known, Namespace: "other"}, attest.ErrCredential, 0},
		"deleted":              {attest.Workload{Presence: attest.Deleted}, attest.ErrGone, 0},
		"its cluster is away":  {attest.Workload{Presence: attest.Away}, nil, time.Hour},
		"not heard of in time": {attest.Workload{Presence: attest.Unknown}, attest.ErrUnknown, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := attestor(t, attest.Config{
				Clusters: clusters{joined(cluster, "c1")}, Workloads: registry{"uid-0": test.workload}, Wait: 100 * time.Millisecond,
			})
			id, err := a.Authenticate(t.Context(), attest.Evidence{Bearer: cluster.Token(t, "shop", "reviews", "reviews-0", "uid-0")})
			if !errors.Is(err, test.want) || id.LifetimeLimit != test.limit {
				t.Errorf("Authenticate = limit %v, %v; want %v, %v", id.LifetimeLimit, err, test.limit, test.want)
			}
		})
	}
}

// A registry never hears of a workload outside the grant of its cluster, and nobody waits for it.
func TestOutsideTheGrant(t *testing.T) {
	t.Parallel()
	cluster := catest.NewCluster(t, "c1")
	a := attestor(t, attest.Config{
		Authority: catest.New(t, func(c *ca.Config) {
			c.Grants = ca.GrantFunc(func(_ ca.Source, namespace, _ string) error {
				if namespace == "kube-system" {
					return errors.New("namespace kube-system is not in the grant")
				}
				return nil
			})
		}).Authority,
		Clusters: clusters{joined(cluster, "c1")}, Workloads: registry{}, Wait: time.Hour,
	})
	_, err := a.Authenticate(t.Context(), attest.Evidence{Bearer: cluster.Token(t, "kube-system", "intruder", "intruder-0", "uid-0")})
	if !errors.Is(err, ca.ErrNotGranted) {
		t.Errorf("Authenticate = %v, want ErrNotGranted", err)
	}
}

// lateRegistry knows everybody from a moment on.
type lateRegistry struct{ from time.Time }

func (r lateRegistry) Workload(context.Context, ca.Source, string) (attest.Workload, error) {
	if time.Now().Before(r.from) {
		return attest.Workload{Presence: attest.Unknown}, nil
	}
	return attest.Workload{Presence: attest.Known}, nil
}

// A pod is quicker than the news of it: it waits, and not longer than it must.
func TestPodWaitsForItsRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := catest.NewCluster(t, "c1")
		start := time.Now()
		a := attestor(t, attest.Config{
			Clusters: clusters{joined(cluster, "c1")}, Workloads: lateRegistry{start.Add(3 * time.Second)},
		})
		_, err := a.Authenticate(t.Context(), attest.Evidence{Bearer: cluster.Token(t, "shop", "reviews", "reviews-0", "uid-0")})
		if waited := time.Since(start); err != nil || waited < 3*time.Second || waited > 4*time.Second {
			t.Errorf("after %v: %v; want success after 3 s", waited, err)
		}
	})
}

func TestRenewalByCertificate(t *testing.T) {
	t.Parallel()
	authority := catest.New(t)
	a := attestor(t, attest.Config{
		Authority: authority.Authority, Workloads: registry{"gone": {Presence: attest.Deleted}},
	})
	present := func(cert tls.Certificate) attest.Evidence { return attest.Evidence{Chain: parse(t, cert)} }
	pod := authority.Leaf(t, catest.Subject("kube:c1", "pod-1", "shop"))
	att, err := a.Attest(t.Context(), present(pod))
	if err != nil || att.Instance != "pod-1" || att.Source != "kube:c1" || att.Namespace != "shop" || att.Certificate == nil {
		t.Fatalf("Attest = %+v, %v", att.Identity, err)
	}
	for name, test := range map[string]struct {
		evidence attest.Evidence
		want     error
	}{
		"nothing":                          {attest.Evidence{}, attest.ErrCredential},
		"without its intermediate":         {attest.Evidence{Chain: present(pod).Chain[:1]}, attest.ErrCredential},
		"of another authority":             {present(catest.New(t).Leaf(t, catest.Subject("kube:c1", "pod-1", "shop"))), attest.ErrCredential},
		"of a deleted pod":                 {present(authority.Leaf(t, catest.Subject("kube:c1", "gone", "shop"))), attest.ErrGone},
		"of an administrator":              {present(authority.Admin(t)), attest.ErrCredential},
		"good, beside a token that is not": {attest.Evidence{Chain: present(pod).Chain, Bearer: "x.y.z"}, attest.ErrCredential},
	} {
		if _, err := a.Attest(t.Context(), test.evidence); !errors.Is(err, test.want) {
			t.Errorf("%s: Attest = %v, want %v", name, err, test.want)
		}
	}
	if id, err := a.Authenticate(t.Context(), present(authority.Admin(t))); err != nil || !id.Certificate.IsAdmin() {
		t.Errorf("Authenticate of an administrator = %v", err)
	}
	if err := authority.Revoke(t.Context(), "kube:c1", "pod-1", "offboard"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Attest(t.Context(), present(pod)); !errors.Is(err, ca.ErrRevoked) {
		t.Errorf("revoked: %v, want ErrRevoked", err)
	}
}

func TestJoinTokenIsSpentLast(t *testing.T) {
	t.Parallel()
	token, id, _ := ca.NewJoinToken()
	tokens := &joinTokens{token: token, what: ca.JoinToken{ID: id, Name: "web-1", Network: "n1", Namespace: "legacy", ServiceAccount: "web"}}
	a := attestor(t, attest.Config{JoinTokens: tokens})
	e := attest.Evidence{Bearer: token}
	if _, err := a.Authenticate(t.Context(), e); !errors.Is(err, attest.ErrCredential) {
		t.Errorf("a stream with a join token: %v, want ErrCredential", err)
	}
	att, err := a.Attest(t.Context(), e)
	if want := (ca.Subject{Source: "vm:n1", Instance: "web-1", Namespace: "legacy", ServiceAccount: "web"}); err != nil || att.Subject != want {
		t.Fatalf("Attest = %+v, %v", att.Subject, err)
	}
	if tokens.spent {
		t.Error("spent before Commit")
	}
	second, err := a.Attest(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	if err := att.Commit(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if err := second.Commit(t.Context(), "k"); !errors.Is(err, attest.ErrCredential) {
		t.Errorf("second Commit = %v, want ErrCredential", err)
	}
	if _, err := a.Attest(t.Context(), e); !errors.Is(err, attest.ErrCredential) || strings.Contains(fmt.Sprint(err), token) {
		t.Errorf("spent token: %v, want ErrCredential without the token", err)
	}
}

func parse(t testing.TB, cert tls.Certificate) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for _, der := range cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}
