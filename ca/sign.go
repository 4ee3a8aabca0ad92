// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Issued is a certificate and what a peer needs to believe it.
type Issued struct {
	Leaf         *x509.Certificate
	Intermediate *x509.Certificate
	Above        []*x509.Certificate // between intermediate and root: of an authority that was brought along, or a bridge
	Roots        []*x509.Certificate // the active one last
}

// Chain is what a TLS peer presents: the leaf, the intermediate, and what is above that and below the root.
func (i Issued) Chain() []*x509.Certificate {
	return append([]*x509.Certificate{i.Leaf, i.Intermediate}, i.Above...)
}

// ChainDER is Chain as crypto/tls wants it.
func (i Issued) ChainDER() [][]byte {
	var out [][]byte
	for _, cert := range i.Chain() {
		out = append(out, cert.Raw)
	}
	return out
}

// PEM is the chain, one certificate each, and at the end all roots in one: several while one replaces another.
func (i Issued) PEM() []string {
	var out []string
	for _, cert := range i.Chain() {
		out = append(out, string(certificatePEM(cert)))
	}
	var roots []byte
	for _, cert := range i.Roots {
		roots = append(roots, certificatePEM(cert)...)
	}
	return append(out, string(roots))
}

// ChainPEM is Chain as a file.
func (i Issued) ChainPEM() []byte {
	var out []byte
	for _, cert := range i.Chain() {
		out = append(out, certificatePEM(cert)...)
	}
	return out
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
	v := a.view.Load()
	above := v.above[hex.EncodeToString(p.issuer.cert.AuthorityKeyId)]
	return Issued{Leaf: leaf, Intermediate: p.issuer.cert, Above: above, Roots: v.rootsActiveLast(p.issuer.cert, above)}, nil
}

// rootsActiveLast orders the bundle so that the root to which the issuer leads comes last.
func (v *view) rootsActiveLast(issuer *x509.Certificate, above []*x509.Certificate) []*x509.Certificate {
	top := issuer
	direct := func(root *x509.Certificate) bool { return bytes.Equal(issuer.AuthorityKeyId, root.SubjectKeyId) }
	if len(above) > 0 && !slices.ContainsFunc(v.bundle.Roots, direct) {
		top = above[len(above)-1]
	}
	var others, own []*x509.Certificate
	for _, root := range v.bundle.Roots {
		if bytes.Equal(top.AuthorityKeyId, root.SubjectKeyId) {
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
