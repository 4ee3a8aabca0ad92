// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bundle is the roots of one trust domain at one moment. It is immutable.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	// Sequence rises whenever the roots change, also across a restored backup.
	Sequence uint64
	// Roots in the order in which they were made. Do not modify.
	Roots []*x509.Certificate
}

// PEM is the roots as a file of certificates.
func (b Bundle) PEM() []byte {
	var out bytes.Buffer
	for _, root := range b.Roots {
		out.Write(certificatePEM(root))
	}
	return out.Bytes()
}

// Digest is the SHA-256 of PEM in hexadecimal: what a consumer names that holds the bundle.
func (b Bundle) Digest() string { return digest(b.PEM()) }

// Pool is a fresh pool of the roots.
func (b Bundle) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, root := range b.Roots {
		pool.AddCert(root)
	}
	return pool
}

// Fingerprints are the SHA-256 digests of the roots' DER in hexadecimal: what a machine pins that has nothing
// else to trust yet.
func (b Bundle) Fingerprints() []string {
	var out []string
	for _, root := range b.Roots {
		out = append(out, digest(root.Raw))
	}
	return out
}

func certificatePEM(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}
