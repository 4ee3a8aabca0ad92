// SPDX-License-Identifier: Apache-2.0

package caserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/caserver"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"
)

// service is meshd's certificate service on loopback, with two joined clusters of one issuer string: east may
// host the namespace shop, west the namespace legacy, and west has opted in to Istio's agent.
type service struct {
	*catest.CA
	east, west *catest.Cluster
	tokens     *onceTokens
	panics     atomic.Bool
	away       atomic.Bool            // the clusters' keys cannot be read
	jwks       atomic.Pointer[string] // what is read for those of both clusters instead
	address    string
	rpc        *grpc.Server
	server     *caserver.Server
	jwt        *ca.JWTAuthority
}

// Keys implements attest.Clusters.
func (s *service) Keys(context.Context) ([]attest.ClusterKeys, error) {
	if s.panics.Load() {
		panic("as if a decoder had a bug")
	}
	if s.away.Load() {
		return nil, errors.New("as if the registry was not read yet")
	}
	east, west := s.east.JWKS(), s.west.JWKS()
	if instead := s.jwks.Load(); instead != nil {
		east, west = []byte(*instead), []byte(*instead)
	}
	return []attest.ClusterKeys{
		{ClusterID: s.east.UID, Name: "east", Issuer: catest.Issuer, JWKS: east},
		{ClusterID: s.west.UID, Name: "west", Issuer: catest.Issuer, JWKS: west, IstioAudience: true},
	}, nil
}

// Allows implements ca.Grants.
func (s *service) Allows(source ca.Source, namespace, _ string) error {
	if granted := map[ca.Source]string{s.east.Source(): "shop", s.west.Source(): "legacy", "vm:n1": "legacy"}; granted[source] == namespace {
		return nil
	}
	return errors.New("namespace not granted; see mesh clusters")
}

// onceTokens is one join token.
type onceTokens struct {
	token string
	what  ca.JoinToken
	spent atomic.Bool
}

func (o *onceTokens) Read(_ context.Context, token string) (ca.JoinToken, error) {
	if token != o.token || o.spent.Load() {
		return ca.JoinToken{}, ca.ErrJoinToken
	}
	return o.what, nil
}

func (o *onceTokens) Spend(_ context.Context, token string) error {
	if token != o.token || !o.spent.CompareAndSwap(false, true) {
		return ca.ErrJoinToken
	}
	return nil
}

func start(t testing.TB, options ...func(*ca.Config)) *service {
	t.Helper()
	return startLogging(t, slog.New(slog.DiscardHandler), options...)
}

func startLogging(t testing.TB, log *slog.Logger, options ...func(*ca.Config)) *service {
	t.Helper()
	s := &service{east: catest.NewCluster(t, "east-uid"), west: catest.NewCluster(t, "west-uid"), tokens: new(onceTokens)}
	s.CA = catest.New(t, append([]func(*ca.Config){func(c *ca.Config) { c.Grants = s }}, options...)...)
	var id string
	s.tokens.token, id, _ = ca.NewJoinToken()
	s.tokens.what = ca.JoinToken{ID: id, Name: "web-1", Network: "n1", Namespace: "legacy", ServiceAccount: "web"}
	attestor, err := attest.New(attest.Config{Authority: s.Authority, Clusters: s, JoinTokens: s.tokens})
	if err != nil {
		t.Fatal(err)
	}
	if s.jwt, err = ca.OpenJWT(t.Context(), s.Authority, ca.JWTConfig{}); err != nil {
		t.Fatal(err)
	}
	server, err := caserver.New(caserver.Config{Authority: s.Authority, Attestor: attestor, JWT: s.jwt, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	serving, err := caserver.NewServing(t.Context(), caserver.ServingConfig{
		Authority: s.Authority, Replica: "meshd-0", Names: []string{"meshd.example", "127.0.0.1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = listener.Addr().String()
	s.rpc = grpc.NewServer(grpc.Creds(credentials.NewTLS(serving.TLS())))
	s.server = server
	server.Register(s.rpc)
	go s.rpc.Serve(listener)
	t.Cleanup(s.rpc.Stop)
	return s
}

// asker is one workload's connection.
type asker struct {
	s    *service
	key  *ecdsa.PrivateKey
	conn *grpc.ClientConn
}

func (s *service) dial(t *testing.T, certificates ...tls.Certificate) *asker {
	t.Helper()
	conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(s.ClientTLS(certificates...))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &asker{s: s, key: catest.Key(t), conn: conn}
}

// ask gives the leaf, or the error.
func (a *asker) ask(t *testing.T, bearer string, template *x509.CertificateRequest, md ...string) (*x509.Certificate, error) {
	t.Helper()
	return a.send(t, bearer, &security.IstioCertificateRequest{Csr: string(catest.CSR(t, a.key, template)), ValidityDuration: 86400}, md...)
}

func (a *asker) send(t *testing.T, bearer string, in *security.IstioCertificateRequest, md ...string) (*x509.Certificate, error) {
	t.Helper()
	ctx := t.Context()
	if bearer != "" {
		md = append(md, "authorization", "Bearer "+bearer)
	}
	ctx = metadata.AppendToOutgoingContext(ctx, md...)
	out, err := security.NewIstioCertificateServiceClient(a.conn).CreateCertificate(ctx, in)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for _, text := range out.CertChain {
		block, rest := pem.Decode([]byte(text))
		if block == nil || len(rest) != 0 {
			t.Fatalf("an entry that is not one PEM certificate: %q", text)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, cert)
	}
	if len(certs) != 3 || !slices.ContainsFunc(a.s.Bundle().Roots, certs[2].Equal) {
		t.Fatalf("%d certificates; want leaf, intermediate, root", len(certs))
	}
	id, err := a.s.Verify(certs[:2])
	if err != nil {
		t.Fatal(err)
	}
	if err := certs[0].CheckSignatureFrom(certs[1]); err != nil {
		t.Fatal(err)
	}
	_ = id
	return certs[0], nil
}

func wantCode(t *testing.T, err error, want codes.Code, text string) {
	t.Helper()
	if status.Code(err) != want || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("got %v; want %v with %q", err, want, text)
	}
}

func TestPodGetsAndRenewsItsCertificate(t *testing.T) {
	t.Parallel()
	s := start(t)
	first := s.dial(t)
	leaf, err := first.ask(t, s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0"), nil, "clusterid", "east")
	if err != nil {
		t.Fatal(err)
	}
	if leaf.URIs[0].String() != "spiffe://cluster.local/ns/shop/sa/reviews" || leaf.Subject.SerialNumber != "uid-0" {
		t.Errorf("leaf of %v, %v", leaf.URIs, leaf.Subject)
	}
	again := s.dial(t, s.Leaf(t, ca.Subject{Source: s.east.Source(), Instance: "uid-0", Namespace: "shop", ServiceAccount: "reviews"}))
	renewed, err := again.ask(t, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if renewed.URIs[0].String() != leaf.URIs[0].String() || renewed.Subject.SerialNumber != "uid-0" {
		t.Errorf("renewed as %v, %v", renewed.URIs, renewed.Subject)
	}
	var methods []string
	for _, e := range s.AuditEntries(t) {
		if e.Event == ca.AuditIssued && e.Instance == "uid-0" {
			methods = append(methods, e.Method)
			if e.Credential == "" || e.Peer == "" {
				if e.Method != "test" {
					t.Errorf("audit line without credential or peer: %+v", e)
				}
			}
		}
	}
	if want := []string{attest.MethodKubernetes, "test", attest.MethodCertificate}; !slices.Equal(methods, want) {
		t.Errorf("audit log has %v, want %v", methods, want)
	}
}

func TestMachineJoinsOnceAndRenews(t *testing.T) {
	t.Parallel()
	s := start(t)
	vm := s.dial(t)
	// A request that is refused leaves the token unspent.
	_, err := vm.ask(t, s.tokens.token, &x509.CertificateRequest{DNSNames: []string{"evil"}})
	wantCode(t, err, codes.PermissionDenied, "another identity")
	leaf, err := vm.ask(t, s.tokens.token, nil)
	if err != nil {
		t.Fatal(err)
	}
	if leaf.URIs[0].String() != "spiffe://cluster.local/ns/legacy/sa/web" || leaf.Subject.OrganizationalUnit[0] != "vm:n1" {
		t.Errorf("leaf of %v, %v", leaf.URIs, leaf.Subject)
	}
	_, err = s.dial(t).ask(t, s.tokens.token, nil)
	wantCode(t, err, codes.Unauthenticated, "not accepted")
	machine := ca.Subject{Source: "vm:n1", Instance: "web-1", Namespace: "legacy", ServiceAccount: "web"}
	renewing := s.dial(t, s.Leaf(t, machine))
	if _, err := renewing.ask(t, "", nil); err != nil {
		t.Errorf("renewal: %v", err)
	}
	if err := s.Revoke(t.Context(), "vm:n1", "web-1", "offboard"); err != nil {
		t.Fatal(err)
	}
	_, err = renewing.ask(t, "", nil)
	wantCode(t, err, codes.PermissionDenied, "revoked")
}

// Whoever is refused learns what to do about it and nothing else, and is in the audit log.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s := start(t)
	east, west := s.east, s.west
	istio := func(c *catest.Cluster, ns string) string {
		claims := c.Claims(ns, "web", "web-0", "uid-i", time.Now())
		claims["aud"] = []string{attest.IstioAudience}
		return c.Sign(t, claims, nil)
	}
	uri, err := url.Parse("spiffe://cluster.local/ns/shop/sa/admin")
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		bearer string
		csr    *x509.CertificateRequest
		md     []string
		code   codes.Code
		text   string
	}{
		"no credential":             {"", nil, nil, codes.Unauthenticated, "credential not accepted"},
		"a forged token":            {"a.b.c", nil, nil, codes.Unauthenticated, "credential not accepted"},
		"an unknown join token":     {"isthmus-vm.0011223344556677.x", nil, nil, codes.Unauthenticated, "credential not accepted"},
		"two authorization headers": {"a.b.c", nil, []string{"authorization", "Bearer x"}, codes.Unauthenticated, "credential not accepted"},
		"a basic credential":        {"", nil, []string{"authorization", "Basic YTpi"}, codes.Unauthenticated, "credential not accepted"},
		"another cluster's hint":    {east.Token(t, "shop", "a", "p", "u1"), nil, []string{"clusterid", "west"}, codes.Unauthenticated, ""},
		"not granted":               {east.Token(t, "legacy", "a", "p", "u2"), nil, nil, codes.PermissionDenied, "see mesh clusters"},
		"another identity":          {east.Token(t, "shop", "a", "p", "u3"), &x509.CertificateRequest{URIs: []*url.URL{uri}}, nil, codes.PermissionDenied, "another identity"},
		"meshd's identity":          {east.Token(t, "isthmus-system", "meshd", "p", "u4"), nil, nil, codes.PermissionDenied, "control service"},
		"Istio's, not opted in":     {istio(east, "shop"), nil, nil, codes.Unauthenticated, ""},
		"Istio's, opted in":         {istio(west, "legacy"), nil, nil, codes.OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := s.dial(t).ask(t, test.bearer, test.csr, test.md...)
			wantCode(t, err, test.code, test.text)
		})
	}
	t.Cleanup(func() {
		refused := 0
		for _, e := range s.AuditEntries(t) {
			if e.Event == ca.AuditRefused && e.Reason != "" && e.Peer != "" {
				refused++
			}
		}
		if refused != 10 {
			t.Errorf("%d refusals in the audit log, want 10", refused)
		}
	})
}

// A3: every credential against every identity, over the wire: what a source gets lies in its grant.
func TestAttackA03ClusterMatrix(t *testing.T) {
	t.Parallel()
	s := start(t)
	for _, c := range []*catest.Cluster{s.east, s.west} {
		for _, ns := range []string{"shop", "legacy", "kube-system", "isthmus-system"} {
			leaf, err := s.dial(t).ask(t, c.Token(t, ns, "default", "p", "uid-"+ns), nil)
			granted := s.Allows(c.Source(), ns, "default") == nil
			if granted != (err == nil) {
				t.Errorf("%s as %s: %v", c.UID, ns, err)
			}
			if err == nil && (leaf.Subject.OrganizationalUnit[0] != string(c.Source()) || leaf.URIs[0].Path != "/ns/"+ns+"/sa/default") {
				t.Errorf("%s as %s: %v", c.UID, ns, leaf.URIs)
			}
		}
	}
}

// A10 on the wire.
func TestAttackA10ReplayIsRefused(t *testing.T) {
	t.Parallel()
	s := start(t)
	token := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	owner := s.dial(t)
	for range 2 {
		if _, err := owner.ask(t, token, nil); err != nil {
			t.Fatal(err)
		}
	}
	_, err := s.dial(t).ask(t, token, nil)
	wantCode(t, err, codes.Unauthenticated, "already used with another key")
}

// A4: nobody gets a certificate for somebody else, though Istio's protocol has a field for it.
func TestAttackA04BrokeredIdentity(t *testing.T) {
	t.Parallel()
	s := start(t)
	a := s.dial(t)
	md, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": "spiffe://cluster.local/ns/shop/sa/admin"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.send(t, s.east.Token(t, "shop", "ztunnel", "z", "uid-z"), &security.IstioCertificateRequest{
		Csr: string(catest.CSR(t, a.key, nil)), Metadata: md,
	})
	wantCode(t, err, codes.PermissionDenied, "impersonation")
}

// A21, A22: a panic and an oversized request leave the server alive.
func TestAttackA21ServerSurvives(t *testing.T) {
	t.Parallel()
	s := start(t)
	token := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	a := s.dial(t)
	s.panics.Store(true)
	_, err := a.ask(t, token, nil)
	wantCode(t, err, codes.Internal, "internal error")
	s.panics.Store(false)
	_, err = a.send(t, token, &security.IstioCertificateRequest{Csr: strings.Repeat("A", ca.MaxCSR+1)})
	wantCode(t, err, codes.InvalidArgument, "at most")
	if _, err := a.ask(t, token, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestOneWorkloadIsLimited(t *testing.T) {
	t.Parallel()
	s := start(t)
	a := s.dial(t)
	token := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	for range caserver.DefaultBurst {
		if _, err := a.ask(t, token, nil); err != nil {
			t.Fatal(err)
		}
	}
	_, err := a.ask(t, token, nil)
	wantCode(t, err, codes.ResourceExhausted, "too many")
	if _, err := s.dial(t).ask(t, s.east.Token(t, "shop", "reviews", "reviews-1", "uid-1"), nil); err != nil {
		t.Errorf("another pod: %v", err)
	}
}

// brokenAudit fails when it is told to.
type brokenAudit struct {
	ca.Audit
	broken atomic.Bool
}

func (b *brokenAudit) Append(e ca.AuditEntry) error {
	if b.broken.Load() {
		return ca.ErrAudit
	}
	return b.Audit.Append(e)
}

// A36: no line, no certificate.
func TestAttackA36NoAuditNoCertificate(t *testing.T) {
	t.Parallel()
	audit := new(brokenAudit)
	s := start(t, func(c *ca.Config) { audit.Audit, c.Audit = c.Audit, audit })
	a := s.dial(t)
	token := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	audit.broken.Store(true)
	_, err := a.ask(t, token, nil) // not even an intermediate is made
	wantCode(t, err, codes.Unavailable, "audit log")
	audit.broken.Store(false)
	if _, err := a.ask(t, token, nil); err != nil {
		t.Fatal(err)
	}
	audit.broken.Store(true)
	_, err = a.ask(t, token, nil)
	wantCode(t, err, codes.Unavailable, "audit log")
	audit.broken.Store(false)
	if _, err := a.ask(t, token, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A24: nothing is resumed, so nothing skips the look at the certificate.
func TestServingTLS(t *testing.T) {
	t.Parallel()
	s := start(t)
	cache := tls.NewLRUClientSessionCache(4)
	for range 2 {
		cfg := s.ClientTLS()
		cfg.ClientSessionCache, cfg.ServerName, cfg.NextProtos = cache, "meshd.example", []string{"h2"}
		conn, err := tls.Dial("tcp", s.address, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume || conn.ConnectionState().NegotiatedProtocol != "h2" {
			t.Errorf("resumed %v, protocol %q", conn.ConnectionState().DidResume, conn.ConnectionState().NegotiatedProtocol)
		}
		conn.Close()
	}
	old := s.ClientTLS()
	old.MinVersion, old.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
	if conn, err := tls.Dial("tcp", s.address, old); err == nil {
		conn.Close()
		t.Error("TLS 1.1 is spoken")
	}
}

func TestServingRenewsItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority := catest.New(t)
		s, err := caserver.NewServing(t.Context(), caserver.ServingConfig{
			Authority: authority.Authority, Replica: "meshd-0", Names: []string{"::1"},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		first := s.Certificate().Leaf
		time.Sleep(14 * time.Hour)
		synctest.Wait()
		if second := s.Certificate().Leaf; second.Equal(first) || !second.NotAfter.After(first.NotAfter) {
			t.Errorf("not renewed after 14 h of %v", first.NotAfter.Sub(first.NotBefore))
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run = %v", err)
		}
	})
}

func TestWriteAdmin(t *testing.T) {
	t.Parallel()
	c, dir, ctx, now := catest.New(t), t.TempDir(), t.Context(), time.Now()
	path := filepath.Join(dir, caserver.AdminFile)
	step := func(what string, want bool, server string, at time.Time) {
		t.Helper()
		written, err := caserver.WriteAdmin(ctx, c.Authority, dir, server, at)
		if err != nil || written != want {
			t.Fatalf("%s: written %v, %v; want %v", what, written, err, want)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Fatalf("%s: mode %v, %v", what, info.Mode(), err)
		}
	}
	const server = "https://127.0.0.1:8443"
	step("the first start", true, server, now)
	step("the next start", false, server, now)
	step("another address", true, "https://meshd.example:8443", now)
	step("near its end", true, "https://meshd.example:8443", now.Add(300*24*time.Hour))
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	step("readable by others", true, server, now)
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	step("damaged", true, server, now)
	c = catest.New(t)
	step("another authority", true, server, now)
}
