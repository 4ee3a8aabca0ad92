// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"encoding/json"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits and defaults of JWT-SVIDs.
const (
	DefaultJWTLifetime    = 5 * time.Minute
	MaxJWTLifetime        = time.Hour
	DefaultJWTKeyLifetime = 30 * 24 * time.Hour

	maxAudiences = 16
	maxAudience  = 1024 // bytes

	maxAuditAudience = 256 // bytes of each in the audit log, whose lines have a limit
)

// What an audit line tells about JWT-SVIDs.
const (
	AuditJWTIssued  = "jwt-issued"  // a token left
	AuditJWTRefused = "jwt-refused" // a token was asked for and refused
)

// ErrAudience: the wish for a token names no audience, or none that can be one.
var ErrAudience = errors.New("audience not acceptable")

// JWTConfig of a JWTAuthority. Zero durations mean the defaults above.
type JWTConfig struct {
	// Lifetime of every token. At most MaxJWTLifetime.
	Lifetime time.Duration
	// KeyLifetime is how long a key signs. Its successor is published for a sixth of that before it signs, and it
	// stays published until nothing that it signed is alive.
	KeyLifetime time.Duration
}

// JWTAuthority issues JWT-SVIDs beside an Authority, which decides who may have one: the same grants and
// revocations count, the same sealer protects the keys, the same audit log has a line for each token. Every source
// has a signing key of its own, made when it first needs one. Methods may be called concurrently.
type JWTAuthority struct {
	a   *Authority
	cfg JWTConfig

	view atomic.Pointer[jwtView]
	mu   sync.Mutex // held while the view is replaced, or a record written

	wakeMu  sync.Mutex
	changed chan struct{}
}

// jwtView is all that is known of the keys. It is replaced, never changed.
type jwtView struct {
	scopes map[Source]jwtScope
	bundle []byte
}

// OpenJWT reads the keys.
func OpenJWT(ctx context.Context, a *Authority, cfg JWTConfig) (*JWTAuthority, error) {
	if cfg.Lifetime == 0 {
		cfg.Lifetime = DefaultJWTLifetime
	}
	if cfg.KeyLifetime == 0 {
		cfg.KeyLifetime = DefaultJWTKeyLifetime
	}
	if cfg.Lifetime < 0 || cfg.Lifetime > MaxJWTLifetime {
		return nil, fmt.Errorf("ca: JWTConfig.Lifetime is %v; want more than nothing, and at most %v", cfg.Lifetime, MaxJWTLifetime)
	}
	if cfg.KeyLifetime < 12*cfg.Lifetime {
		return nil, fmt.Errorf("ca: JWTConfig.KeyLifetime is %v; want at least twelve times the %v of a token", cfg.KeyLifetime, cfg.Lifetime)
	}
	j := &JWTAuthority{a: a, cfg: cfg, changed: make(chan struct{})}
	j.view.Store(&jwtView{})
	return j, j.refresh(ctx)
}

// Bundle is the JWK set with which the tokens of this trust domain are verified. Do not modify.
func (j *JWTAuthority) Bundle() []byte { return j.view.Load().bundle }

// Changed is closed when the bundle changes next. Take the channel first, then look, then wait.
func (j *JWTAuthority) Changed() <-chan struct{} {
	j.wakeMu.Lock()
	defer j.wakeMu.Unlock()
	return j.changed
}

// TrustDomain of all tokens.
func (j *JWTAuthority) TrustDomain() spiffeid.TrustDomain { return j.a.cfg.TrustDomain }

// Run follows the state, and gives keys successors in time, until ctx ends.
func (j *JWTAuthority) Run(ctx context.Context) error {
	wakes := j.a.cfg.State.Changes(ctx, jwtPrefix)
	ticker := time.NewTicker(refreshEvery)
	defer ticker.Stop()
	for {
		revocations := j.a.Changed()
		if err := j.upkeep(ctx); err != nil && ctx.Err() == nil {
			j.a.cfg.Log.Warn("keys for JWT-SVIDs not looked after", "error", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case _, ok := <-wakes:
			if !ok {
				wakes = nil
			}
		case <-revocations:
		case <-ticker.C:
		}
	}
}

// upkeep reads what there is, and makes the successors that are due.
func (j *JWTAuthority) upkeep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, refreshEvery/3)
	defer cancel()
	if err := j.refresh(ctx); err != nil {
		return err
	}
	var errs []error
	for source, scope := range j.view.Load().scopes {
		now := j.a.cfg.Clock()
		if (scope.record.due(now, j.cfg) || scope.record.spent(now)) && j.a.Revoked(source, "") == nil {
			errs = append(errs, j.keep(ctx, source))
		}
	}
	return errors.Join(errs...)
}

// JWTRequest is a wish for a token, together with what was attested about who wishes.
type JWTRequest struct {
	// Subject is the attested identity; the token is for it and nobody else.
	Subject    Subject
	Credential Credential
	// Audience is who may accept the token. At least one; the fewer the better.
	Audience []string
	// NotAfter is when the credential ends: no token outlives it. Zero for no further limit.
	NotAfter time.Time
}

// JWT is an issued token.
type JWT struct {
	ID     spiffeid.ID
	Token  string // compact serialization
	Expiry time.Time
}

// jwtPlan is a token that was decided on.
type jwtPlan struct {
	id       spiffeid.ID
	audience []string
	from, to time.Time
}

// Issue decides and signs. The token is in the audit log before it is returned; if it cannot be, it is not
// returned. So is a refusal.
func (j *JWTAuthority) Issue(ctx context.Context, req JWTRequest) (JWT, error) {
	token, entry, err := j.issue(ctx, req)
	if err != nil {
		return JWT{}, j.Refuse(req, err)
	}
	if err := j.a.cfg.Audit.Append(entry); err != nil {
		return JWT{}, err
	}
	return token, nil
}

func (j *JWTAuthority) issue(ctx context.Context, req JWTRequest) (JWT, AuditEntry, error) {
	entry := jwtAudit(req)
	if err := j.a.ready(ctx); err != nil {
		return JWT{}, entry, err
	}
	plan, err := j.decide(req, j.a.cfg.Clock())
	if err != nil {
		return JWT{}, entry, err
	}
	key, err := j.keyFor(ctx, req.Subject.Source)
	if err != nil {
		return JWT{}, entry, err
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	entry.Event, entry.SPIFFEID, entry.Serial, entry.Authority = AuditJWTIssued, plan.id.String(), hex.EncodeToString(serial), key.ID
	entry.NotBefore, entry.NotAfter = &plan.from, &plan.to
	token, err := plan.sign(key, entry.Serial)
	if err != nil {
		return JWT{}, entry, fmt.Errorf("sign a token for %s: %w", plan.id, err)
	}
	// A bug here must not become a token there.
	own := func(td spiffeid.TrustDomain) JWTKeys { return JWTKeys{key.ID: key.signer.Public()} }
	if got, err := VerifyJWT(token, plan.audience[0], plan.from, own); err != nil || got.ID != plan.id || !got.Expiry.Equal(plan.to) {
		return JWT{}, entry, errors.Join(fmt.Errorf("%w: token for %s", ErrLint, plan.id), err)
	}
	return JWT{ID: plan.id, Token: token, Expiry: plan.to}, entry, nil
}

// decide says what a token will contain, from what is known at that moment and from nothing else.
func (j *JWTAuthority) decide(req JWTRequest, now time.Time) (jwtPlan, error) {
	s := req.Subject
	if err := s.Check(); err != nil {
		return jwtPlan{}, err
	}
	id, err := s.ID(j.a.cfg.TrustDomain)
	if err != nil {
		return jwtPlan{}, err
	}
	if err := j.a.view.Load().revoked(s.Source, s.Instance, now); err != nil {
		return jwtPlan{}, err
	}
	if s.Source == SourceMeshd || s.reserved() {
		return jwtPlan{}, fmt.Errorf("%w: the control service and its administrators get no tokens", ErrNotGranted)
	}
	if err := j.a.cfg.granted(s); err != nil {
		return jwtPlan{}, err
	}
	audience, err := checkAudience(req.Audience)
	if err != nil {
		return jwtPlan{}, err
	}
	plan := jwtPlan{id: id, audience: audience, from: now.Truncate(time.Second), to: now.Add(j.cfg.Lifetime).Truncate(time.Second)}
	if !req.NotAfter.IsZero() && req.NotAfter.Before(plan.to) {
		plan.to = req.NotAfter.Truncate(time.Second)
	}
	if !plan.to.After(now) {
		return jwtPlan{}, fmt.Errorf("%w: the credential has ended at %s", ErrUnavailable, req.NotAfter.UTC().Format(time.RFC3339))
	}
	return plan, nil
}

// checkAudience gives each audience once, in the order in which they were asked for.
func checkAudience(wish []string) (audience []string, err error) {
	for _, one := range wish {
		switch {
		case one == "" || len(one) > maxAudience:
			return nil, fmt.Errorf("%w: %.80q: want 1 to %d bytes", ErrAudience, one, maxAudience)
		case !slices.Contains(audience, one):
			audience = append(audience, one)
		}
	}
	if len(audience) == 0 || len(audience) > maxAudiences {
		return nil, fmt.Errorf("%w: %d of them; want 1 to %d", ErrAudience, len(audience), maxAudiences)
	}
	return audience, nil
}

// sign makes the compact serialization, with no header but alg, kid and typ.
func (p jwtPlan) sign(key jwtKey, serial string) (string, error) {
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(key.signer), KeyID: key.ID}},
		(&jose.SignerOptions{}).WithType("JWT"),
	)
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(map[string]any{
		"sub": p.id.String(), "aud": p.audience, "iat": p.from.Unix(), "exp": p.to.Unix(), "jti": serial,
	})
	if err != nil {
		return "", err
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// Refuse records that a token was refused and gives back the cause, together with ErrAudit if it could not be
// recorded. For what is refused before it comes to Issue, too; the subject may be incomplete.
func (j *JWTAuthority) Refuse(req JWTRequest, cause error) error {
	e := jwtAudit(req)
	e.Event, e.Reason = AuditJWTRefused, cause.Error()
	if req.Credential.Note != "" {
		e.Reason += "; " + req.Credential.Note
	}
	if id, err := req.Subject.ID(j.a.cfg.TrustDomain); err == nil {
		e.SPIFFEID = id.String()
	}
	return errors.Join(cause, j.a.cfg.Audit.Append(e))
}

func jwtAudit(req JWTRequest) AuditEntry {
	e := AuditEntry{
		Method: req.Credential.Method, Credential: req.Credential.Digest, Peer: req.Credential.Peer, Reason: req.Credential.Note,
		Source: req.Subject.Source, Instance: req.Subject.Instance,
	}
	for _, one := range req.Audience[:min(len(req.Audience), maxAudiences)] {
		e.Audience = append(e.Audience, one[:min(len(one), maxAuditAudience)])
	}
	return e
}

// jwtKey is a key that can sign.
type jwtKey struct {
	jwtKeyRecord
	signer crypto.Signer
}
