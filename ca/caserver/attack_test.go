// SPDX-License-Identifier: Apache-2.0

package caserver_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// The lines of the table of attack classes whose guard is in this room, each against the running service. The
// guards test of package ca switches the guard of each off and sees that its test fails.

// A1: every method that the server has refuses whoever shows nothing, or something that proves nothing.
func TestAttackA01NothingIsAnonymous(t *testing.T) {
	t.Parallel()
	s := start(t)
	stranger := catest.New(t)
	methods := 0
	for service, info := range s.rpc.GetServiceInfo() {
		for _, method := range info.Methods {
			methods++
			for name, test := range map[string]struct {
				bearer       string
				certificates []tls.Certificate
			}{
				"nothing":                        {},
				"a token of nobody":              {bearer: "a.b.c"},
				"a token of a stranger":          {bearer: catest.NewCluster(t, "stranger").Token(t, "shop", "a", "p", "u")},
				"a certificate of somebody else": {certificates: []tls.Certificate{stranger.Leaf(t, catest.Subject(s.east.Source(), "p", "shop"))}},
			} {
				a := s.dial(t, test.certificates...)
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // a stream that was let in would not end
				defer cancel()
				if test.bearer != "" {
					ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+test.bearer)
				}
				in := &security.IstioCertificateRequest{Csr: string(catest.CSR(t, a.key, nil))}
				err := a.conn.Invoke(ctx, "/"+service+"/"+method.Name, in, new(security.IstioCertificateResponse))
				if status.Code(err) != codes.Unauthenticated {
					t.Errorf("%s with %s: %v; want Unauthenticated", method.Name, name, err)
				}
			}
		}
	}
	if methods != 3 {
		t.Errorf("%d methods; is this test still right?", methods)
	}
}

// A2: what the caller says about itself chooses nothing; where it contradicts the credential, it is refused.
func TestAttackA02MetadataIsNoCredential(t *testing.T) {
	t.Parallel()
	s := start(t)
	token := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	for _, hint := range []string{"west", "west-uid"} {
		_, err := s.dial(t).ask(t, token, nil, "clusterid", hint)
		wantCode(t, err, codes.Unauthenticated, "")
	}
	a := s.dial(t)
	claims, err := structpb.NewStruct(map[string]any{"CLUSTER_ID": "west", "NAMESPACE": "legacy", "SERVICE_ACCOUNT": "admin", "CertSigner": "x"})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.send(t, token, &security.IstioCertificateRequest{Csr: string(catest.CSR(t, a.key, nil)), Metadata: claims}, "clusterid", "Kubernetes", "x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/admin")
	if err != nil || leaf.URIs[0].Path != "/ns/shop/sa/reviews" || leaf.Subject.OrganizationalUnit[0] != string(s.east.Source()) {
		t.Errorf("leaf %v, %v; want that of the token", leaf, err)
	}
}

// A3: the matrix. Whoever has a credential A asks for identity B over every interface there is; what comes out is
// A's own identity, inside its grant, or nothing.
func TestAttackA03IssuanceMatrix(t *testing.T) {
	t.Parallel()
	s := start(t)
	type holder struct {
		name    string
		subject ca.Subject
		bearer  func(namespace, account string) string // a credential of its own that says it is somebody; nil: it has none
	}
	pod := func(c *catest.Cluster) func(string, string) string {
		return func(ns, account string) string { return c.Token(t, ns, account, "p", "uid-"+ns+"-"+account) }
	}
	holders := []holder{
		{"a pod of east", ca.Subject{Source: s.east.Source(), Instance: "uid-e", Namespace: "shop", ServiceAccount: "reviews"}, pod(s.east)},
		{"a pod of west", ca.Subject{Source: s.west.Source(), Instance: "uid-w", Namespace: "legacy", ServiceAccount: "batch"}, pod(s.west)},
		{"a machine", ca.Subject{Source: "vm:n1", Instance: "web-1", Namespace: "legacy", ServiceAccount: "web"}, nil},
	}
	targets := []ca.Subject{
		{Namespace: "shop", ServiceAccount: "reviews"}, {Namespace: "legacy", ServiceAccount: "batch"}, {Namespace: "legacy", ServiceAccount: "web"},
		{Namespace: "kube-system", ServiceAccount: "default"}, {Namespace: ca.ControlNamespace, ServiceAccount: ca.ControlAccount},
		{Namespace: ca.ControlNamespace, ServiceAccount: ca.AdminAccount}, {Namespace: ca.ControlNamespace, ServiceAccount: "isthmus-eastwestgateway"},
	}
	for _, h := range holders {
		for n, want := range targets {
			h.subject.Instance = fmt.Sprint("uid-", n) // one workload gets only so many
			renewing := s.Leaf(t, h.subject)
			id := "spiffe://cluster.local/ns/" + want.Namespace + "/sa/" + want.ServiceAccount
			uri, err := url.Parse(id)
			if err != nil {
				t.Fatal(err)
			}
			impersonate, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": id})
			if err != nil {
				t.Fatal(err)
			}
			own := h.subject.Namespace == want.Namespace && h.subject.ServiceAccount == want.ServiceAccount
			check := func(how string, allowed bool, leaf *x509.Certificate, err error) {
				t.Helper()
				switch {
				case (err == nil) != allowed:
					t.Errorf("%s as %s, %s: %v; want allowed %v", h.name, id, how, err, allowed)
				case err == nil && (leaf.URIs[0].String() != id || leaf.Subject.OrganizationalUnit[0] != string(h.subject.Source)):
					t.Errorf("%s as %s, %s: got %v of %v", h.name, id, how, leaf.URIs, leaf.Subject)
				}
			}
			a := s.dial(t, renewing)
			leaf, err := a.ask(t, "", &x509.CertificateRequest{URIs: []*url.URL{uri}})
			check("by renewal", own, leaf, err)
			csr := &security.IstioCertificateRequest{Csr: string(catest.CSR(t, a.key, nil)), Metadata: impersonate}
			leaf, err = a.send(t, "", csr)
			check("on somebody's behalf", false, leaf, err)
			if h.bearer != nil {
				leaf, err = s.dial(t).ask(t, h.bearer(want.Namespace, want.ServiceAccount), nil)
				check("by a token of its own cluster", s.Allows(h.subject.Source, want.Namespace, "") == nil, leaf, err)
			}
		}
	}
}

// A5 over the wire: names come from the credential.
func TestAttackA05ForeignNames(t *testing.T) {
	t.Parallel()
	s := start(t)
	own, err := url.Parse("spiffe://cluster.local/ns/shop/sa/reviews")
	if err != nil {
		t.Fatal(err)
	}
	other, err := url.Parse("spiffe://cluster.local/ns/shop/sa/admin")
	if err != nil {
		t.Fatal(err)
	}
	for name, csr := range map[string]*x509.CertificateRequest{
		"another identity":   {URIs: []*url.URL{other}},
		"two identities":     {URIs: []*url.URL{own, other}},
		"a wildcard":         {DNSNames: []string{"*"}},
		"an address":         {IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}},
		"an email address":   {EmailAddresses: []string{"root@cluster.local"}},
		"its own and a name": {URIs: []*url.URL{own}, DNSNames: []string{"payments"}},
	} {
		_, err := s.dial(t).ask(t, s.east.Token(t, "shop", "reviews", "r", "uid-"+fmt.Sprintf("%x", name)[:8]), csr)
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v; want PermissionDenied", name, err)
		}
	}
}

// A6: another authority that signs our names is nobody, whatever chain it brings along.
func TestAttackA06ForeignRootSignsOurNames(t *testing.T) {
	t.Parallel()
	s, foreign := start(t), catest.New(t)
	forged := foreign.Leaf(t, ca.Subject{Source: s.east.Source(), Instance: "uid-0", Namespace: "shop", ServiceAccount: "reviews"})
	forged.Certificate = append(forged.Certificate, foreign.Bundle().Roots[0].Raw)
	_, err := s.dial(t, forged).ask(t, "", nil)
	wantCode(t, err, codes.Unauthenticated, "credential not accepted")
}

// A11: a token that was made for somebody else than this service.
func TestAttackA11AudienceDowngrade(t *testing.T) {
	t.Parallel()
	s := start(t)
	for name, audience := range map[string]any{
		"the API server's": []string{catest.Issuer}, "none": nil, "an empty list": []string{}, "a similar one": "isthmus-ca2", "Istio's": "istio-ca",
	} {
		claims := s.east.Claims("shop", "reviews", "reviews-0", "uid-0", time.Now())
		claims["aud"] = audience
		_, err := s.dial(t).ask(t, s.east.Sign(t, claims, nil), nil)
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v; want Unauthenticated", name, err)
		}
	}
}

// A12: what is used is what was verified: a second payload beside the signed one counts for nothing.
func TestAttackA12OnlyVerifiedBytesCount(t *testing.T) {
	t.Parallel()
	s := start(t)
	good := strings.Split(s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0"), ".")
	admin := strings.Split(s.east.Token(t, "shop", "admin", "admin-0", "uid-1"), ".")
	b64 := base64.RawURLEncoding.EncodeToString
	full, err := json.Marshal(map[string]string{"payload": admin[1], "protected": good[0], "signature": good[2]})
	if err != nil {
		t.Fatal(err)
	}
	forged := strings.Replace(mustDecode(t, good[1]), `"reviews"`, `"admin"`, 1)
	for name, token := range map[string]string{
		"another token's payload":    good[0] + "." + admin[1] + "." + good[2],
		"an edited payload":          good[0] + "." + b64([]byte(forged)) + "." + good[2],
		"two payloads":               good[0] + "." + good[1] + "." + good[2] + "." + admin[1],
		"as JSON":                    string(full),
		"a key in its own header":    b64([]byte(`{"alg":"ES256","kid":"x","jwk":{}}`)) + "." + admin[1] + "." + admin[2],
		"a signature that is cut":    good[0] + "." + good[1] + "." + good[2][:20],
		"an address of keys to load": b64([]byte(`{"alg":"ES256","kid":"x","jku":"https://evil.test/"}`)) + "." + admin[1] + "." + admin[2],
	} {
		leaf, err := s.dial(t).ask(t, token, nil)
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: leaf %v, %v; want Unauthenticated", name, leaf, err)
		}
	}
}

func mustDecode(t *testing.T, part string) string {
	t.Helper()
	out, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// A14: when the keys of the clusters cannot be had, or are none, nothing is believed; there are no built-in ones.
func TestAttackA14NoKeysNoBelief(t *testing.T) {
	t.Parallel()
	s := start(t)
	secret := []byte("isthmus-default-key-isthmus-default-key")
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: secret}, &jose.SignerOptions{ExtraHeaders: map[jose.HeaderKey]any{"kid": "k"}})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(s.east.Claims("shop", "reviews", "reviews-0", "uid-0", time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	shared, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	octet := fmt.Sprintf(`{"keys":[{"kty":"oct","kid":"k","k":%q}]}`, base64.RawURLEncoding.EncodeToString(secret))
	tokens := []string{s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0"), shared}
	for name, jwks := range map[string]string{"empty": "", "no JSON": "hello", "no keys": `{"keys":[]}`, "a shared secret": octet, "a key without a name": `{"keys":[{"kty":"EC"}]}`} {
		s.jwks.Store(&jwks)
		for _, token := range tokens {
			_, err := s.dial(t).ask(t, token, nil)
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("keys %s: %v; want Unauthenticated", name, err)
			}
		}
	}
	s.jwks.Store(nil)
	s.away.Store(true)
	_, err = s.dial(t).ask(t, tokens[0], nil)
	wantCode(t, err, codes.Unavailable, "not available")
	s.away.Store(false)
	if _, err := s.dial(t).ask(t, tokens[0], nil); err != nil {
		t.Errorf("with its keys: %v", err)
	}
}

// locked is a log that several goroutines write.
type locked struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// A16, A37: no token, no key and no signature of one is in the audit log, the log, an error, or the state.
func TestAttackA16SecretsStaySecret(t *testing.T) {
	t.Parallel()
	logs := new(locked)
	log := slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := startLogging(t, log, func(c *ca.Config) { c.Log = log })
	var answers strings.Builder
	say := func(_ *x509.Certificate, err error) { fmt.Fprintln(&answers, err) }
	good, bad := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0"), s.east.Token(t, "legacy", "reviews", "reviews-0", "uid-1")
	spent := s.tokens.token
	for _, token := range []string{good, bad, spent, spent, "isthmus-vm.0011223344556677.c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I", good + "x"} {
		say(s.dial(t).ask(t, token, nil))
		say(s.dial(t).ask(t, token, &x509.CertificateRequest{DNSNames: []string{"evil"}}))
	}
	s.panics.Store(true)
	say(s.dial(t).ask(t, good, nil))
	s.panics.Store(false)
	audit, err := os.ReadFile(s.AuditPath)
	if err != nil {
		t.Fatal(err)
	}
	state, err := s.State.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var values bytes.Buffer
	for _, e := range state {
		values.WriteString(e.Key)
		values.Write(e.Value)
	}
	places := map[string]string{"the audit log": string(audit), "the log": logs.text.String(), "the answers": answers.String(), "the state": values.String()}
	canaries := map[string]string{
		"a token": good, "the payload of a token": strings.Split(good, ".")[1], "the signature of a token": strings.Split(good, ".")[2],
		"a refused token": strings.Split(bad, ".")[2], "a join token": spent, "the secret of a join token": strings.Split(spent, ".")[2],
		"a private key": "PRIVATE KEY",
	}
	for place, text := range places {
		for what, canary := range canaries {
			if strings.Contains(text, canary) {
				t.Errorf("%s is in %s", what, place)
			}
		}
	}
	if !strings.Contains(places["the log"], "panic") || len(audit) < 2000 {
		t.Error("nothing was written: is this test still right?")
	}
}

// A21: whatever a handler trips over, the server goes on.
func TestAttackA21PanicIsContained(t *testing.T) {
	t.Parallel()
	s := start(t)
	token := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	s.panics.Store(true)
	for range 3 {
		_, err := s.dial(t).ask(t, token, nil)
		wantCode(t, err, codes.Internal, "internal error")
	}
	s.panics.Store(false)
	if _, err := s.dial(t).ask(t, token, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A22: what costs more than it should is refused before it costs.
func TestAttackA22Oversized(t *testing.T) {
	t.Parallel()
	s := start(t)
	istio := s.west.Claims("legacy", "web", "web-0", "uid-i", time.Now())
	istio["aud"] = []string{attest.IstioAudience} // RSA keys are its only
	token := s.west.Sign(t, istio, nil)
	for _, bits := range []int{1024, 8192} {
		a := s.dial(t)
		_, err := a.send(t, token, &security.IstioCertificateRequest{Csr: string(rsaRequest(t, bits))})
		wantCode(t, err, codes.InvalidArgument, fmt.Sprintf("RSA key of %d bits", bits))
	}
	a := s.dial(t)
	_, err := a.send(t, token, &security.IstioCertificateRequest{Csr: strings.Repeat("A", ca.MaxCSR+1)})
	wantCode(t, err, codes.InvalidArgument, "at most")
	_, err = a.ask(t, token+strings.Repeat("A", 17<<10), nil)
	if status.Code(err) == codes.OK {
		t.Error("a token of 17 kB is accepted")
	}
}

// rsaRequest is a certificate request for a key of that size. A large one takes long to make, so nobody has its
// private half; its signature must never be looked at.
func rsaRequest(t *testing.T, bits int) []byte {
	t.Helper()
	if bits <= 4096 {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return catest.CSR(t, key, nil)
	}
	spki, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), bits-1, 1), E: 65537})
	if err != nil {
		t.Fatal(err)
	}
	type info struct {
		Version         int
		Subject, Public asn1.RawValue
		Attributes      []asn1.RawValue `asn1:"tag:0"`
	}
	der, err := asn1.Marshal(struct {
		Info      info
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		info{Subject: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Public: asn1.RawValue{FullBytes: spki}},
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue},
		asn1.BitString{Bytes: make([]byte, bits/8), BitLength: bits},
	})
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// A24: nothing is resumed, so that whoever was cut off meanwhile does not come back by an old session.
func TestAttackA24Resumption(t *testing.T) {
	t.Parallel()
	s := start(t)
	subject := ca.Subject{Source: s.east.Source(), Instance: "uid-0", Namespace: "shop", ServiceAccount: "reviews"}
	cfg := s.ClientTLS(s.Leaf(t, subject))
	cfg.ClientSessionCache, cfg.ServerName, cfg.NextProtos = tls.NewLRUClientSessionCache(4), "meshd.example", []string{"h2"}
	for range 3 {
		conn, err := tls.Dial("tcp", s.address, cfg)
		if err != nil {
			t.Fatal(err)
		}
		// A ticket comes with the first bytes of the server.
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		conn.Close()
	}
}

// A28: names that one reader takes for another are not made into certificates at all.
func TestAttackA28NamesThatReadDifferently(t *testing.T) {
	t.Parallel()
	s := start(t)
	for _, account := range []string{"reviews\x00.evil", "Reviews", "../admin", "reviews/", "a%2fb", "re views", "*", "ревьюс", "reviews\n", strings.Repeat("a", 254)} {
		leaf, err := s.dial(t).ask(t, s.east.Token(t, "shop", account, "p", "uid-0"), nil)
		if err == nil {
			t.Errorf("account %q: got %v", account, leaf.URIs)
		}
	}
	for _, pod := range []string{"uid\x00", "u/../v", "u,OU=meshd", strings.Repeat("u", 65)} {
		if leaf, err := s.dial(t).ask(t, s.east.Token(t, "shop", "reviews", "p", pod), nil); err == nil {
			t.Errorf("pod %q: got %v", pod, leaf.Subject)
		}
	}
}

// A32: a compromised cluster is cut off: no token, no renewal, and nobody else notices.
func TestAttackA32CompromisedCluster(t *testing.T) {
	t.Parallel()
	s := start(t)
	owned := s.dial(t, s.Leaf(t, ca.Subject{Source: s.east.Source(), Instance: "uid-0", Namespace: "shop", ServiceAccount: "reviews"}))
	other := s.dial(t, s.Leaf(t, ca.Subject{Source: s.west.Source(), Instance: "uid-w", Namespace: "legacy", ServiceAccount: "web"}))
	if _, err := owned.ask(t, "", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Revoke(t.Context(), s.east.Source(), "", "broken into"); err != nil {
		t.Fatal(err)
	}
	_, err := owned.ask(t, "", nil)
	wantCode(t, err, codes.PermissionDenied, "revoked")
	_, err = s.dial(t).ask(t, s.east.Token(t, "shop", "reviews", "reviews-1", "uid-1"), nil)
	wantCode(t, err, codes.PermissionDenied, "revoked")
	if _, err := other.ask(t, "", nil); err != nil {
		t.Errorf("another cluster: %v", err)
	}
}

// A36: a disk that is full is said to be, and nothing is issued.
func TestAttackA36DiskFull(t *testing.T) {
	t.Parallel()
	full := &fullAudit{}
	s := start(t, func(c *ca.Config) { full.Audit, c.Audit = c.Audit, full })
	token := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	a := s.dial(t)
	if _, err := a.ask(t, token, nil); err != nil {
		t.Fatal(err)
	}
	full.now.Store(true)
	_, err := a.ask(t, token, nil)
	wantCode(t, err, codes.Unavailable, "disk of meshd's audit log is full")
}

// fullAudit is on a disk that fills up.
type fullAudit struct {
	ca.Audit
	now atomic.Bool
}

func (f *fullAudit) Append(e ca.AuditEntry) error {
	if f.now.Load() {
		return fmt.Errorf("%w: %w", ca.ErrAudit, syscall.ENOSPC)
	}
	return f.Audit.Append(e)
}

// A39: a machine whose clock is late by less than a minute believes a new certificate at once.
func TestAttackA39SkewedClock(t *testing.T) {
	t.Parallel()
	s := start(t)
	leaf, err := s.dial(t).ask(t, s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if late := time.Now().Add(-50 * time.Second); leaf.NotBefore.After(late) {
		t.Errorf("valid from %v; a clock that is 50 s late refuses it", leaf.NotBefore)
	}
	for name, test := range map[string]struct {
		claim string
		at    time.Duration
		ok    bool
	}{
		"a token that began in 50 s": {"nbf", 50 * time.Second, true},
		"one that begins in 5 min":   {"nbf", 5 * time.Minute, false},
		"one that ended 50 s ago":    {"exp", -50 * time.Second, true},
		"one that ended 5 min ago":   {"exp", -5 * time.Minute, false},
	} {
		claims := maps.Clone(s.east.Claims("shop", "reviews", "reviews-0", "uid-"+fmt.Sprintf("%x", name[:12]), time.Now()))
		claims[test.claim] = time.Now().Add(test.at).Unix()
		if _, err := s.dial(t).ask(t, s.east.Sign(t, claims, nil), nil); (err == nil) != test.ok {
			t.Errorf("%s: %v; want ok %v", name, err, test.ok)
		}
	}
}
