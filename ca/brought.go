// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// The files of an authority that is brought along: the layout of Istio's secret cacerts.
const (
	BroughtCertificate = "ca-cert.pem"    // signs the issuers of clusters and networks
	BroughtKey         = "ca-key.pem"     // its private key
	BroughtChain       = "cert-chain.pem" // it, and what lies between it and the root; optional
	BroughtRoots       = "root-cert.pem"  // what everybody trusts; several while one replaces another
)

// maxBrought bounds each of these files.
const maxBrought = 64 << 10

// ErrBrought: the authority that was brought along cannot be that of a mesh, or is not that of this one.
var ErrBrought = errors.New("authority that was brought along not usable")

// Brought is an authority that was made elsewhere, below a root whose key meshd never sees.
type Brought struct {
	// Certificate signs the issuers of the sources.
	Certificate *x509.Certificate
	// Key of Certificate. Without it the authority can only be recognised.
	Key crypto.Signer
	// Between are the authorities between Certificate and a root, the one that signed Certificate first.
	Between []*x509.Certificate
	// Roots are what is trusted.
	Roots []*x509.Certificate
}

// ReadBrought reads the files in a folder. Errors wrap ErrBrought and say what would be right.
func ReadBrought(dir string, now time.Time) (*Brought, error) {
	b, err := readBrought(dir, now)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrBrought, dir, err)
	}
	return b, nil
}

func readBrought(dir string, now time.Time) (*Brought, error) {
	own, err := readCertificates(filepath.Join(dir, BroughtCertificate))
	if err != nil {
		return nil, err
	}
	b := &Brought{Certificate: own[0]}
	if b.Roots, err = readCertificates(filepath.Join(dir, BroughtRoots)); err != nil {
		return nil, err
	}
	chain, err := readCertificates(filepath.Join(dir, BroughtChain))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := b.connect(append(own[1:], chain...), now); err != nil {
		return nil, err
	}
	if err := b.check(); err != nil {
		return nil, err
	}
	text, err := readLimited(filepath.Join(dir, BroughtKey))
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil // it may have been taken away after it was sealed
	}
	if err != nil {
		return nil, err
	}
	if b.Key, err = parseKey(text); err != nil {
		return nil, fmt.Errorf("%s: %w", BroughtKey, err)
	}
	public, ok := b.Certificate.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(b.Key.Public()) {
		return nil, fmt.Errorf("%s is not the key of %s", BroughtKey, BroughtCertificate)
	}
	return b, nil
}

// connect finds the way from the certificate to a root.
func (b *Brought) connect(chain []*x509.Certificate, now time.Time) error {
	options := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, root := range b.Roots {
		options.Roots.AddCert(root)
	}
	for _, cert := range chain {
		options.Intermediates.AddCert(cert)
	}
	paths, err := b.Certificate.Verify(options)
	if err != nil {
		return fmt.Errorf("%s does not lead to a root of %s: %w", BroughtCertificate, BroughtRoots, err)
	}
	shortest := slices.MinFunc(paths, func(x, y []*x509.Certificate) int { return len(x) - len(y) })
	if len(shortest) > 1 {
		b.Between = shortest[1 : len(shortest)-1]
	}
	// A workload presents its own certificate, its issuer's, this one and those between.
	if n := 3 + len(b.Between); n > maxChain {
		return fmt.Errorf("%d authorities between %s and the root; at most %d", len(b.Between), BroughtCertificate, maxChain-3)
	}
	return nil
}

// check says what keeps the certificate from signing authorities.
func (b *Brought) check() error {
	for i, cert := range append([]*x509.Certificate{b.Certificate}, b.Between...) {
		name := fmt.Sprintf("the authority %q", cert.Subject)
		switch {
		case !cert.BasicConstraintsValid || !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0:
			return fmt.Errorf("%s may not sign certificates: want CA:TRUE and the key usage keyCertSign", name)
		case cert.MaxPathLen >= 0 && cert.MaxPathLen < i+1:
			return fmt.Errorf("%s has path length %d: the mesh makes an authority for each cluster below it, so it needs %d or more (or none at all); have it reissued with pathlen:%d",
				name, cert.MaxPathLen, i+1, i+1)
		case len(cert.SubjectKeyId) == 0:
			return fmt.Errorf("%s has no subject key identifier; have it reissued with one", name)
		}
	}
	if err := checkAuthorityKey(b.Certificate.PublicKey); err != nil {
		return fmt.Errorf("%s: %w", BroughtCertificate, err)
	}
	for _, root := range b.Roots {
		if !root.IsCA || len(root.SubjectKeyId) == 0 {
			return fmt.Errorf("the root %q is no authority with a subject key identifier", root.Subject)
		}
	}
	return nil
}

// try issues a throwaway certificate below the authority, so that name constraints and whatever else might keep
// the mesh's certificates from being believed is found before there are any.
func (b *Brought) try(cfg Config, now time.Time) error {
	if b.Key == nil {
		return fmt.Errorf("%w: %s is missing; it is needed once, and sealed then", ErrBrought, BroughtKey)
	}
	f := lintFoundry{cfg: cfg, now: now, from: now.Add(-cfg.Backdate), to: now.Add(time.Hour), root: b.Certificate, rootKey: b.Key, issuerKey: lintKey(), pool: x509.NewCertPool(), above: b.above()}
	if f.from.Before(b.Certificate.NotBefore) {
		f.from = b.Certificate.NotBefore
	}
	if f.to.After(b.Certificate.NotAfter) {
		f.to = b.Certificate.NotAfter
	}
	for _, root := range b.Roots {
		f.pool.AddCert(root)
	}
	err := f.leaf(leafPlan{subject: Subject{"kube:lint", "lint", "lint", "lint"}, publicKey: lintKey().Public()}, func(*x509.Certificate) {})
	if err != nil {
		return fmt.Errorf("%w: certificates below it would not be believed: %w", ErrBrought, err)
	}
	return nil
}

// above is what a workload presents besides its own certificate and its issuer's: nothing, if the certificate
// is itself a root.
func (b *Brought) above() []*x509.Certificate {
	if slices.ContainsFunc(b.Roots, b.Certificate.Equal) {
		return nil
	}
	return append([]*x509.Certificate{b.Certificate}, b.Between...)
}

// record is how it is kept.
func (b *Brought) record(ctx context.Context, keys Keys, now time.Time) (issuerRecord, error) {
	stored, err := keys.Import(ctx, recordKey(ScopeRoot), b.Key)
	if err != nil {
		return issuerRecord{}, err
	}
	r := issuerRecord{ID: authorityID(b.Certificate), Phase: PhaseActive, Epoch: 1, Since: now.UTC(), Certificate: b.Certificate.Raw, Key: stored}
	for _, cert := range b.Between {
		r.Between = append(r.Between, cert.Raw)
	}
	for _, cert := range b.Roots {
		r.Anchors = append(r.Anchors, cert.Raw)
	}
	return r, nil
}

// is tells whether a record is of this authority.
func (b *Brought) is(r issuerRecord) bool { return bytes.Equal(r.Certificate, b.Certificate.Raw) }

func readLimited(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxBrought {
		return nil, fmt.Errorf("%s: %d bytes; want a file of at most %d", filepath.Base(path), info.Size(), maxBrought)
	}
	return os.ReadFile(path)
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	text, err := readLimited(path)
	if err != nil {
		return nil, err
	}
	certs, err := parseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return certs, nil
}

// parseCertificates reads a file of certificates in PEM, and nothing else.
func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block %q; want certificates only", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if len(cert.Raw) > maxCertificate {
			return nil, fmt.Errorf("a certificate of %d bytes, at most %d", len(cert.Raw), maxCertificate)
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errors.New("no certificate in PEM")
	}
	return out, nil
}

// parseKey reads a private key in PEM. Errors contain nothing of it.
func parseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("no key in PEM")
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("a PEM block %.40q; want a private key without a passphrase", block.Type)
	}
	if err != nil {
		return nil, errors.New("the private key does not decode")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T", key)
	}
	return signer, checkAuthorityKey(signer.Public())
}

// checkAuthorityKey is what an authority that was brought along may sign with. It signs seldom.
func checkAuthorityKey(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits >= 2048 && bits <= 4096 {
			return nil
		}
	}
	return fmt.Errorf("key of type %T; want ECDSA on P-256 or P-384, or RSA of 2048 to 4096 bits", key)
}
