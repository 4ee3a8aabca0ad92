// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	oidSubjectKeyID    = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidAuthorityKeyID  = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidExtKeyUsage     = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidNameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}
)

// The extensions of each profile; a certificate with any other is not of the profile.
var (
	leafExtensions   = []asn1.ObjectIdentifier{oidKeyUsage, oidExtKeyUsage, oidBasicConstraints, oidSubjectKeyID, oidAuthorityKeyID, oidSubjectAltName}
	issuerExtensions = []asn1.ObjectIdentifier{oidKeyUsage, oidBasicConstraints, oidSubjectKeyID, oidAuthorityKeyID, oidSubjectAltName, oidNameConstraints}
)

// lint compares a finished leaf with what was decided and with the rules of X509-SVID, byte by byte where bytes
// count. It sees the certificate as a peer will, and shares nothing with the template it was made from. Sign
// asks it about every certificate before that leaves. Errors wrap ErrLint.
func (p leafPlan) lint(cert, issuer *x509.Certificate) error {
	for _, check := range []func() error{
		func() error { return lintCommon(cert, issuer, leafExtensions) },
		func() error { return p.lintNames(cert) },
		func() error { return checkUsage(cert) },
		func() error { return p.lintUsage(cert) },
		func() error { return p.lintSubject(cert) },
	} {
		if err := check(); err != nil {
			return fmt.Errorf("%w: leaf of %s: %w", ErrLint, p.id, err)
		}
	}
	return nil
}

// lintCommon is what holds for every certificate that an issuer signs.
func lintCommon(cert, issuer *x509.Certificate, allowed []asn1.ObjectIdentifier) error {
	switch bits := cert.SerialNumber.BitLen(); {
	case cert.Version != 3:
		return fmt.Errorf("version %d; want 3", cert.Version)
	case cert.SerialNumber.Sign() <= 0 || bits < 64 || bits > 159:
		return fmt.Errorf("serial number of %d bits; want 64 to 159", bits)
	case len(cert.Raw) > maxCertificate:
		return fmt.Errorf("%d bytes, at most %d", len(cert.Raw), maxCertificate)
	case !cert.NotBefore.Before(cert.NotAfter):
		return fmt.Errorf("it ends at %s, before it begins at %s", cert.NotAfter, cert.NotBefore)
	case cert.NotBefore.Before(issuer.NotBefore) || cert.NotAfter.After(issuer.NotAfter):
		return fmt.Errorf("valid %s to %s, outside of its issuer's %s to %s", cert.NotBefore, cert.NotAfter, issuer.NotBefore, issuer.NotAfter)
	case !bytes.Equal(cert.RawIssuer, issuer.RawSubject):
		return fmt.Errorf("the issuer's name is not that of %s", authorityID(issuer))
	case !bytes.Equal(cert.SubjectKeyId, keyIdentifier(cert.RawSubjectPublicKeyInfo)):
		return fmt.Errorf("subject key identifier %x is not that of the key", cert.SubjectKeyId)
	case !bytes.Equal(cert.AuthorityKeyId, issuer.SubjectKeyId) && !bytes.Equal(cert.Raw, issuer.Raw):
		return fmt.Errorf("authority key identifier %x; want %x", cert.AuthorityKeyId, issuer.SubjectKeyId)
	}
	if i := slices.IndexFunc(cert.Extensions, func(e pkix.Extension) bool {
		return !slices.ContainsFunc(allowed, e.Id.Equal)
	}); i >= 0 {
		return fmt.Errorf("unexpected extension %s", cert.Extensions[i].Id)
	}
	return nil
}

// lintNames wants exactly the names that were decided: ID-1 to ID-6 and.
func (p leafPlan) lintNames(cert *x509.Certificate) error {
	names, err := altNames(cert.Extensions)
	if err != nil {
		return err
	}
	ids := uris(names)
	if len(ids) != 1 || ids[0] != p.id.String() {
		return fmt.Errorf("URI names %q; want %q alone (X-1)", ids, p.id)
	}
	if id, err := ParseID(ids[0]); err != nil || id.Path() == "" {
		return fmt.Errorf("SPIFFE ID %q is none of a workload (X-2): %w", ids[0], err)
	}
	var dns []string
	var ips []netip.Addr
	for _, n := range names {
		switch addr, isAddr := netip.AddrFromSlice(n.bytes); {
		case n.kind == nameURI:
		case n.kind == nameDNS:
			dns = append(dns, string(n.bytes))
		case n.kind == nameIP && isAddr:
			ips = append(ips, addr)
		default:
			return fmt.Errorf("unexpected %s", n)
		}
	}
	if !slices.Equal(dns, p.dns) || !slices.Equal(ips, p.ips) {
		return fmt.Errorf("names %q and %v; want %q and %v", dns, ips, p.dns, p.ips)
	}
	return nil
}

// lintUsage is stricter than checkUsage, which looks at what others may have made.
func (p leafPlan) lintUsage(cert *x509.Certificate) error {
	if want := p.keyUsage(); cert.KeyUsage != want {
		return fmt.Errorf("key usage %b; want %b (X-5)", cert.KeyUsage, want)
	}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if !slices.Equal(cert.ExtKeyUsage, both) || len(cert.UnknownExtKeyUsage) > 0 {
		return fmt.Errorf("extended key usage %v; want server and client authentication (X-6)", cert.ExtKeyUsage)
	}
	return nil
}

// lintSubject compares key, validity and subject.
func (p leafPlan) lintSubject(cert *x509.Certificate) error {
	want := pkix.Name{OrganizationalUnit: []string{string(p.subject.Source)}, SerialNumber: p.subject.Instance}
	switch {
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, p.spki):
		return fmt.Errorf("it is for another key than the request's")
	case !cert.NotBefore.Equal(p.notBefore) || !cert.NotAfter.Equal(p.notAfter):
		return fmt.Errorf("valid %s to %s; decided were %s to %s", cert.NotBefore, cert.NotAfter, p.notBefore, p.notAfter)
	case cert.Subject.String() != want.String():
		return fmt.Errorf("subject %q; want %q", cert.Subject, want)
	}
	return nil
}

// lintAuthority is lint for roots (no source) and intermediates, and the house's own rules.
func lintAuthority(td spiffeid.TrustDomain, cert, issuer *x509.Certificate, source Source) error {
	err := lintCommon(cert, issuer, issuerExtensions)
	names, nameErr := altNames(cert.Extensions)
	critical := func(id asn1.ObjectIdentifier) bool {
		return slices.ContainsFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) && e.Critical })
	}
	switch ids := uris(names); {
	case err != nil:
	case nameErr != nil:
		err = nameErr
	case !cert.BasicConstraintsValid || !cert.IsCA || !critical(oidBasicConstraints):
		err = fmt.Errorf("critical basic constraints do not say that this is an authority (X-8)")
	case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || !critical(oidKeyUsage):
		err = fmt.Errorf("key usage %b; want that of certificates and lists, critical (X-8)", cert.KeyUsage)
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0:
		err = fmt.Errorf("an authority with extended key usage")
	case len(ids) != 1 || len(names) != 1 || ids[0] != "spiffe://"+td.Name():
		err = fmt.Errorf("names %q; want that of the trust domain alone (X-9, ID-9)", ids)
	case source != "":
		err = checkIssuer(td, cert, source)
	}
	if err != nil {
		return fmt.Errorf("%w: authority %s: %w", ErrLint, authorityID(cert), err)
	}
	return nil
}

// lintProfiles makes a certificate of every profile with throwaway keys, and looks at each as at any other, so
// that a trust domain whose certificates nobody could use (an IP address, for one) is refused at the start.
func lintProfiles(cfg Config, now time.Time) error {
	if err := lintChain(cfg, now); err != nil {
		return fmt.Errorf("trust domain %q cannot be used in certificates: %w", cfg.TrustDomain, err)
	}
	return nil
}

func lintChain(cfg Config, now time.Time) error {
	f, err := newLintFoundry(cfg, now)
	if err != nil {
		return err
	}
	asIs := func(*x509.Certificate) {}
	names, loopback := []string{"lint.example"}, []netip.Addr{netip.IPv6Loopback(), netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	return errors.Join(
		f.leaf(leafPlan{subject: Subject{"kube:lint", "lint", "lint", "lint"}, publicKey: lintKey().Public()}, asIs),
		f.leaf(leafPlan{subject: Subject{"vm:lint", "lint", "lint", "lint"}, publicKey: lintRSA()}, asIs),
		f.leaf(leafPlan{subject: lintControl(ControlAccount), publicKey: lintKey().Public(), dns: names, ips: loopback}, asIs),
		f.leaf(leafPlan{subject: lintControl(AdminAccount), publicKey: lintKey().Public()}, asIs),
	)
}

// lintFoundry makes chains that nobody will ever see.
type lintFoundry struct {
	cfg           Config
	now, from, to time.Time
	rootKey       crypto.Signer
	issuerKey     *ecdsa.PrivateKey
	root          *x509.Certificate
	pool          *x509.CertPool      // what is trusted
	above         []*x509.Certificate // presented after the intermediate
}

func newLintFoundry(cfg Config, now time.Time) (lintFoundry, error) {
	f := lintFoundry{cfg: cfg, now: now, from: now.Add(-cfg.Backdate), to: now.Add(time.Hour), rootKey: lintKey(), issuerKey: lintKey()}
	template := rootTemplate(cfg.TrustDomain, newSerial(), f.from, f.to)
	root, err := signAuthority(template, nil, f.rootKey.Public(), f.rootKey)
	if err != nil {
		return f, err
	}
	f.root, f.pool = root, x509.NewCertPool()
	f.pool.AddCert(root)
	return f, lintAuthority(cfg.TrustDomain, root, root, "")
}

// leaf makes and checks one leaf, whose template change may spoil, and its intermediate.
func (f lintFoundry) leaf(plan leafPlan, change func(*x509.Certificate)) error {
	td, source := f.cfg.TrustDomain, plan.subject.Source
	issuer, err := signAuthority(intermediateTemplate(td, source, newSerial(), f.from, f.to), f.root, f.issuerKey.Public(), f.rootKey)
	if err == nil {
		err = lintAuthority(td, issuer, f.root, source)
	}
	if err != nil {
		return err
	}
	if plan.id, err = plan.subject.ID(td); err != nil {
		return err
	}
	if plan.spki, err = x509.MarshalPKIXPublicKey(plan.publicKey); err != nil {
		return err
	}
	plan.notBefore, plan.notAfter = f.from.Truncate(time.Second), f.to.Truncate(time.Second)
	template := plan.template(newSerial())
	change(template)
	leaf, err := sign(template, issuer, plan.publicKey, f.issuerKey)
	if err == nil {
		err = plan.lint(leaf, issuer)
	}
	if err != nil {
		return err
	}
	_, err = VerifyChain(td, f.pool, f.now, append([]*x509.Certificate{leaf, issuer}, f.above...))
	return err
}

func lintKey() *ecdsa.PrivateKey {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader) // fails for unknown curves only
	return key
}

func lintControl(account string) Subject {
	return Subject{Source: SourceMeshd, Instance: "lint", Namespace: ControlNamespace, ServiceAccount: account}
}

// lintRSA is a public key that nobody has the private half of: making a real one takes a fifth of a second.
func lintRSA() *rsa.PublicKey {
	n := new(big.Int).SetBit(big.NewInt(1), 2047, 1)
	return &rsa.PublicKey{N: n, E: 65537}
}
