// SPDX-License-Identifier: Apache-2.0

// Package attest answers the question who is asking, from a credential and from nothing else.
//
// Three credentials are known. A Kubernetes service account token is verified offline against the keys of the
// joined clusters; the cluster is the one whose key verifies it, because clusters made by the same tool have
// the same issuer string. A join token lets one virtual machine in, once. A certificate of this authority
// renews itself.
//
// What a caller says about itself (a cluster ID in a header, the metadata of a proxy) can only contradict the
// credential and be refused for it.
package attest

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
)

var (
	// ErrCredential: there is no credential, or it proves nothing. Callers learn no more than that; the audit
	// log has the reason.
	ErrCredential = errors.New("credential not accepted")
	// ErrGone: the workload has been deleted.
	ErrGone = errors.New("workload is deleted")
	// ErrUnknown: the registry has not heard of the workload yet. Try again.
	ErrUnknown = errors.New("workload not known yet")
	// ErrReplayed: the token was shown before with another key.
	ErrReplayed = errors.New("token was already used with another key")
)

// The kinds of credentials, as they appear in the audit log.
const (
	MethodKubernetes  = "kubernetes-token"
	MethodJoinToken   = "join-token"
	MethodCertificate = "certificate"
)

// Defaults of Config.
const (
	DefaultWait         = 10 * time.Second
	DefaultAwayLifetime = time.Hour
)

// Evidence is what a caller showed.
type Evidence struct {
	// Bearer is the token of the authorization header, without the word Bearer. If there is one it decides,
	// whatever certificate came with the connection.
	Bearer string
	// Chain is the client certificate of the TLS connection, the leaf first. Nobody has verified it yet.
	Chain []*x509.Certificate
	// ClusterHint is the cluster the caller says it is in. It may be empty, or a name nobody knows; if it names
	// another joined cluster than the credential does, the credential is refused.
	ClusterHint string
	// Peer is the network address of the caller, for the audit log.
	Peer string
}

// Identity is who a credential speaks for.
type Identity struct {
	ca.Subject
	// Credential describes the credential for the audit log.
	Credential ca.Credential
	// Pod is the name of the pod; empty for what is not one.
	Pod string
	// Expires is when the credential ends, and with it what was opened by it.
	Expires time.Time
	// Certificate is the verified certificate, if that was the credential.
	Certificate *ca.Identity
	// LifetimeLimit is the longest certificate this attestation is good for; zero for no limit.
	LifetimeLimit time.Duration
	// IstioAgent tells that the token had Istio's audience: its holder brings a new key each time.
	IstioAgent bool
}

// Attestation is an Identity that may get a certificate, once Commit has succeeded.
type Attestation struct {
	Identity
	commit func(ctx context.Context, keyThumbprint string) error
}

// Commit uses the credential up, where it is of that kind: a join token is spent, a token of our agent is bound
// to the key. To be called after everything else was decided, and before anything is signed.
func (a Attestation) Commit(ctx context.Context, keyThumbprint string) error {
	if a.commit == nil {
		return nil
	}
	return a.commit(ctx, keyThumbprint)
}

// Presence is what the registry knows about a workload.
type Presence int

// The presences.
const (
	// Unknown: its source is being watched and has not reported it, yet.
	Unknown Presence = iota
	// Known: it exists.
	Known
	// Deleted: it existed and is gone.
	Deleted
	// Away: it is not known, and its source cannot be asked at the moment.
	Away
)

// Workload is the registry's answer.
type Workload struct {
	Presence Presence
	// Namespace and ServiceAccount as the registry has them; compared with the credential unless empty.
	Namespace, ServiceAccount string
}

// Workloads is the registry, as far as attestation needs it.
type Workloads interface {
	// Workload says what is known about an instance of a source: a pod UID, or the name of a virtual machine.
	// It does not wait; the attestor asks again.
	Workload(ctx context.Context, source ca.Source, instance string) (Workload, error)
}

// JoinTokens knows the join tokens that were handed out. Errors wrap ca.ErrJoinToken for a token that is not
// one, is expired or spent; anything else means that they cannot be looked at now.
type JoinTokens interface {
	// Read tells what a token is for and leaves it unspent.
	Read(ctx context.Context, token string) (ca.JoinToken, error)
	// Spend uses it up. Of any number of concurrent calls, at any replicas, one succeeds.
	Spend(ctx context.Context, token string) error
}

// Config of an Attestor.
type Config struct {
	// Authority verifies client certificates and knows revocations. Required.
	Authority *ca.Authority
	// Clusters gives the keys of joined clusters. Nil if Kubernetes tokens are not accepted.
	Clusters Clusters
	// JoinTokens of virtual machines. Nil if join tokens are not accepted.
	JoinTokens JoinTokens
	// Workloads is asked whether the workload exists. Nil if that is not to be checked.
	Workloads Workloads
	// Wait bounds how long a caller waits for the registry to hear of its workload. DefaultWait if zero.
	Wait time.Duration
	// AwayLifetime is the longest certificate for a token whose pod cannot be checked because its cluster is
	// away. DefaultAwayLifetime if zero.
	AwayLifetime time.Duration
	// Clock tells the time; time.Now if nil.
	Clock func() time.Time
}

// Attestor finds out who is asking. Its methods may be called concurrently.
type Attestor struct {
	cfg    Config
	keys   keyCache
	replay replay

	waiting atomic.Int64 // callers in present that wait

	unknownMu sync.Mutex
	unknown   chan struct{} // closed at the next token of an unknown key
}

// maxWaiting bounds how many callers wait for the registry at once; the others are told to come again.
const maxWaiting = 4096

// New makes an attestor.
func New(cfg Config) (*Attestor, error) {
	if cfg.Authority == nil {
		return nil, errors.New("attest: Config.Authority is missing")
	}
	if cfg.Wait == 0 {
		cfg.Wait = DefaultWait
	}
	if cfg.AwayLifetime == 0 {
		cfg.AwayLifetime = DefaultAwayLifetime
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	return &Attestor{cfg: cfg, unknown: make(chan struct{})}, nil
}

// UnknownKeys returns a channel that is closed when somebody next shows a Kubernetes token of a key that no joined
// cluster has: one of them may have a new key. Anybody can show such a token.
func (a *Attestor) UnknownKeys() <-chan struct{} {
	a.unknownMu.Lock()
	defer a.unknownMu.Unlock()
	return a.unknown
}

func (a *Attestor) tellUnknown() {
	a.unknownMu.Lock()
	defer a.unknownMu.Unlock()
	close(a.unknown)
	a.unknown = make(chan struct{})
}

// Attest is for whoever wants a certificate. Everything is checked and nothing used up; see Commit. The
// Attestation names the credential also when there is an error, for the audit log.
func (a *Attestor) Attest(ctx context.Context, e Evidence) (Attestation, error) {
	switch {
	case strings.HasPrefix(e.Bearer, ca.JoinTokenPrefix):
		return a.joinToken(ctx, e)
	case e.Bearer != "":
		id, err := a.kubernetesToken(ctx, e)
		att := Attestation{Identity: id}
		if !id.IstioAgent {
			att.commit = func(_ context.Context, thumbprint string) error {
				return a.replay.bind(id.Credential.Digest, thumbprint, id.Expires, a.cfg.Clock())
			}
		}
		return att, err
	}
	id, err := a.certificate(ctx, e)
	if err == nil && id.Source == ca.SourceMeshd {
		err = fmt.Errorf("%w: certificates of meshd and its administrators are not renewed over the wire", ErrCredential)
	}
	return Attestation{Identity: id}, err
}

// Authenticate is for whoever opens a stream or calls something else than the issuance of certificates. Join
// tokens are no credential for that.
func (a *Attestor) Authenticate(ctx context.Context, e Evidence) (Identity, error) {
	switch {
	case strings.HasPrefix(e.Bearer, ca.JoinTokenPrefix):
		return Identity{Credential: credential(MethodJoinToken, []byte(e.Bearer), e)},
			fmt.Errorf("%w: a join token gets a certificate and opens nothing", ErrCredential)
	case e.Bearer != "":
		return a.kubernetesToken(ctx, e)
	}
	return a.certificate(ctx, e)
}

// certificate is the credential of whoever renews.
func (a *Attestor) certificate(ctx context.Context, e Evidence) (Identity, error) {
	if len(e.Chain) == 0 {
		return Identity{Credential: ca.Credential{Peer: e.Peer}}, fmt.Errorf("%w: neither token nor client certificate", ErrCredential)
	}
	id := Identity{Credential: credential(MethodCertificate, e.Chain[0].Raw, e)}
	verified, err := a.cfg.Authority.Verify(e.Chain)
	if err != nil {
		return id, fmt.Errorf("%w: %w", ErrCredential, err)
	}
	id.Subject, id.Expires, id.Certificate = verified.Subject, verified.NotAfter, &verified
	if err := a.cfg.Authority.RevokedIdentity(verified); err != nil {
		return id, err
	}
	if id.Source == ca.SourceMeshd {
		return id, nil
	}
	_, err = a.present(ctx, id.Subject)
	return id, err
}

// joinToken is the credential of a virtual machine that has no certificate yet.
func (a *Attestor) joinToken(ctx context.Context, e Evidence) (Attestation, error) {
	att := Attestation{Identity: Identity{Credential: credential(MethodJoinToken, []byte(e.Bearer), e)}}
	if a.cfg.JoinTokens == nil {
		return att, fmt.Errorf("%w: join tokens are not accepted here", ErrCredential)
	}
	token, err := a.cfg.JoinTokens.Read(ctx, e.Bearer)
	if err != nil {
		return att, away(err)
	}
	att.Subject, att.Expires = token.Subject(), token.Expires
	att.Credential.Note = "join token " + token.ID
	if err := att.Check(); err != nil {
		return att, err
	}
	if err := a.cfg.Authority.Revoked(att.Source, att.Instance); err != nil {
		return att, err
	}
	if _, err := a.present(ctx, att.Subject); err != nil {
		return att, err
	}
	att.commit = func(ctx context.Context, _ string) error { return away(a.cfg.JoinTokens.Spend(ctx, e.Bearer)) }
	return att, nil
}

// away marks what is not the credential's fault as a matter of waiting.
func away(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ca.ErrJoinToken):
		return fmt.Errorf("%w: %w", ErrCredential, err)
	}
	return fmt.Errorf("%w: %w", ca.ErrUnavailable, err)
}

// present waits, within bounds, until the registry knows the workload, and compares what it knows with what the
// credential says. Only a deleted workload is turned away for good.
func (a *Attestor) present(ctx context.Context, s ca.Subject) (Presence, error) {
	if a.cfg.Workloads == nil {
		return Known, nil
	}
	// The registry never hears of a workload outside the grant, so waiting for it is in vain.
	if err := a.cfg.Authority.Granted(s); err != nil {
		return Unknown, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Wait)
	defer cancel()
	if a.waiting.Add(1) > maxWaiting {
		cancel() // one look, no waiting
	}
	defer a.waiting.Add(-1)
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		w, err := a.cfg.Workloads.Workload(context.WithoutCancel(ctx), s.Source, s.Instance)
		if err != nil {
			return Unknown, away(err)
		}
		switch w.Presence {
		case Away:
			return Away, nil
		case Deleted:
			return Deleted, fmt.Errorf("%w: %s of %s", ErrGone, s.Instance, s.Source)
		case Known:
			if w.Namespace != "" && w.Namespace != s.Namespace || w.ServiceAccount != "" && w.ServiceAccount != s.ServiceAccount {
				return Known, fmt.Errorf("%w: it says %s/%s, the registry has %s as %s/%s",
					ErrCredential, s.Namespace, s.ServiceAccount, s.Instance, w.Namespace, w.ServiceAccount)
			}
			return Known, nil
		}
		select {
		case <-ctx.Done():
			return Unknown, fmt.Errorf("%w: %s of %s, after waiting for %v", ErrUnknown, s.Instance, s.Source, a.cfg.Wait)
		case <-time.After(pause):
		}
	}
}

func credential(method string, bytes []byte, e Evidence) ca.Credential {
	sum := sha256.Sum256(bytes)
	return ca.Credential{Method: method, Digest: hex.EncodeToString(sum[:]), Peer: e.Peer}
}
