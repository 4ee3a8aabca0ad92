// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// company is an authority of somebody's own, as far as it goes: its root first, what the mesh gets last.
type company struct {
	certs []*x509.Certificate
	keys  []crypto.Signer
}

// below adds an authority that the last one signs; the first one signs itself.
func (c *company) below(t testing.TB, key crypto.Signer, change func(*x509.Certificate)) *company {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(int64(len(c.certs)) + 1), Subject: pkix.Name{CommonName: "authority " + string(rune('A'+len(c.certs)))},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{byte(len(c.certs)), 1, 2, 3}, MaxPathLen: -1,
	}
	change(template)
	parent, signer := template, key
	if n := len(c.certs); n > 0 {
		parent, signer = c.certs[n-1], c.keys[n-1]
	}
	return &company{append(c.certs[:len(c.certs):len(c.certs)], cast(t, template, parent, key.Public(), signer)), append(c.keys[:len(c.keys):len(c.keys)], key)}
}

func asIs(*x509.Certificate) {}

// files writes the layout of Istio's cacerts.
func (c *company) files(t testing.TB) string {
	t.Helper()
	dir, n := t.TempDir(), len(c.certs)-1
	var chain bytes.Buffer
	for i := n; i == n || i > 0; i-- {
		pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: c.certs[i].Raw})
	}
	der, err := x509.MarshalPKCS8PrivateKey(c.keys[n])
	if err != nil {
		t.Fatal(err)
	}
	one := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	write(t, filepath.Join(dir, ca.BroughtCertificate), one("CERTIFICATE", c.certs[n].Raw))
	write(t, filepath.Join(dir, ca.BroughtKey), one("PRIVATE KEY", der))
	write(t, filepath.Join(dir, ca.BroughtChain), chain.String())
	write(t, filepath.Join(dir, ca.BroughtRoots), one("CERTIFICATE", c.certs[0].Raw))
	return dir
}

func brought(t testing.TB, dir string) *ca.Brought {
	t.Helper()
	b, err := ca.ReadBrought(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Whatever the company's own authority is like, what the mesh issues below it is believed by others.
func TestAuthorityThatWasBroughtAlong(t *testing.T) {
	t.Parallel()
	old, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	root := new(company).below(t, old, asIs)
	pathLength := func(n int) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = n, n == 0 }
	}
	for name, test := range map[string]struct {
		company *company
		chain   int // what a workload presents
	}{
		"a root itself":                   {root, 2},
		"below a root":                    {root.below(t, catest.Key(t), pathLength(1)), 3},
		"with an RSA key":                 {root.below(t, old, asIs), 3},
		"below two, with exact lengths":   {new(company).below(t, old, pathLength(3)).below(t, catest.Key(t), pathLength(2)).below(t, catest.Key(t), pathLength(1)), 4},
		"constrained to the trust domain": {root.below(t, catest.Key(t), func(c *x509.Certificate) { c.PermittedURIDomains = []string{"cluster.local"} }), 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, seal := test.company.files(t), sealer(t)
			c := catest.New(t, with(seal), func(cfg *ca.Config) { cfg.Root = brought(t, dir) })
			issued, err := c.Issue(t.Context(), request(t, nil))
			if err != nil {
				t.Fatal(err)
			}
			if id, err := c.Verify(issued.Chain()); err != nil || id.Subject != reviews || len(issued.Chain()) != test.chain {
				t.Errorf("Verify of %d certificates = %+v, %v; want %d", len(issued.Chain()), id, err, test.chain)
			}
			if last := issued.PEM()[len(issued.PEM())-1]; len(issued.PEM()) != test.chain+1 || !strings.Contains(last, pemOf(test.company.certs[0])) {
				t.Errorf("%d certificates are handed out, the last one is not the root", len(issued.PEM()))
			}
			bundle := x509bundle.FromX509Authorities(c.TrustDomain(), c.Bundle().Roots)
			if _, _, err := x509svid.Verify(issued.Chain(), bundle); err != nil || !c.Bundle().Roots[0].Equal(test.company.certs[0]) {
				t.Errorf("go-spiffe: %v; roots %v", err, c.Bundle().Fingerprints())
			}
			opensslVerify(t, issued)
			second, err := replica(t, c.State, seal) // a replica without the files, and the key is with the others by now
			if err != nil {
				t.Fatal(err)
			}
			if _, err := second.Issue(t.Context(), ca.Request{Subject: catest.Subject("kube:c2", "p", "shop"), CSR: catest.CSR(t, catest.Key(t), nil)}); err != nil {
				t.Errorf("the other replica: %v", err)
			}
			if err := os.Remove(filepath.Join(dir, ca.BroughtKey)); err != nil {
				t.Fatal(err)
			}
			if _, err := replica(t, c.State, seal, func(cfg *ca.Config) { cfg.Root = brought(t, dir) }); err != nil {
				t.Errorf("a restart without the key: %v", err)
			}
			other := new(company).below(t, catest.Key(t), asIs).files(t)
			if _, err := replica(t, c.State, seal, func(cfg *ca.Config) { cfg.Root = brought(t, other) }); !errors.Is(err, ca.ErrBrought) {
				t.Errorf("another authority: %v, want ErrBrought", err)
			}
			elsewhere := func(cfg *ca.Config) { cfg.TrustDomain, err = ca.ParseTrustDomain("other.test") }
			if _, err := replica(t, c.State, seal, elsewhere); err == nil || !strings.Contains(err.Error(), "other.test") {
				t.Errorf("another trust domain: %v", err)
			}
		})
	}
}

func pemOf(cert *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
}

func opensslVerify(t *testing.T, issued ca.Issued) {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Log("openssl is not installed")
		return
	}
	dir, texts := t.TempDir(), issued.PEM()
	write(t, filepath.Join(dir, "leaf"), texts[0])
	write(t, filepath.Join(dir, "between"), strings.Join(texts[1:len(texts)-1], ""))
	write(t, filepath.Join(dir, "root"), texts[len(texts)-1])
	out, err := exec.Command(openssl, "verify", "-purpose", "sslserver",
		"-CAfile", filepath.Join(dir, "root"), "-untrusted", filepath.Join(dir, "between"), filepath.Join(dir, "leaf")).CombinedOutput()
	if err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
}

// What cannot be the authority of a mesh is refused before anything is made, and the reason names the remedy.
func TestAuthoritiesThatCannotBeBroughtAlong(t *testing.T) {
	t.Parallel()
	root := new(company).below(t, catest.Key(t), asIs)
	replaced := func(file, text string) string {
		dir := root.below(t, catest.Key(t), asIs).files(t)
		write(t, filepath.Join(dir, file), text)
		return dir
	}
	key := catest.Key(t)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	foreignKey := string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
	for name, test := range map[string]struct{ dir, want string }{
		"path length 0":            {root.below(t, key, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }).files(t), "pathlen:1"},
		"a length too short above": {root.below(t, key, func(c *x509.Certificate) { c.MaxPathLen = 1 }).below(t, key, asIs).files(t), "pathlen:2"},
		"a leaf":                   {root.below(t, key, func(c *x509.Certificate) { c.IsCA = false }).files(t), "CA:TRUE"},
		"without key usage":        {root.below(t, key, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }).files(t), "keyCertSign"},
		"expired":                  {root.below(t, key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }).files(t), "expired"},
		"too deep":                 {root.below(t, key, asIs).below(t, key, asIs).below(t, key, asIs).files(t), "at most 1"},
		"of another root":          {replaced(ca.BroughtRoots, pemOf(new(company).below(t, key, asIs).certs[0])), "does not lead to a root"},
		"another key":              {replaced(ca.BroughtKey, foreignKey), "is not the key of"},
		"a key with a passphrase":  {replaced(ca.BroughtKey, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAA==\n-----END ENCRYPTED PRIVATE KEY-----\n"), "passphrase"},
		"a broken key":             {replaced(ca.BroughtKey, "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"), "does not decode"},
		"a key for a certificate":  {replaced(ca.BroughtCertificate, foreignKey), "want certificates only"},
		"an empty file":            {replaced(ca.BroughtRoots, ""), "no certificate"},
		"a huge file":              {replaced(ca.BroughtChain, strings.Repeat("\n", 70_000)), "at most"},
		"no folder":                {filepath.Join(t.TempDir(), "none"), "no such file"},
	} {
		_, err := ca.ReadBrought(test.dir, time.Now())
		if !errors.Is(err, ca.ErrBrought) || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "c2VjcmV0") {
			t.Errorf("%s: %v; want %q", name, err, test.want)
		}
	}
	// What only shows when it is tried.
	elsewhere := root.below(t, key, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.test"} }).files(t)
	_, err = replica(t, new(ca.Memory), sealer(t), func(cfg *ca.Config) { cfg.Root = brought(t, elsewhere) })
	if !errors.Is(err, ca.ErrBrought) || !strings.Contains(err.Error(), "would not be believed") {
		t.Errorf("constrained to another trust domain: %v", err)
	}
	keyless := root.below(t, key, asIs).files(t)
	if err := os.Remove(filepath.Join(keyless, ca.BroughtKey)); err != nil {
		t.Fatal(err)
	}
	_, err = replica(t, new(ca.Memory), sealer(t), func(cfg *ca.Config) { cfg.Root = brought(t, keyless) })
	if !errors.Is(err, ca.ErrBrought) || !strings.Contains(err.Error(), ca.BroughtKey) {
		t.Errorf("without its key, at the first start: %v", err)
	}
}

// FuzzBrought: whatever is in the files is an error or an authority that leads to its roots.
func FuzzBrought(f *testing.F) {
	dir := new(company).below(f, catest.Key(f), asIs).below(f, catest.Key(f), asIs).files(f)
	read := func(name string) []byte {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			f.Fatal(err)
		}
		return text
	}
	f.Add(read(ca.BroughtCertificate), read(ca.BroughtKey), read(ca.BroughtChain), read(ca.BroughtRoots))
	f.Add([]byte{}, []byte("-----BEGIN RSA PRIVATE KEY-----\n-----END RSA PRIVATE KEY-----\n"), []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, cert, key, chain, roots []byte) {
		dir := t.TempDir()
		for name, text := range map[string][]byte{ca.BroughtCertificate: cert, ca.BroughtKey: key, ca.BroughtChain: chain, ca.BroughtRoots: roots} {
			write(t, filepath.Join(dir, name), string(text))
		}
		b, err := ca.ReadBrought(dir, time.Now())
		if err == nil && (b.Key == nil || len(b.Roots) == 0 || !b.Certificate.IsCA) {
			t.Errorf("read as %+v", b)
		}
	})
}
