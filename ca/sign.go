// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Issued is a certificate and what a peer needs to believe it.
type Issued struct {
	Leaf         *x509.Certificate
	Intermediate *x509.Certificate
	Roots        []*x509.Certificate // the active one last
}

// PEM is the leaf, the intermediate, and the root that signed it, one certificate each.
func (i Issued) PEM() []string {
	return []string{
		string(certificatePEM(i.Leaf)), string(certificatePEM(i.Intermediate)),
		string(certificatePEM(i.Roots[len(i.Roots)-1])),
	}
}

// ChainPEM is what a TLS peer presents: the leaf and the intermediate.
func (i Issued) ChainPEM() []byte {
	return append(certificatePEM(i.Leaf), certificatePEM(i.Intermediate)...)
}

// Sign signs what was prepared, and nothing else. The certificate is in the audit log before it is returned;
// if it cannot be, it is not returned.
func (a *Authority) Sign(_ context.Context, token Prepared) (Issued, error) {
	p := token.p
	if p == nil || p.by != a || !p.used.CompareAndSwap(false, true) {
		return Issued{}, fmt.Errorf("%w: it was used before, or never prepared here", ErrSpent)
	}
	now := a.cfg.Clock()
	if age := now.Sub(p.at); age > preparedFor || age < -preparedFor {
		return Issued{}, fmt.Errorf("%w: prepared %v ago, good for %v", ErrSpent, age, preparedFor)
	}
	entry := p.audit
	entry.SPIFFEID, entry.Key = p.plan.id.String(), digest(p.plan.spki)
	if err := a.Revoked(p.plan.subject.Source, p.plan.subject.Instance); err != nil { // since Prepare
		entry.Event, entry.Reason = AuditRefused, err.Error()
		if audit := a.cfg.Audit.Append(entry); audit != nil {
			return Issued{}, audit
		}
		return Issued{}, err
	}
	serial := newSerial()
	leaf, err := sign(p.plan.template(serial), p.issuer.cert, p.plan.publicKey, p.issuer.signer)
	if err != nil {
		return Issued{}, fmt.Errorf("sign for %s: %w", p.plan.id, err)
	}
	if err := p.plan.lint(leaf, p.issuer.cert); err != nil { // a bug here must not become a certificate there
		a.cfg.Log.Error("a certificate was thrown away", "serial", serialText(serial), "error", err)
		entry.Event, entry.Serial, entry.Reason = AuditRefused, serialText(serial), err.Error()
		return Issued{}, errors.Join(err, a.cfg.Audit.Append(entry))
	}
	entry.Event, entry.Serial = AuditIssued, serialText(serial)
	entry.Authority, entry.Epoch = p.issuer.id, p.issuer.epoch
	entry.NotBefore, entry.NotAfter = &leaf.NotBefore, &leaf.NotAfter
	if err := a.cfg.Audit.Append(entry); err != nil {
		return Issued{}, err
	}
	return Issued{Leaf: leaf, Intermediate: p.issuer.cert, Roots: a.rootsActiveLast(p.issuer)}, nil
}

// rootsActiveLast orders the bundle so that the root which signed the issuer comes last.
func (a *Authority) rootsActiveLast(i *issuer) []*x509.Certificate {
	var others, own []*x509.Certificate
	for _, root := range a.Bundle().Roots {
		if bytes.Equal(i.cert.AuthorityKeyId, root.SubjectKeyId) {
			own = append(own, root)
		} else {
			others = append(others, root)
		}
	}
	return append(others, own...)
}

// Issue is Prepare and Sign.
func (a *Authority) Issue(ctx context.Context, req Request) (Issued, error) {
	p, err := a.Prepare(ctx, req)
	if err != nil {
		return Issued{}, err
	}
	return a.Sign(ctx, p)
}

// RenewAt is when the holder of a certificate should ask for the next one: somewhere between 45 % and 55 % of
// its life, at a moment that its serial number decides, so that a fleet that started at once does not renew at
// once.
func RenewAt(cert *x509.Certificate) time.Time {
	sum := keyIdentifier(cert.SerialNumber.Bytes())
	jitter := float64(binary.BigEndian.Uint32(sum)) / (1 << 32) // [0, 1)
	life := cert.NotAfter.Sub(cert.NotBefore)
	return cert.NotBefore.Add(time.Duration((0.45 + 0.1*jitter) * float64(life)))
}

func (c *CSR) isRSA() bool {
	_, ok := c.publicKey.(*rsa.PublicKey)
	return ok
}
