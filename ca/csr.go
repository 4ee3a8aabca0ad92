// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// MaxCSR is the most bytes a certificate request may have, in PEM or DER.
const MaxCSR = 10 << 10

// CSR is a certificate request whose signature proves that the asker holds the key. Only the key of it is ever
// used; the names are there to be compared with what the credential says.
type CSR struct {
	publicKey any // *ecdsa.PublicKey on P-256 or *rsa.PublicKey
	spki      []byte
	names     []generalName
	wantsCA   bool
}

// KeyThumbprint is the SHA-256 of the subject public key info, in hexadecimal.
func (c *CSR) KeyThumbprint() string { return digest(c.spki) }

// ParseCSR reads a certificate request, in PEM (one block, nothing around it) or DER. Errors wrap ErrRequest.
func ParseCSR(text []byte) (*CSR, error) {
	if len(text) > MaxCSR {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrRequest, len(text), MaxCSR)
	}
	der, err := csrDER(text)
	if err != nil {
		return nil, err
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrRequest, err)
	}
	if err := checkKey(req.PublicKey); err != nil { // before the signature: its size bounds the work
		return nil, err
	}
	if !slices.Contains(csrAlgorithms, req.SignatureAlgorithm) {
		return nil, fmt.Errorf("%w: signature algorithm %v; want SHA-256 or better", ErrRequest, req.SignatureAlgorithm)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: no proof of possession: %v", ErrRequest, err)
	}
	names, err := altNames(req.Extensions)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrRequest, err)
	}
	c := &CSR{publicKey: req.PublicKey, spki: req.RawSubjectPublicKeyInfo, names: names}
	for _, ext := range req.Extensions {
		// SEQUENCE { BOOLEAN TRUE … }: a leaf's is an empty sequence.
		if ext.Id.Equal(oidBasicConstraints) && len(ext.Value) > 2 {
			c.wantsCA = true
		}
	}
	return c, nil
}

var csrAlgorithms = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
	x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
}

func csrDER(text []byte) ([]byte, error) {
	if !bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte("-----BEGIN")) {
		return text, nil
	}
	block, rest := pem.Decode(text)
	switch {
	case block == nil:
		return nil, fmt.Errorf("%w: broken PEM", ErrRequest)
	case block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST":
		return nil, fmt.Errorf("%w: PEM block is %q; want CERTIFICATE REQUEST", ErrRequest, block.Type)
	case len(block.Headers) > 0 || len(bytes.TrimSpace(rest)) > 0:
		return nil, fmt.Errorf("%w: more than one plain PEM block", ErrRequest)
	}
	return block.Bytes, nil
}

// checkKey accepts P-256, and RSA of 2048 to 4096 bits.
func checkKey(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return nil
		}
		return fmt.Errorf("%w: ECDSA key on %s; want P-256", ErrRequest, k.Curve.Params().Name)
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 || bits > 4096 {
			return fmt.Errorf("%w: RSA key of %d bits; want P-256, or RSA of 2048 to 4096 bits from Istio's agent", ErrRequest, bits)
		}
		if k.E < 65537 || k.E&1 == 0 {
			return fmt.Errorf("%w: RSA key with exponent %d; want 65537", ErrRequest, k.E)
		}
		return nil
	}
	return fmt.Errorf("%w: key of type %T; want P-256", ErrRequest, key)
}

// checkNames refuses a request that asks for anything but what was decided: the identity and, for the control
// service's own certificates, its configured names. Asking for nothing is fine.
func (c *CSR) checkNames(id string, dns []string, ips []netip.Addr) error {
	if c.wantsCA {
		return fmt.Errorf("%w: it asks for the certificate of an authority", ErrForeignName)
	}
	seenURI := false
	for _, n := range c.names {
		ok := false
		switch n.kind {
		case nameURI:
			ok = string(n.bytes) == id && !seenURI
			seenURI = true
		case nameDNS:
			ok = slices.Contains(dns, string(n.bytes))
		case nameIP:
			addr, valid := netip.AddrFromSlice(n.bytes)
			ok = valid && slices.Contains(ips, addr)
		}
		if !ok {
			return fmt.Errorf("%w: it asks for %s, the credential is for %s", ErrForeignName, n, id)
		}
	}
	return nil
}

// String shows a name for messages and the audit log, with everything unprintable escaped.
func (n generalName) String() string {
	switch n.kind {
	case nameURI:
		return fmt.Sprintf("URI %.256q", n.bytes)
	case nameDNS:
		return fmt.Sprintf("DNS name %.256q", n.bytes)
	case nameIP:
		return "address " + net.IP(n.bytes).String()
	}
	shown := n.bytes[:min(len(n.bytes), 64)]
	return fmt.Sprintf("name of kind %d (%s)", n.kind, hex.EncodeToString(shown))
}
