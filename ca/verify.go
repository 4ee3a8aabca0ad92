// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of a peer's chain: how many certificates, and how many bytes each.
const (
	maxChain       = 4
	maxCertificate = 16 << 10
)

// VerifyChain tells who the holder of a chain is. The leaf comes first; the root may be missing. It applies
// path validation with the domain's own roots, the leaf rules of X509-SVID, and the house's own: what signed the
// leaf is an intermediate of a source, below which there is no authority, and the source in the leaf is the one
// in the intermediate. Errors wrap ErrUntrusted.
//
// It says nothing about revocation; see [Authority.Revoked].
func VerifyChain(td spiffeid.TrustDomain, roots *x509.CertPool, now time.Time, chain []*x509.Certificate) (Identity, error) {
	identity, _, err := verifyChain(td, roots, now, chain)
	return identity, err
}

// verifyChain also gives the path to the root.
func verifyChain(td spiffeid.TrustDomain, roots *x509.CertPool, now time.Time, chain []*x509.Certificate) (Identity, []*x509.Certificate, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return Identity{}, nil, fmt.Errorf("%w: chain of %d certificates; want 2 to %d", ErrUntrusted, len(chain), maxChain)
	}
	for i, cert := range chain {
		if len(cert.Raw) > maxCertificate {
			return Identity{}, nil, fmt.Errorf("%w: certificate %d has %d bytes, at most %d", ErrUntrusted, i, len(cert.Raw), maxCertificate)
		}
	}
	leaf := chain[0]
	identity, err := checkLeaf(td, leaf)
	if err != nil {
		return Identity{}, nil, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	between := x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	paths, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now,
		// Checked by checkLeaf, which wants both usages where the library wants one of a list.
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return Identity{}, nil, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	for _, path := range paths {
		if len(path) < 3 {
			err = fmt.Errorf("path of %d certificates; want leaf, intermediate, root", len(path))
			continue
		}
		if err = checkIssuer(td, path[1], identity.Source); err == nil {
			identity.Authority = authorityID(path[1])
			return identity, path, nil
		}
	}
	return Identity{}, nil, fmt.Errorf("%w: %w", ErrUntrusted, err)
}

// checkLeaf applies the leaf rules, each named in the error as in the specification's checklist.
func checkLeaf(td spiffeid.TrustDomain, leaf *x509.Certificate) (Identity, error) {
	names, err := altNames(leaf.Extensions)
	if err != nil {
		return Identity{}, err
	}
	ids := uris(names)
	if len(ids) != 1 {
		return Identity{}, fmt.Errorf("%d URI names; want exactly one (X-1)", len(ids))
	}
	id, err := ParseID(ids[0])
	if err != nil {
		return Identity{}, err
	}
	if id.Path() == "" {
		return Identity{}, fmt.Errorf("SPIFFE ID %q names a trust domain, not a workload (X-2)", id)
	}
	if !id.MemberOf(td) {
		return Identity{}, fmt.Errorf("SPIFFE ID %q is not of trust domain %q (X-12)", id, td)
	}
	if err := checkUsage(leaf); err != nil {
		return Identity{}, err
	}
	namespace, account, err := workloadOf(id)
	if err != nil {
		return Identity{}, err
	}
	if len(leaf.Subject.OrganizationalUnit) != 1 {
		return Identity{}, fmt.Errorf("%d organizational units; want one, the source", len(leaf.Subject.OrganizationalUnit))
	}
	identity := Identity{
		Subject: Subject{
			Source: Source(leaf.Subject.OrganizationalUnit[0]), Instance: leaf.Subject.SerialNumber,
			Namespace: namespace, ServiceAccount: account,
		},
		ID: id, Serial: serialText(leaf.SerialNumber), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
	}
	return identity, identity.Check()
}

// checkUsage applies: what the key of a leaf may and may not do.
func checkUsage(leaf *x509.Certificate) error {
	if !leaf.BasicConstraintsValid || leaf.IsCA {
		return fmt.Errorf("basic constraints do not say that this is a leaf (X-4, X-7)")
	}
	critical := slices.ContainsFunc(leaf.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidKeyUsage) && e.Critical })
	if !critical {
		return fmt.Errorf("key usage missing or not critical (X-5)")
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return fmt.Errorf("key usage %b: want digital signature, no signing of certificates or lists (X-5)", leaf.KeyUsage)
	}
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 {
		return nil
	}
	if !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return fmt.Errorf("extended key usage without both server and client authentication (X-6)")
	}
	return nil
}

// checkIssuer applies the house's rules for intermediates.
func checkIssuer(td spiffeid.TrustDomain, issuer *x509.Certificate, source Source) error {
	if !issuer.MaxPathLenZero || issuer.MaxPathLen != 0 {
		return fmt.Errorf("intermediate %s may have further authorities below it", authorityID(issuer))
	}
	if !slices.Equal(issuer.PermittedURIDomains, []string{td.Name()}) || !issuer.PermittedDNSDomainsCritical {
		return fmt.Errorf("intermediate %s is not constrained to trust domain %q", authorityID(issuer), td)
	}
	if units := issuer.Subject.OrganizationalUnit; len(units) != 1 || Source(units[0]) != source {
		return fmt.Errorf("source in the certificate is %q, its intermediate is that of %q", source, units)
	}
	return nil
}
