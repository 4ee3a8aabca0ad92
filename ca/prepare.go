// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"
)

// preparedFor is how long a Prepared may wait for its signature.
const preparedFor = 30 * time.Second

// Credential is how the subject was proven. It decides nothing here; it ends up in the audit log.
type Credential struct {
	Method string // "kubernetes-token", "join-token", "certificate", …
	Digest string // SHA-256 of the token or certificate, hexadecimal
	Peer   string // network address of who asked, if known
	Note   string // anything a reader of the log should know
}

// Request is a wish for a certificate, together with what was attested about who wishes.
type Request struct {
	// Subject is the attested identity. It, and not the CSR, says what the certificate will be for.
	Subject    Subject
	Credential Credential
	// CSR is the certificate request in PEM or DER.
	CSR []byte
	// Lifetime that is wished for; zero for the default. It is clamped, never refused.
	Lifetime time.Duration
	// LifetimeLimit is the longest lifetime that the attestation is good for; zero for no further limit.
	LifetimeLimit time.Duration
	// AllowRSA accepts RSA keys, which Istio's agent may be configured to make.
	AllowRSA bool
	// DNSNames and Addresses become names of the certificate. Only for meshd's own, from its configuration.
	DNSNames  []string
	Addresses []netip.Addr
}

// Prepared is a certificate that has been decided on and not been signed. It is good for one signature, soon.
// Only Prepare makes one; the zero value signs nothing.
type Prepared struct{ p *prepared }

type prepared struct {
	by     *Authority
	used   atomic.Bool
	at     time.Time
	plan   leafPlan
	issuer *issuer
	audit  AuditEntry
}

// SPIFFEID is the identity that was decided on, for logs.
func (p Prepared) SPIFFEID() string {
	if p.p == nil {
		return ""
	}
	return p.p.plan.id.String()
}

// KeyThumbprint is the SHA-256 of the public key that will be certified, in hexadecimal.
func (p Prepared) KeyThumbprint() string {
	if p.p == nil {
		return ""
	}
	return digest(p.p.plan.spki)
}

// NotAfter is when the certificate will end.
func (p Prepared) NotAfter() time.Time {
	if p.p == nil {
		return time.Time{}
	}
	return p.p.plan.notAfter
}

// Prepare decides what a request gets, or refuses it. A refusal is in the audit log when Prepare returns.
//
// The decision itself is pure, see decide. What is not pure comes before it: a source that has no issuer yet, or
// one that grows old, is given one.
func (a *Authority) Prepare(ctx context.Context, req Request) (Prepared, error) {
	p, err := a.prepare(ctx, req)
	if err != nil {
		return Prepared{}, a.Refuse(req, err)
	}
	return Prepared{p}, nil
}

func (a *Authority) prepare(ctx context.Context, req Request) (*prepared, error) {
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	now := a.cfg.Clock()
	plan, err := a.cfg.decide(a.view.Load(), req, now)
	if err != nil {
		return nil, err
	}
	issuer, err := a.issuerFor(ctx, req.Subject.Source)
	if err != nil {
		return nil, err
	}
	if plan.notBefore, plan.notAfter, err = a.cfg.validity(a.view.Load(), req, issuer, now); err != nil {
		return nil, err
	}
	return &prepared{by: a, at: now, plan: plan, issuer: issuer, audit: auditOf(req)}, nil
}

// decide says what a certificate will contain, but for its validity, from what is known at that moment and from
// nothing else: it changes nothing, and the same arguments give the same answer.
func (c Config) decide(v *view, req Request, now time.Time) (leafPlan, error) {
	s := req.Subject
	if err := s.Check(); err != nil {
		return leafPlan{}, err
	}
	id, err := s.ID(c.TrustDomain)
	if err != nil {
		return leafPlan{}, err
	}
	if err := v.revoked(s.Source, s.Instance, now); err != nil {
		return leafPlan{}, err
	}
	if err := c.allowed(req); err != nil {
		return leafPlan{}, err
	}
	csr, err := ParseCSR(req.CSR)
	if err != nil {
		return leafPlan{}, err
	}
	if csr.isRSA() && !req.AllowRSA {
		return leafPlan{}, fmt.Errorf("%w: RSA key; want ECDSA on P-256", ErrRequest)
	}
	if err := csr.checkNames(id.String(), req.DNSNames, req.Addresses); err != nil {
		return leafPlan{}, err
	}
	return leafPlan{subject: s, id: id, dns: req.DNSNames, ips: req.Addresses, publicKey: csr.publicKey, spki: csr.spki}, nil
}

// allowed asks the grants, and keeps the control service's own names for itself.
func (c Config) allowed(req Request) error {
	s := req.Subject
	if s.Source == SourceMeshd {
		if !s.reserved() {
			return fmt.Errorf("%w: source meshd is %s/%s or %s, not %s/%s",
				ErrNotGranted, ControlNamespace, ControlAccount, AdminAccount, s.Namespace, s.ServiceAccount)
		}
		return nil
	}
	if s.reserved() {
		return fmt.Errorf("%w: %s/%s belongs to the control service", ErrNotGranted, s.Namespace, s.ServiceAccount)
	}
	if len(req.DNSNames)+len(req.Addresses) > 0 {
		return fmt.Errorf("%w: %s gets no DNS names and addresses", ErrNotGranted, s.Source)
	}
	return c.granted(s)
}

// Granted says whether the source of a workload may host its identity. The error wraps ErrNotGranted.
func (a *Authority) Granted(s Subject) error { return a.cfg.granted(s) }

func (c Config) granted(s Subject) error {
	if c.Grants == nil {
		return fmt.Errorf("%w: no grants are configured", ErrNotGranted)
	}
	if err := c.Grants.Allows(s.Source, s.Namespace, s.ServiceAccount); err != nil {
		return fmt.Errorf("%w: %w", ErrNotGranted, err)
	}
	return nil
}

// validity clamps the lifetime: to what is wished, attested, configured, and left of the issuer.
func (c Config) validity(v *view, req Request, i *issuer, now time.Time) (from, to time.Time, err error) {
	longest, life := c.lifetimeOf(req.Subject), req.Lifetime
	if life <= 0 || life > longest {
		life = longest
	}
	life = max(life, c.MinLifetime)
	if !(req.Subject.Source == SourceMeshd && req.Subject.ServiceAccount == AdminAccount) {
		life = min(life, i.longest)
	}
	if req.LifetimeLimit > 0 {
		life = min(life, req.LifetimeLimit)
	}
	// Certificates carry whole seconds. Those from before a lifted revocation are refused; this one is after.
	from = now.Add(-c.Backdate).Truncate(time.Second)
	if last := v.lastRevocation(req.Subject.Source, req.Subject.Instance); !from.After(last) {
		from = last.Add(time.Second)
	}
	if from.Before(i.cert.NotBefore) {
		from = i.cert.NotBefore
	}
	to = now.Add(life).Truncate(time.Second)
	if to.After(i.cert.NotAfter) {
		to = i.cert.NotAfter
	}
	if !to.After(now) || !to.After(from) {
		return from, to, fmt.Errorf("%w: the issuer of %s ends at %s", ErrUnavailable, req.Subject.Source, i.cert.NotAfter.Format(time.RFC3339))
	}
	return from, to, nil
}

// Refuse records that a request was refused and gives back the cause, together with ErrAudit if it could not be
// recorded. For what is refused before it comes to Prepare; the subject may be incomplete.
func (a *Authority) Refuse(req Request, cause error) error {
	e := auditOf(req)
	e.Event = AuditRefused
	e.Reason = cause.Error()
	if req.Credential.Note != "" {
		e.Reason += "; " + req.Credential.Note
	}
	if id, err := req.Subject.ID(a.cfg.TrustDomain); err == nil {
		e.SPIFFEID = id.String()
	}
	return errors.Join(cause, a.cfg.Audit.Append(e))
}

func auditOf(req Request) AuditEntry {
	return AuditEntry{
		Method: req.Credential.Method, Credential: req.Credential.Digest, Peer: req.Credential.Peer, Reason: req.Credential.Note,
		Source: req.Subject.Source, Instance: req.Subject.Instance,
	}
}
