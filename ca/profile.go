// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// leafPlan is everything a leaf will say, decided by Prepare.
type leafPlan struct {
	subject             Subject
	id                  spiffeid.ID
	dns                 []string
	ips                 []netip.Addr
	publicKey           any
	spki                []byte
	notBefore, notAfter time.Time
}

// template is the profile of leaves: the rules of X509-SVID. The organizational unit is the source,
// the serial number of the subject is the instance, so that a renewal and a stream know the workload.
func (p leafPlan) template(serial *big.Int) *x509.Certificate {
	var ips []net.IP
	for _, addr := range p.ips {
		ips = append(ips, addr.AsSlice())
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{OrganizationalUnit: []string{string(p.subject.Source)}, SerialNumber: p.subject.Instance},
		NotBefore:             p.notBefore,
		NotAfter:              p.notAfter,
		KeyUsage:              p.keyUsage(),
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          keyIdentifier(p.spki),
		URIs:                  []*url.URL{p.id.URL()},
		DNSNames:              p.dns,
		IPAddresses:           ips,
	}
}

// keyUsage adds what an RSA key is used for in TLS 1.2.
func (p leafPlan) keyUsage() x509.KeyUsage {
	if _, ok := p.publicKey.(*rsa.PublicKey); ok {
		return x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment
	}
	return x509.KeyUsageDigitalSignature
}

// rootTemplate is the profile of roots: rules.
func rootTemplate(td spiffeid.TrustDomain, serial *big.Int, notBefore, notAfter time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Isthmus"}, CommonName: "root of the mesh", SerialNumber: shortSerial(serial)},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: td.Name()}},
	}
}

// intermediateTemplate is the profile of a source's issuer: no further authority below it, and no name outside
// the trust domain.
func intermediateTemplate(td spiffeid.TrustDomain, source Source, serial *big.Int, notBefore, notAfter time.Time) *x509.Certificate {
	t := rootTemplate(td, serial, notBefore, notAfter)
	t.Subject = pkix.Name{
		Organization: []string{"Isthmus"}, OrganizationalUnit: []string{string(source)},
		CommonName: "issuer of the mesh", SerialNumber: shortSerial(serial),
	}
	t.MaxPathLenZero = true
	t.PermittedURIDomains = []string{td.Name()}
	t.PermittedDNSDomainsCritical = true // of the whole extension
	return t
}

// sign makes the certificate and reads it back.
func sign(template, parent *x509.Certificate, public any, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// signAuthority is sign for a root (no parent) or an intermediate, which has the identifier of its key.
func signAuthority(template, parent *x509.Certificate, public any, signer crypto.Signer) (*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("public key of an authority: %w", err)
	}
	template.SubjectKeyId = keyIdentifier(spki)
	if parent == nil {
		parent = template
	}
	return sign(template, parent, public, signer)
}

// newSerial is 128 random bits, never zero.
func newSerial() *big.Int {
	for {
		var b [16]byte
		rand.Read(b[:])
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n
		}
	}
}

// shortSerial makes the names of two authorities differ, for verifiers that look for issuers by name.
func shortSerial(serial *big.Int) string { return fmt.Sprintf("%032x", serial)[:16] }

// keyIdentifier is method 1 of RFC 7093: the leftmost 160 bits of SHA-256.
func keyIdentifier(spki []byte) []byte {
	sum := sha256.Sum256(spki)
	return sum[:20]
}

// authorityID names an issuer: its subject key identifier in hexadecimal.
func authorityID(cert *x509.Certificate) string { return hex.EncodeToString(cert.SubjectKeyId) }

// serialText is how serial numbers are written everywhere.
func serialText(n *big.Int) string { return fmt.Sprintf("%032x", n) }
