// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

var (
	// ErrNoCertificate means that no certificate was obtained yet.
	ErrNoCertificate = errors.New("no workload certificate yet")
	// ErrBadChain means that the certificate service answered with something
	// that is not a leaf for our key, followed by its issuers and the root.
	ErrBadChain = errors.New("unusable certificate chain")
	// ErrRefused means that the certificate service does not accept the
	// present certificate for a renewal.
	ErrRefused = errors.New("renewal by certificate refused")
)

// Certificate is one issued workload certificate with its key and the roots to
// verify peers with. It is immutable: share it, never change it.
type Certificate struct {
	// Leaf is the parsed workload certificate.
	Leaf *x509.Certificate
	// KeyPEM is the private key, PKCS #8.
	KeyPEM []byte
	// ChainPEM is the leaf followed by its intermediates.
	ChainPEM []byte
	// RootsPEM is the trust bundle that came with the answer.
	RootsPEM []byte
	// TLS is key and chain for use in a handshake.
	TLS tls.Certificate
	// Obtained is when it was received by the local clock. The zero time means
	// it was read from disk.
	Obtained time.Time
}

// URI returns the SPIFFE ID of the leaf, empty if it has none.
func (c *Certificate) URI() string {
	if len(c.Leaf.URIs) == 0 {
		return ""
	}
	return c.Leaf.URIs[0].String()
}

// ValidAt tells whether the leaf can be used at that time.
func (c *Certificate) ValidAt(now time.Time) bool {
	return now.Before(c.Leaf.NotAfter)
}

// newKey makes a P-256 key.
func newKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make workload key: %w", err)
	}
	return key, nil
}

// request makes a certificate request that names nobody: who we are follows
// from the credential.
func request(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode workload key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// assemble checks what the service answered: leaf first, intermediates, and
// the roots in the last element (which may hold several).
func assemble(key crypto.Signer, chain []string) (*Certificate, error) {
	if len(chain) < 2 {
		return nil, fmt.Errorf("%w: %d elements, want at least leaf and root", ErrBadChain, len(chain))
	}
	last := len(chain) - 1
	var ders [][]byte
	for i, element := range chain[:last] {
		certs, err := parseCertificates([]byte(element))
		if err != nil {
			return nil, fmt.Errorf("%w: element %d: %w", ErrBadChain, i, err)
		}
		for _, c := range certs {
			ders = append(ders, c.Raw)
		}
	}
	roots, err := parseCertificates([]byte(chain[last]))
	if err != nil {
		return nil, fmt.Errorf("%w: root: %w", ErrBadChain, err)
	}
	leaf, err := x509.ParseCertificate(ders[0])
	if err != nil {
		return nil, fmt.Errorf("%w: leaf: %w", ErrBadChain, err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	cert := &Certificate{
		Leaf:     leaf,
		KeyPEM:   keyPEM,
		ChainPEM: encodeDERs(ders),
		RootsPEM: encodeCertificates(roots),
		TLS:      tls.Certificate{Certificate: ders, PrivateKey: key, Leaf: leaf},
	}
	return cert, cert.verify(key, roots)
}

// verify refuses a chain that peers would refuse later, where nobody would
// know why.
func (c *Certificate) verify(key crypto.Signer, roots []*x509.Certificate) error {
	public, ok := c.Leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(key.Public()) {
		return fmt.Errorf("%w: the leaf is for another key", ErrBadChain)
	}
	if len(c.Leaf.URIs) != 1 || c.Leaf.URIs[0].Scheme != "spiffe" {
		return fmt.Errorf("%w: the leaf has %d URI names, want one spiffe:// name", ErrBadChain, len(c.Leaf.URIs))
	}
	options := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		// The leaf's own time, so that a clock that is behind here does not
		// reject what the rest of the mesh accepts.
		CurrentTime: c.Leaf.NotBefore.Add(c.Leaf.NotAfter.Sub(c.Leaf.NotBefore) / 2),
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, root := range roots {
		options.Roots.AddCert(root)
	}
	for _, der := range c.TLS.Certificate[1:] {
		if issuer, err := x509.ParseCertificate(der); err == nil {
			options.Intermediates.AddCert(issuer)
		}
	}
	if _, err := c.Leaf.Verify(options); err != nil {
		return fmt.Errorf("%w: %w", ErrBadChain, err)
	}
	return nil
}

// Bundle joins PEM bundles of roots: each certificate once, in order.
// What is not a certificate is left out.
func Bundle(bundles ...[]byte) []byte {
	var all []*x509.Certificate
	for _, b := range bundles {
		certs, err := parseCertificates(b)
		if err != nil {
			continue
		}
		for _, c := range certs {
			known := false
			for _, have := range all {
				known = known || have.Equal(c)
			}
			if !known {
				all = append(all, c)
			}
		}
	}
	return encodeCertificates(all)
}

func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("no PEM certificate in it")
	}
	return certs, nil
}

func encodeCertificates(certs []*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a buffer never fails
	}
	return out.Bytes()
}

func encodeDERs(ders [][]byte) []byte {
	var out bytes.Buffer
	for _, der := range ders {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a buffer never fails
	}
	return out.Bytes()
}
