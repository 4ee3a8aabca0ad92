// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// foundry makes chains by hand, so that each rule can be broken alone.
type foundry struct {
	root, issuer, leaf          *x509.Certificate // templates
	rootKey, issuerKey, leafKey *ecdsa.PrivateKey
	extra                       []*x509.Certificate // presented after the intermediate
}

func newFoundry(t testing.TB) *foundry {
	from, to := time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	authority := func() *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: to, IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign, Subject: pkix.Name{CommonName: "root"},
		}
	}
	f := &foundry{root: authority(), issuer: authority(), rootKey: catest.Key(t), issuerKey: catest.Key(t), leafKey: catest.Key(t)}
	f.issuer.Subject = pkix.Name{CommonName: "issuer", OrganizationalUnit: []string{"kube:c1"}}
	f.issuer.MaxPathLenZero, f.issuer.PermittedURIDomains, f.issuer.PermittedDNSDomainsCritical = true, []string{"cluster.local"}, true
	f.leaf = &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: to, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		Subject:     pkix.Name{OrganizationalUnit: []string{"kube:c1"}, SerialNumber: "pod-1"},
	}
	f.uris(t, "spiffe://cluster.local/ns/shop/sa/reviews")
	return f
}

func (f *foundry) uris(t testing.TB, ids ...string) {
	t.Helper()
	f.leaf.URIs = nil
	for _, id := range ids {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		f.leaf.URIs = append(f.leaf.URIs, u)
	}
}

func cast(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (f *foundry) verify(t testing.TB) (ca.Identity, error) {
	t.Helper()
	root := cast(t, f.root, f.root, f.rootKey.Public(), f.rootKey)
	issuer := cast(t, f.issuer, root, f.issuerKey.Public(), f.rootKey)
	leaf := cast(t, f.leaf, issuer, f.leafKey.Public(), f.issuerKey)
	pool := x509.NewCertPool()
	pool.AddCert(root)
	td, err := ca.ParseTrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	return ca.VerifyChain(td, pool, time.Now(), append([]*x509.Certificate{leaf, issuer}, f.extra...))
}

// The rules of X509-SVID, each broken alone; go-spiffe and Go's own verifier let several of these pass.
func TestSpiffeX509(t *testing.T) {
	t.Parallel()
	type breaks func(t *testing.T, f *foundry)
	extension := func(id asn1.ObjectIdentifier, critical bool, der []byte) breaks {
		return func(_ *testing.T, f *foundry) {
			f.leaf.ExtraExtensions = []pkix.Extension{{Id: id, Critical: critical, Value: der}}
		}
	}
	keyUsage := asn1.ObjectIdentifier{2, 5, 29, 15}
	for name, test := range map[string]struct {
		change breaks
		ok     bool
	}{
		"nothing broken": {func(*testing.T, *foundry) {}, true},
		"X-1: no URI":    {func(t *testing.T, f *foundry) { f.uris(t) }, false},
		"X-1: two URIs": {func(t *testing.T, f *foundry) {
			f.uris(t, "spiffe://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/a/sa/c")
		}, false},
		"X-1: other names in any number":   {func(_ *testing.T, f *foundry) { f.leaf.DNSNames = []string{"a.test", "b.test"} }, true},
		"X-2: a trust domain's own ID":     {func(t *testing.T, f *foundry) { f.uris(t, "spiffe://cluster.local") }, false},
		"X-2: a path that is no workload":  {func(t *testing.T, f *foundry) { f.uris(t, "spiffe://cluster.local/reviews") }, false},
		"X-4: a leaf that is an authority": {func(_ *testing.T, f *foundry) { f.leaf.IsCA = true }, false},
		"X-4: no basic constraints":        {func(_ *testing.T, f *foundry) { f.leaf.BasicConstraintsValid = false }, false},
		"X-7: an authority as identity": {func(_ *testing.T, f *foundry) {
			f.leaf.IsCA, f.leaf.KeyUsage = true, f.leaf.KeyUsage|x509.KeyUsageDigitalSignature
		}, false},
		"X-3: no subject":                  {func(_ *testing.T, f *foundry) { f.leaf.Subject = pkix.Name{} }, false},
		"X-5: no key usage":                {func(_ *testing.T, f *foundry) { f.leaf.KeyUsage = 0 }, false},
		"X-5: key usage not critical":      {extension(keyUsage, false, []byte{3, 2, 7, 0x80}), false},
		"X-5: no digital signature":        {func(_ *testing.T, f *foundry) { f.leaf.KeyUsage = x509.KeyUsageKeyAgreement }, false},
		"X-5: may sign certificates":       {func(_ *testing.T, f *foundry) { f.leaf.KeyUsage |= x509.KeyUsageCertSign }, false},
		"X-5: may sign lists":              {func(_ *testing.T, f *foundry) { f.leaf.KeyUsage |= x509.KeyUsageCRLSign }, false},
		"X-6: no extended key usage":       {func(_ *testing.T, f *foundry) { f.leaf.ExtKeyUsage = nil }, true},
		"X-6: client only":                 {func(_ *testing.T, f *foundry) { f.leaf.ExtKeyUsage = f.leaf.ExtKeyUsage[1:] }, false},
		"X-6: server only":                 {func(_ *testing.T, f *foundry) { f.leaf.ExtKeyUsage = f.leaf.ExtKeyUsage[:1] }, false},
		"X-6: something else only":         {func(_ *testing.T, f *foundry) { f.leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }, false},
		"X-11: expired":                    {func(_ *testing.T, f *foundry) { f.leaf.NotAfter = time.Now().Add(-time.Second) }, false},
		"X-11: not yet valid":              {func(_ *testing.T, f *foundry) { f.leaf.NotBefore = time.Now().Add(time.Minute) }, false},
		"X-11: expired intermediate":       {func(_ *testing.T, f *foundry) { f.issuer.NotAfter = time.Now().Add(-time.Second) }, false},
		"X-11: unknown critical extension": {extension(asn1.ObjectIdentifier{1, 2, 3, 4}, true, []byte{5, 0}), false},
		"X-12: another trust domain":       {func(t *testing.T, f *foundry) { f.uris(t, "spiffe://evil.test/ns/shop/sa/reviews") }, false},
		"X-12: another trust domain, and an intermediate that may": {func(t *testing.T, f *foundry) {
			f.uris(t, "spiffe://evil.test/ns/shop/sa/reviews")
			f.issuer.PermittedURIDomains = []string{"cluster.local", "evil.test"}
		}, false},
		"ID-1: another scheme":   {func(t *testing.T, f *foundry) { f.uris(t, "https://cluster.local/ns/shop/sa/reviews") }, false},
		"ID-1: a query":          {func(t *testing.T, f *foundry) { f.uris(t, "spiffe://cluster.local/ns/shop/sa/reviews?x") }, false},
		"ID-6: percent-encoding": {func(t *testing.T, f *foundry) { f.uris(t, "spiffe://cluster.local/ns/shop/sa/a%2fb") }, false},
		"ID-6: a trailing slash": {func(t *testing.T, f *foundry) { f.uris(t, "spiffe://cluster.local/ns/shop/sa/reviews/") }, false},
		"ID-5: too long": {func(t *testing.T, f *foundry) {
			f.uris(t, "spiffe://cluster.local/ns/shop/sa/"+strings.Repeat("a", 2048))
		}, false},
		"source of another intermediate": {func(_ *testing.T, f *foundry) { f.leaf.Subject.OrganizationalUnit = []string{"kube:c2"} }, false},
		"two sources":                    {func(_ *testing.T, f *foundry) { f.leaf.Subject.OrganizationalUnit = []string{"kube:c1", "kube:c2"} }, false},
		"no source":                      {func(_ *testing.T, f *foundry) { f.leaf.Subject.OrganizationalUnit = nil }, false},
		"no instance":                    {func(_ *testing.T, f *foundry) { f.leaf.Subject.SerialNumber = "" }, false},
		"intermediate without constraint": {func(_ *testing.T, f *foundry) {
			f.issuer.PermittedURIDomains = nil
			f.issuer.PermittedDNSDomainsCritical = false
		}, false},
		"intermediate of a wider constraint": {func(_ *testing.T, f *foundry) { f.issuer.PermittedURIDomains = []string{"cluster.local", "evil.test"} }, false},
		"intermediate without path length":   {func(_ *testing.T, f *foundry) { f.issuer.MaxPathLenZero, f.issuer.MaxPathLen = false, -1 }, false},
		"a chain that is too long":           {func(t *testing.T, f *foundry) { f.extra = make([]*x509.Certificate, 4) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFoundry(t)
			test.change(t, f)
			id, err := f.verify(t)
			if test.ok && (err != nil || id.Source != "kube:c1" || id.Instance != "pod-1") {
				t.Errorf("verify = %+v, %v", id, err)
			}
			if !test.ok && !errors.Is(err, ca.ErrUntrusted) {
				t.Errorf("verify = %+v, %v; want ErrUntrusted", id, err)
			}
		})
	}
	// The signing certificates are ours: none that breaks a rule is ever used.
	for name, change := range map[string]func(*x509.Certificate){
		"X-8: signs messages":       func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature },
		"X-8: signs nothing":        func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign },
		"X-9: two names":            func(c *x509.Certificate) { c.DNSNames = []string{"a.test"} },
		"X-9: a path":               func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/x"}} },
		"X-9: another trust domain": func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "evil.test"}} },
		"X-10: authorities below":   func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false },
		"X-10: no constraint":       func(c *x509.Certificate) { c.PermittedURIDomains = nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := ca.LintAuthority(t, change); !errors.Is(err, ca.ErrLint) {
				t.Errorf("LintAuthority = %v, want ErrLint", err)
			}
		})
	}
}

// X-7, and a compromised cluster that plays authority: its leaf key signs, its intermediate signs for others.
func TestVerifySigners(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	cert := c.Leaf(t, catest.Subject("kube:c1", "pod-1", "shop"))
	key, ok := cert.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatal("not an ECDSA key")
	}
	f := newFoundry(t)
	links := chain(t, cert)
	forged := cast(t, f.leaf, links[0], f.leafKey.Public(), key)
	for name, chain := range map[string][]*x509.Certificate{
		"signed by a leaf":      {forged, links[0], links[1]},
		"an intermediate":       {links[1]},
		"a root":                {c.Bundle().Roots[0]},
		"nothing":               {},
		"without intermediate":  {links[0]},
		"of another authority":  chain(t, catest.New(t).Leaf(t, catest.Subject("kube:c1", "pod-1", "shop"))),
		"intermediate in front": {links[1], links[0]},
	} {
		if id, err := c.Verify(chain); !errors.Is(err, ca.ErrUntrusted) {
			t.Errorf("%s: Verify = %+v, %v; want ErrUntrusted", name, id, err)
		}
	}
	if _, err := c.Verify(append(links, c.Bundle().Roots...)); err != nil {
		t.Errorf("with its root: %v", err)
	}
}

// What was verified once is not believed for ever: its time passes, its roots may change, and a leaf says nothing
// about who presents it with other certificates.
func TestVerifiedOnce(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	c := catest.New(t, func(cfg *ca.Config) { cfg.Clock = clock.Now })
	links := chain(t, c.Leaf(t, catest.Subject("kube:c1", "pod-1", "shop")))
	for range 3 {
		if id, err := c.Verify(links); err != nil || id.Instance != "pod-1" {
			t.Fatalf("Verify = %+v, %v", id, err)
		}
	}
	for name, other := range map[string][]*x509.Certificate{"the leaf alone": links[:1], "with another intermediate": {links[0], c.Bundle().Roots[0]}} {
		if id, err := c.Verify(other); !errors.Is(err, ca.ErrUntrusted) {
			t.Errorf("%s: %+v, %v; want ErrUntrusted", name, id, err)
		}
	}
	if err := c.RaiseSequence(t.Context()); err != nil { // the view is replaced, the roots are the same
		t.Fatal(err)
	}
	if _, err := c.Verify(links); err != nil {
		t.Error(err)
	}
	clock.Advance(-2 * time.Minute)
	if id, err := c.Verify(links); !errors.Is(err, ca.ErrUntrusted) {
		t.Errorf("before it begins: %+v, %v; want ErrUntrusted", id, err)
	}
	clock.Advance(26 * time.Hour)
	if id, err := c.Verify(links); !errors.Is(err, ca.ErrUntrusted) {
		t.Errorf("after its end: %+v, %v; want ErrUntrusted", id, err)
	}
}
