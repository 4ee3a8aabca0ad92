// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const east = ca.Source("kube:3f1a5c2e-0001")

var reviews = ca.Subject{Source: east, Instance: "pod-1", Namespace: "shop", ServiceAccount: "reviews"}

func request(t testing.TB, template *x509.CertificateRequest) ca.Request {
	t.Helper()
	return ca.Request{
		Subject: reviews, CSR: catest.CSR(t, catest.Key(t), template),
		Credential: ca.Credential{Method: "kubernetes-token", Digest: "d1"},
	}
}

// The leaf, field by field, against the checklist of X509-SVID.
func TestLeafProfile(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	issued, err := c.Issue(t.Context(), request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	leaf := issued.Leaf
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://cluster.local/ns/shop/sa/reviews" {
		t.Errorf("X-1, X-2: URIs %v", leaf.URIs)
	}
	if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
		t.Errorf("other names: %v %v %v", leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses)
	}
	if !leaf.BasicConstraintsValid || leaf.IsCA {
		t.Errorf("X-4: basic constraints %v, CA %v", leaf.BasicConstraintsValid, leaf.IsCA)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("X-5: key usage %b", leaf.KeyUsage)
	}
	if want := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}; !slices.Equal(leaf.ExtKeyUsage, want) {
		t.Errorf("X-6: extended key usage %v", leaf.ExtKeyUsage)
	}
	if !slices.Equal(leaf.Subject.OrganizationalUnit, []string{string(east)}) || leaf.Subject.SerialNumber != "pod-1" {
		t.Errorf("subject %v", leaf.Subject)
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life < 24*time.Hour || life > 24*time.Hour+2*time.Minute {
		t.Errorf("valid for %v; want 24 h and the backdating", life)
	}
	if back := time.Since(leaf.NotBefore); back < 59*time.Second || back > 75*time.Second {
		t.Errorf("backdated by %v; want 60 s", back)
	}
	if bits := leaf.SerialNumber.BitLen(); bits < 96 || bits > 128 {
		t.Errorf("serial number of %d bits", bits)
	}
	if leaf.SignatureAlgorithm != x509.ECDSAWithSHA256 || len(leaf.SubjectKeyId) != 20 {
		t.Errorf("signature %v, key ID %x", leaf.SignatureAlgorithm, leaf.SubjectKeyId)
	}
}

func TestAuthorityProfile(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	issued, err := c.Issue(t.Context(), request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	for name, cert := range map[string]*x509.Certificate{"root": issued.Roots[0], "intermediate": issued.Intermediate} {
		if !cert.IsCA || cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
			t.Errorf("X-8: %s: CA %v, key usage %b", name, cert.IsCA, cert.KeyUsage)
		}
		if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://cluster.local" {
			t.Errorf("X-9: %s: URIs %v", name, cert.URIs)
		}
	}
	i := issued.Intermediate
	if !i.MaxPathLenZero || !slices.Equal(i.PermittedURIDomains, []string{"cluster.local"}) || !i.PermittedDNSDomainsCritical {
		t.Errorf("X-10: path length %d, constraint %v, critical %v", i.MaxPathLen, i.PermittedURIDomains, i.PermittedDNSDomainsCritical)
	}
	if !slices.Equal(i.Subject.OrganizationalUnit, []string{string(east)}) {
		t.Errorf("intermediate of %v", i.Subject)
	}
	other, err := c.Issue(t.Context(), ca.Request{Subject: catest.Subject("vm:legacy", "web-1", "shop"), CSR: catest.CSR(t, catest.Key(t), nil)})
	if err != nil {
		t.Fatal(err)
	}
	if other.Intermediate.Equal(i) {
		t.Error("two sources share an intermediate")
	}
}

// What other people's libraries make of the certificates.
func TestLeafIsAcceptedElsewhere(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	issued, err := c.Issue(t.Context(), request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	t.Run("go-spiffe", func(t *testing.T) {
		t.Parallel()
		bundle := x509bundle.FromX509Authorities(c.TrustDomain(), c.Bundle().Roots)
		id, _, err := x509svid.Verify([]*x509.Certificate{issued.Leaf, issued.Intermediate}, bundle)
		if err != nil || id.String() != "spiffe://cluster.local/ns/shop/sa/reviews" {
			t.Errorf("Verify = %v, %v", id, err)
		}
	})
	t.Run("openssl", func(t *testing.T) {
		t.Parallel()
		openssl, err := exec.LookPath("openssl")
		if err != nil {
			t.Skip("openssl is not installed")
		}
		dir := t.TempDir()
		files := map[string]string{"leaf": issued.PEM()[0], "issuer": issued.PEM()[1], "root": issued.PEM()[2]}
		for name, text := range files {
			write(t, filepath.Join(dir, name), text)
		}
		out, err := exec.Command(openssl, "verify", "-x509_strict", "-purpose", "sslserver",
			"-CAfile", filepath.Join(dir, "root"), "-untrusted", filepath.Join(dir, "issuer"), filepath.Join(dir, "leaf")).CombinedOutput()
		if err != nil {
			t.Errorf("openssl verify: %v\n%s", err, out)
		}
	})
}

func TestVerifyGivesBackTheSubject(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	issued, err := c.Issue(t.Context(), request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	id, err := c.Verify([]*x509.Certificate{issued.Leaf, issued.Intermediate})
	if err != nil {
		t.Fatal(err)
	}
	if id.Subject != reviews || id.ID.String() != "spiffe://cluster.local/ns/shop/sa/reviews" {
		t.Errorf("Verify = %+v", id)
	}
	entries := c.AuditEntries(t)
	last := entries[len(entries)-1]
	if last.Event != ca.AuditIssued || last.Serial != id.Serial || last.Authority != id.Authority || last.SPIFFEID != id.ID.String() ||
		last.Source != east || last.Instance != "pod-1" || last.Credential != "d1" || !last.NotAfter.Equal(id.NotAfter) {
		t.Errorf("audit line %+v does not tell of %+v", last, id)
	}
}

// A5: names come from the credential. Whoever asks for others is refused, and that is recorded.
func TestAttackA05ForeignNamesInRequest(t *testing.T) {
	t.Parallel()
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	raw := func(id asn1.ObjectIdentifier, der []byte) *x509.CertificateRequest {
		return &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: id, Value: der}}}
	}
	own := uri("spiffe://cluster.local/ns/shop/sa/reviews")
	for name, test := range map[string]struct {
		csr  *x509.CertificateRequest
		want error // nil: issued
	}{
		"asks for nothing":             {&x509.CertificateRequest{}, nil},
		"asks for itself":              {&x509.CertificateRequest{URIs: []*url.URL{own}}, nil},
		"has a common name":            {&x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin"}}, nil},
		"asks for an odd extension":    {raw(asn1.ObjectIdentifier{1, 2, 3, 4}, []byte("?")), nil},
		"another account":              {&x509.CertificateRequest{URIs: []*url.URL{uri("spiffe://cluster.local/ns/shop/sa/admin")}}, ca.ErrForeignName},
		"another trust domain":         {&x509.CertificateRequest{URIs: []*url.URL{uri("spiffe://evil.test/ns/shop/sa/reviews")}}, ca.ErrForeignName},
		"upper case":                   {&x509.CertificateRequest{URIs: []*url.URL{uri("spiffe://cluster.local/ns/shop/sa/Reviews")}}, ca.ErrForeignName},
		"itself and another":           {&x509.CertificateRequest{URIs: []*url.URL{own, uri("spiffe://cluster.local/ns/shop/sa/admin")}}, ca.ErrForeignName},
		"itself twice":                 {&x509.CertificateRequest{URIs: []*url.URL{own, own}}, ca.ErrForeignName},
		"a DNS name":                   {&x509.CertificateRequest{DNSNames: []string{"payments.shop.svc"}}, ca.ErrForeignName},
		"a wildcard":                   {&x509.CertificateRequest{DNSNames: []string{"*"}}, ca.ErrForeignName},
		"an address":                   {&x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}}, ca.ErrForeignName},
		"an email address":             {&x509.CertificateRequest{EmailAddresses: []string{"root@cluster.local"}}, ca.ErrForeignName},
		"its URI cut off by a NUL":     {raw(asn1.ObjectIdentifier{2, 5, 29, 17}, sanURI(own.String()+"\x00.evil.test")), ca.ErrRequest},
		"to be an authority":           {raw(asn1.ObjectIdentifier{2, 5, 29, 19}, []byte{0x30, 3, 1, 1, 0xff}), ca.ErrForeignName},
		"names that are no sequence":   {raw(asn1.ObjectIdentifier{2, 5, 29, 17}, []byte{4, 1, 0}), ca.ErrRequest},
		"a registered ID, not a name":  {raw(asn1.ObjectIdentifier{2, 5, 29, 17}, []byte{0x30, 3, 0x88, 1, 1}), ca.ErrForeignName},
		"more names than can be meant": {&x509.CertificateRequest{DNSNames: strings.Split(strings.Repeat("a.,", 70)+"a.", ",")}, ca.ErrRequest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := catest.New(t)
			issued, err := c.Issue(t.Context(), request(t, test.csr))
			if !errors.Is(err, test.want) {
				t.Fatalf("Issue = %v, want %v", err, test.want)
			}
			last := c.AuditEntries(t)[len(c.AuditEntries(t))-1]
			if test.want == nil {
				if len(issued.Leaf.URIs) != 1 || issued.Leaf.URIs[0].String() != own.String() || issued.Leaf.Subject.CommonName != "" || issued.Leaf.IsCA {
					t.Errorf("leaf took something from the request: %v %v", issued.Leaf.URIs, issued.Leaf.Subject)
				}
				return
			}
			if last.Event != ca.AuditRefused || last.Reason == "" || last.SPIFFEID != own.String() || last.Credential != "d1" {
				t.Errorf("last audit line is %+v; want the refusal", last)
			}
		})
	}
}

// A22: requests at and beyond the limits.
func TestAttackA22OversizedRequest(t *testing.T) {
	t.Parallel()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := catest.CSR(t, catest.Key(t), nil)
	block, _ := pem.Decode(good)
	forged := slices.Clone(block.Bytes)
	forged[len(forged)-3] ^= 1
	for name, csr := range map[string][]byte{
		"empty":                    {},
		"garbage":                  []byte("hello"),
		"too long":                 catest.CSR(t, catest.Key(t), &x509.CertificateRequest{Subject: pkix.Name{CommonName: strings.Repeat("a", ca.MaxCSR)}}),
		"two blocks":               append(slices.Clone(good), good...),
		"a certificate":            pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes}),
		"broken PEM":               good[:len(good)-20],
		"signature of another key": forged,
		"P-384":                    catest.CSR(t, p384, nil),
	} {
		if _, err := ca.ParseCSR(csr); !errors.Is(err, ca.ErrRequest) {
			t.Errorf("%s: ParseCSR = %v, want ErrRequest", name, err)
		}
	}
	if _, err := ca.ParseCSR(block.Bytes); err != nil {
		t.Errorf("DER: %v", err)
	}
}

func TestRSAKeysOnlyWhereAllowed(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	req := ca.Request{Subject: reviews, CSR: catest.CSR(t, key, nil)}
	if _, err := c.Issue(t.Context(), req); !errors.Is(err, ca.ErrRequest) {
		t.Errorf("Issue = %v, want ErrRequest", err)
	}
	req.AllowRSA = true
	issued, err := c.Issue(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if issued.Leaf.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment {
		t.Errorf("key usage %b", issued.Leaf.KeyUsage)
	}
}

// A3: a cluster obtains only identities that it may host; the control service's are nobody else's.
func TestAttackA03IdentityOutsideGrant(t *testing.T) {
	t.Parallel()
	grants := ca.GrantFunc(func(s ca.Source, ns, _ string) error {
		if s == east && ns == "shop" || s == "vm:legacy" && ns == "legacy" || ns == ca.ControlNamespace {
			return nil
		}
		return errors.New("namespace not granted; see mesh clusters")
	})
	c := catest.New(t, func(cfg *ca.Config) { cfg.Grants = grants })
	for _, test := range []struct {
		source             ca.Source
		namespace, account string
		want               error
	}{
		{east, "shop", "reviews", nil},
		{east, "legacy", "reviews", ca.ErrNotGranted},
		{"vm:legacy", "legacy", "web", nil},
		{"vm:legacy", "shop", "web", ca.ErrNotGranted},
		{"kube:other", "shop", "reviews", ca.ErrNotGranted},
		{east, ca.ControlNamespace, "isthmus-eastwestgateway", nil},
		{east, ca.ControlNamespace, ca.ControlAccount, ca.ErrNotGranted},
		{east, ca.ControlNamespace, ca.AdminAccount, ca.ErrNotGranted},
		{ca.SourceMeshd, ca.ControlNamespace, ca.ControlAccount, nil},
		{ca.SourceMeshd, "shop", "reviews", ca.ErrNotGranted},
		{east, "..", "reviews", ca.ErrSubject},
		{east, "shop", "a/../../admin", ca.ErrSubject},
		{east, "shop", "", ca.ErrSubject},
		{"consul:x", "shop", "reviews", ca.ErrSubject},
	} {
		s := ca.Subject{Source: test.source, Instance: "i", Namespace: test.namespace, ServiceAccount: test.account}
		_, err := c.Issue(t.Context(), ca.Request{Subject: s, CSR: catest.CSR(t, catest.Key(t), nil)})
		if !errors.Is(err, test.want) {
			t.Errorf("Issue for %+v = %v, want %v", s, err, test.want)
		}
	}
	req := request(t, nil)
	req.DNSNames = []string{"meshd.example"}
	if _, err := c.Issue(t.Context(), req); !errors.Is(err, ca.ErrNotGranted) {
		t.Errorf("a workload with DNS names: %v, want ErrNotGranted", err)
	}
}

func TestPreparedIsGoodForOneSignature(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	c := catest.New(t, func(cfg *ca.Config) { cfg.Clock = clock.Now })
	p, err := c.Prepare(t.Context(), request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var won sync.Map
	for i := range 20 {
		wg.Go(func() {
			if _, err := c.Sign(t.Context(), p); err == nil {
				won.Store(i, true)
			} else if !errors.Is(err, ca.ErrSpent) {
				t.Errorf("Sign = %v, want ErrSpent", err)
			}
		})
	}
	wg.Wait()
	wins := 0
	won.Range(func(any, any) bool { wins++; return true })
	if wins != 1 {
		t.Errorf("%d signatures, want 1", wins)
	}
	if _, err := c.Sign(t.Context(), ca.Prepared{}); !errors.Is(err, ca.ErrSpent) {
		t.Errorf("zero Prepared: %v, want ErrSpent", err)
	}
	late, err := c.Prepare(t.Context(), request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	clock.Advance(time.Minute)
	if _, err := c.Sign(t.Context(), late); !errors.Is(err, ca.ErrSpent) {
		t.Errorf("a minute later: %v, want ErrSpent", err)
	}
}

func TestLifetimeIsClamped(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	for _, test := range []struct{ wish, limit, want time.Duration }{
		{0, 0, 24 * time.Hour},
		{time.Hour, 0, time.Hour},
		{1000 * time.Hour, 0, 24 * time.Hour},
		{time.Second, 0, 5 * time.Minute},
		{-time.Hour, 0, 24 * time.Hour},
		{0, time.Hour, time.Hour},
		{10 * time.Minute, time.Hour, 10 * time.Minute},
	} {
		req := request(t, nil)
		req.Lifetime, req.LifetimeLimit = test.wish, test.limit
		p, err := c.Prepare(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if got := time.Until(p.NotAfter()); got > test.want || got < test.want-10*time.Second {
			t.Errorf("wish %v, limit %v: lives %v, want %v", test.wish, test.limit, got, test.want)
		}
	}
}

func TestServingNames(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	cert := c.Serving(t, "meshd.example", "127.0.0.1", "::1")
	for _, name := range []string{"meshd.example", "127.0.0.1", "::1"} {
		if err := cert.Leaf.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	id, err := c.Verify(chain(t, cert))
	if err != nil || id.Source != ca.SourceMeshd || id.IsAdmin() {
		t.Errorf("Verify = %+v, %v", id, err)
	}
	if id, err = c.Verify(chain(t, c.Admin(t))); err != nil || !id.IsAdmin() {
		t.Errorf("Verify = %+v, %v; want an administrator", id, err)
	}
	csr := catest.CSR(t, catest.Key(t), &x509.CertificateRequest{DNSNames: []string{"other.example"}})
	_, err = c.Issue(t.Context(), ca.Request{Subject: id.Subject, CSR: csr, DNSNames: []string{"meshd.example"}, Addresses: []netip.Addr{netip.IPv6Loopback()}})
	if !errors.Is(err, ca.ErrForeignName) {
		t.Errorf("CSR with a name that is not configured: %v, want ErrForeignName", err)
	}
}

func chain(t testing.TB, cert tls.Certificate) []*x509.Certificate {
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

// sanURI is the extension with one URI, whatever its bytes.
func sanURI(uri string) []byte {
	der, _ := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}})
	return der
}
