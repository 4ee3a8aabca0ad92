// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxLifetime is the longest lifetime of a workload's certificate that a configuration may ask for.
const MaxLifetime = 7 * 24 * time.Hour

// Defaults of Config.
const (
	DefaultLifetime             = 24 * time.Hour
	DefaultMinLifetime          = 5 * time.Minute
	DefaultBackdate             = time.Minute
	DefaultRootLifetime         = 10 * 365 * 24 * time.Hour
	DefaultIntermediateLifetime = 365 * 24 * time.Hour
	DefaultAdminLifetime        = 365 * 24 * time.Hour
	DefaultOfflineBudget        = time.Hour
	DefaultClockSkew            = 5 * time.Minute
)

// refreshEvery bounds how long a change goes unnoticed if the state forgets to tell.
const refreshEvery = 15 * time.Second

// Config of an Authority. Zero durations mean the defaults above.
type Config struct {
	// TrustDomain of everything that is issued. Required.
	TrustDomain spiffeid.TrustDomain
	// State is shared by all replicas. Required.
	State State
	// Sealer seals records, and keys unless Keys says otherwise. Required.
	Sealer Sealer
	// Keys is where private keys live; SealedKeys with the Sealer if nil.
	Keys Keys
	// Root is an authority that was brought along, to begin with instead of a self-made root. If the state has
	// one already it must be the same.
	Root *Brought
	// Audit takes one line for every issuance and refusal. Required.
	Audit Audit
	// Grants decides which source may host which identity. Nil grants nothing to anybody but meshd.
	Grants Grants
	// Lifetime of leaves whose request asks for none; also the longest one.
	Lifetime time.Duration
	// Lifetimes is Lifetime for the workloads of some namespaces, by name, whichever source they are in.
	Lifetimes map[string]time.Duration
	// MinLifetime is the shortest lifetime that may be asked for.
	MinLifetime time.Duration
	// Backdate is how far before now a leaf becomes valid, for peers whose clock is late.
	Backdate time.Duration
	// RootLifetime and IntermediateLifetime are those of authorities made from now on.
	RootLifetime, IntermediateLifetime time.Duration
	// AdminLifetime is that of administrators' certificates.
	AdminLifetime time.Duration
	// OfflineBudget is how long leaves are signed although the state cannot be read.
	OfflineBudget time.Duration
	// ClockSkew is how far clocks may be apart; a rotation waits that much longer.
	ClockSkew time.Duration
	// Clock tells the time; time.Now if nil.
	Clock func() time.Time
	// Log takes what happens to authorities; slog.Default() if nil.
	Log *slog.Logger
}

// Grants is what the sources of workloads may be.
type Grants interface {
	// Allows reports why the source may not host that identity; nil if it may. The text is shown to the
	// workload, so it should name what to do about it.
	Allows(source Source, namespace, serviceAccount string) error
}

// GrantFunc is a Grants.
type GrantFunc func(source Source, namespace, serviceAccount string) error

// Allows implements Grants.
func (f GrantFunc) Allows(source Source, namespace, serviceAccount string) error {
	return f(source, namespace, serviceAccount)
}

func (c Config) withDefaults() (Config, error) {
	switch {
	case c.TrustDomain.IsZero():
		return c, errors.New("ca: Config.TrustDomain is missing")
	case len(c.TrustDomain.Name()) > maxTrustDomain:
		return c, fmt.Errorf("ca: Config.TrustDomain has %d bytes, at most %d", len(c.TrustDomain.Name()), maxTrustDomain)
	case c.State == nil || c.Sealer == nil || c.Audit == nil:
		return c, errors.New("ca: Config.State, Sealer and Audit are required")
	}
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.Lifetime, DefaultLifetime)
	set(&c.MinLifetime, min(DefaultMinLifetime, c.Lifetime))
	set(&c.Backdate, DefaultBackdate)
	set(&c.RootLifetime, DefaultRootLifetime)
	set(&c.IntermediateLifetime, DefaultIntermediateLifetime)
	set(&c.AdminLifetime, DefaultAdminLifetime)
	set(&c.OfflineBudget, DefaultOfflineBudget)
	set(&c.ClockSkew, DefaultClockSkew)
	if c.MinLifetime > c.Lifetime {
		return c, fmt.Errorf("ca: Config.MinLifetime %v exceeds Lifetime %v", c.MinLifetime, c.Lifetime)
	}
	for namespace, life := range c.Lifetimes {
		if life < c.MinLifetime || life > MaxLifetime {
			return c, fmt.Errorf("ca: Config.Lifetimes[%q] is %v; want %v to %v", namespace, life, c.MinLifetime, MaxLifetime)
		}
	}
	if c.Keys == nil {
		c.Keys = SealedKeys{Sealer: c.Sealer}
	}
	if c.Clock == nil {
		c.Clock = time.Now
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c, nil
}

// lifetimeOf is the longest lifetime of a subject's certificate, and the one it gets if it asks for none.
func (c Config) lifetimeOf(s Subject) time.Duration {
	switch life, own := c.Lifetimes[s.Namespace]; {
	case s.Source == SourceMeshd && s.ServiceAccount == AdminAccount:
		return c.AdminLifetime
	case own && s.Source != SourceMeshd:
		return life
	}
	return c.Lifetime
}

// longestLifetime is that of any workload.
func (c Config) longestLifetime() time.Duration {
	longest := c.Lifetime
	for _, life := range c.Lifetimes {
		longest = max(longest, life)
	}
	return longest
}

// Authority is the certificate authority of one trust domain, as one replica sees it. Its methods may be called
// concurrently.
type Authority struct {
	cfg Config

	view      atomic.Pointer[view]
	confirmed atomic.Int64 // when the state was last read whole, in Unix nanoseconds

	verified verified // chains of peers that are connected

	mu    sync.Mutex           // held while the view is replaced, or a record written
	tried map[string]time.Time // when a successor was last attempted, by scope

	wakeMu  sync.Mutex // never held while the state is asked
	changed chan struct{}
}

// view is all that is known of the state. It is replaced, never changed.
type view struct {
	scopes      map[string]scope
	bundle      Bundle
	pool        *x509.CertPool
	above       map[string][]*x509.Certificate // by the ID of a root's issuer; see issuerRecord.path
	revocations map[string]Revocation          // by key in the state
	versions    map[string]Version             // of the revocations
}

// scope is the decoded record of one scope.
type scope struct {
	record  record
	version Version
	issuer  *issuer // nil if none is active
}

// issuer is an authority that can sign.
type issuer struct {
	id     string
	scope  string
	epoch  int64
	cert   *x509.Certificate
	signer crypto.Signer

	longest time.Duration // lifetime that it may sign
}

// under is the ID of what signed the issuer.
func (i *issuer) under() string { return hex.EncodeToString(i.cert.AuthorityKeyId) }

// Open reads the authorities of the trust domain, and makes the root if there is none yet. Replicas that do so
// at the same time agree on one.
func Open(ctx context.Context, cfg Config) (*Authority, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := lintProfiles(cfg, cfg.Clock()); err != nil {
		return nil, err
	}
	a := &Authority{cfg: cfg, changed: make(chan struct{}), tried: make(map[string]time.Time)}
	a.view.Store(&view{})
	if err := a.refresh(ctx); err != nil {
		return nil, err
	}
	if _, ok := a.view.Load().scopes[ScopeRoot]; ok {
		return a, a.checkRoot()
	}
	if err := a.makeRoot(ctx); err != nil {
		return nil, err
	}
	return a, a.checkRoot()
}

// checkRoot reports an authority that could do nothing.
func (a *Authority) checkRoot() error {
	root := a.view.Load().scopes[ScopeRoot]
	if root.issuer == nil {
		return fmt.Errorf("%s: no active root", recordKey(ScopeRoot))
	}
	if b := a.cfg.Root; b != nil && !b.is(root.record.Issuers[root.record.active()]) {
		return fmt.Errorf("%w: this mesh has another authority, %s, and the one that was brought along is %s; leave it out, or begin with an empty store",
			ErrBrought, root.issuer.id, authorityID(b.Certificate))
	}
	if root.record.Domain != "" {
		if root.record.Domain != a.cfg.TrustDomain.Name() {
			return fmt.Errorf("the root in the state is that of %q, this replica is configured for %q", root.record.Domain, a.cfg.TrustDomain)
		}
		return nil
	}
	want := "spiffe://" + a.cfg.TrustDomain.Name()
	names, err := altNames(root.issuer.cert.Extensions)
	if ids := uris(names); err != nil || len(ids) != 1 || ids[0] != want {
		return fmt.Errorf("the root in the state is that of %q, this replica is configured for %q", ids, want)
	}
	return nil
}

// TrustDomain of this authority.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.cfg.TrustDomain }

// Bundle is the current roots.
func (a *Authority) Bundle() Bundle { return a.view.Load().bundle }

// Changed is closed when the bundle, the revocations or any authority changes next. Take the channel first, then look, then wait.
func (a *Authority) Changed() <-chan struct{} {
	a.wakeMu.Lock()
	defer a.wakeMu.Unlock()
	return a.changed
}

// Verify is VerifyChain against the current bundle.
func (a *Authority) Verify(chain []*x509.Certificate) (Identity, error) {
	now, roots := a.cfg.Clock(), a.view.Load().pool
	if identity, ok := a.verified.get(roots, chain, now); ok {
		return identity, nil
	}
	identity, path, err := verifyChain(a.cfg.TrustDomain, roots, now, chain)
	if err != nil {
		return Identity{}, err
	}
	from, to := path[0].NotBefore, path[0].NotAfter
	for _, cert := range path[1:] {
		if cert.NotBefore.After(from) {
			from = cert.NotBefore
		}
		if cert.NotAfter.Before(to) {
			to = cert.NotAfter
		}
	}
	a.verified.put(roots, chain, identity, from, to)
	return identity, nil
}

// Issuer describes an issuer for status reports.
type Issuer struct {
	Scope     string // ScopeRoot or a source
	ID        string
	Under     string // ID of what signed it; its own if nothing did
	Phase     Phase
	Epoch     int64
	Since     time.Time
	NotBefore time.Time
	NotAfter  time.Time
}

// Issuers lists every issuer of every scope that is known, in no particular order.
func (a *Authority) Issuers() []Issuer {
	var out []Issuer
	for _, s := range a.view.Load().scopes {
		for _, i := range s.record.Issuers {
			cert, err := x509.ParseCertificate(i.Certificate)
			if err != nil {
				continue // decodeRecord has parsed it before
			}
			out = append(out, Issuer{
				Scope: s.record.Scope, ID: i.ID, Under: i.signedBy(), Phase: i.Phase, Epoch: i.Epoch, Since: i.Since,
				NotBefore: cert.NotBefore, NotAfter: cert.NotAfter,
			})
		}
	}
	return out
}

// Confirmed is when the state was last read whole: the age of everything this replica believes.
func (a *Authority) Confirmed() time.Time { return time.Unix(0, a.confirmed.Load()) }

// Run follows the state until ctx ends. Without it an authority does not learn of other replicas' changes and
// stops signing when the offline budget is used up.
func (a *Authority) Run(ctx context.Context) error {
	wakes := a.cfg.State.Changes(ctx, "")
	ticker := time.NewTicker(refreshEvery)
	defer ticker.Stop()
	away := false
	for {
		err := a.refreshWithin(ctx, refreshEvery/3)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && !away:
			a.cfg.Log.Error("authority cannot read its state", "error", err, "signing_until", a.Confirmed().Add(a.cfg.OfflineBudget))
		case err == nil && away:
			a.cfg.Log.Info("authority reads its state again")
		}
		away = err != nil
		select {
		case <-ctx.Done():
			return ctx.Err()
		case _, ok := <-wakes:
			if !ok {
				wakes = nil
			}
		case <-ticker.C:
		}
	}
}

func (a *Authority) refreshWithin(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return a.refresh(ctx)
}

// ready reports a replica that has not seen the state for longer than its budget. It tries once more before.
func (a *Authority) ready(ctx context.Context) error {
	if a.cfg.Clock().Sub(a.Confirmed()) <= a.cfg.OfflineBudget {
		return nil
	}
	if err := a.refreshWithin(ctx, 2*time.Second); err != nil {
		return fmt.Errorf("%w: state not read since %s, longer than the offline budget of %v: %w",
			ErrUnavailable, a.Confirmed().UTC().Format(time.RFC3339), a.cfg.OfflineBudget, err)
	}
	return nil
}

// unavailable marks an error of the state as a matter of waiting.
func unavailable(err error) error { return fmt.Errorf("%w: %w", ErrUnavailable, err) }
