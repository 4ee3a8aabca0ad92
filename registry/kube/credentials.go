// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// access is a member's API with the credentials it is used with. It is never changed:
// another one takes its place.
type access struct {
	api     *API // through the reader
	writer  *API // nil without a writer's credential
	member  *registry.Member
	secrets registry.Credentials
}

func newAccess(m *registry.Member, secrets registry.Credentials) (*access, error) {
	a := &access{member: m, secrets: secrets}
	for _, c := range []struct {
		api        **API
		credential registry.Credential
	}{{&a.api, secrets.Reader}, {&a.writer, secrets.Writer}} {
		if c.credential.Empty() {
			continue
		}
		config, err := RESTConfig(m, c.credential)
		if err != nil {
			return nil, err
		}
		if *c.api, err = NewAPI(config); err != nil {
			return nil, err
		}
	}
	if a.api == nil {
		return nil, errNoAccess
	}
	return a, nil
}

// sameWay tells whether a registration leads to the same API server with the same
// credentials as the access was made with.
func (a *access) sameWay(m *registry.Member) bool {
	return a.member.APIServer == m.APIServer && a.member.TLSServerName == m.TLSServerName &&
		bytes.Equal(a.member.CertificateAuthority, m.CertificateAuthority) && a.member.CredentialsVersion == m.CredentialsVersion
}

func (a *access) close() {
	a.api.http.CloseIdleConnections()
	if a.writer != nil {
		a.writer.http.CloseIdleConnections()
	}
}

// keepAccess follows the registration: another address or other credentials are taken
// into use once they work, and not before while the present ones do.
func (r *run) keepAccess(ctx context.Context) {
	for {
		_, changed := r.config.Store.Snapshot()
		retry := time.Duration(0)
		if m := r.config.Store.Members()[r.config.ID]; m != nil {
			r.caches.setMember(m)
			if old := r.access.Load(); old == nil || !old.sameWay(m) {
				if err := r.switchTo(ctx, m, old); err != nil && ctx.Err() == nil {
					r.log.Warn("cannot use the registered way to the API server", "error", err)
					retry = r.config.Beat
				}
			}
		}
		if retry == 0 {
			retry = time.Hour
		}
		timer := time.NewTimer(retry)
		select {
		case <-ctx.Done():
			timer.Stop()
			if a := r.access.Load(); a != nil {
				a.api.hangUp()
				a.close()
			}
			return
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (r *run) switchTo(ctx context.Context, m *registry.Member, old *access) error {
	attempt, cancel := context.WithTimeout(ctx, 2*r.config.Patience)
	defer cancel()
	secrets, err := r.config.Store.Credentials(attempt, m.ID)
	if err != nil {
		r.observe(federation.Condition{
			Type: federation.CredentialsValid, Reason: "CredentialsMissing",
			Message: fmt.Sprintf("%v; run: mesh join cluster %s", err, m.Name),
		})
		return err
	}
	next, err := newAccess(m, secrets)
	if err != nil {
		return err
	}
	if old != nil {
		// The registration was just proven to lead to the cluster by whoever changed it, but
		// maybe not from here.
		id, err := next.api.ClusterID(attempt)
		if err == nil {
			err = r.checkID(id)
		}
		if err != nil {
			next.close()
			return err
		}
	}
	r.access.Store(next)
	if old == nil {
		close(r.usable)
	} else {
		if old.member.APIServer != m.APIServer {
			old.api.hangUp() // watches there must end; with a renewed credential they may go on
		}
		old.close()
	}
	return nil
}

// renewAt is when a credential should be renewed: after a third of its life. False for
// one that does not end, or that is no token.
func renewAt(c registry.Credential) (time.Time, bool) {
	if c.Token == "" || c.Expires.IsZero() {
		return time.Time{}, false
	}
	issued := c.Issued
	if issued.IsZero() || !issued.Before(c.Expires) {
		issued = c.Expires.Add(-TokenLifetime)
	}
	return issued.Add(c.Expires.Sub(issued) / 3), true
}

// renew keeps the credentials young, by themselves: each account may ask for a token of
// its own, and of no other.
func (r *run) renew(ctx context.Context) {
	for pause(ctx, r.config.Beat) {
		a := r.access.Load()
		if a == nil {
			continue
		}
		next, renewed := a.secrets, false
		for _, c := range []struct {
			api        *API
			credential *registry.Credential
		}{{a.api, &next.Reader}, {a.writer, &next.Writer}} {
			at, ends := renewAt(*c.credential)
			if c.api == nil || !ends || r.config.Now().Before(at) {
				continue
			}
			fresh, err := r.renewToken(ctx, c.api, a.member, *c.credential)
			if err != nil {
				r.log.Debug("cannot renew a credential yet", "error", err)
				continue
			}
			*c.credential, renewed = fresh, true
		}
		if !renewed {
			continue
		}
		// Stored first, used when the store tells of it: a replica that takes over finds what
		// works.
		if err := r.config.Store.SetCredentials(ctx, r.config.ID, next); err != nil && ctx.Err() == nil {
			r.log.Warn("cannot keep a renewed credential", "error", err)
		} else {
			r.log.Info("renewed the credential", "expires", next.Reader.Expires)
		}
	}
}

// renewToken asks for a new token and tries it before it takes the place of the old one.
func (r *run) renewToken(ctx context.Context, api *API, m *registry.Member, c registry.Credential) (registry.Credential, error) {
	namespace, account, ok := tokenAccount(c.Token)
	if !ok {
		return c, errors.New("the token is not that of a service account")
	}
	ctx, cancel := context.WithTimeout(ctx, 4*r.config.Patience)
	defer cancel()
	fresh, err := api.RequestToken(ctx, namespace, account, TokenLifetime)
	if err != nil {
		return c, err
	}
	if !fresh.Expires.After(c.Expires) {
		return c, errors.New("the API server gave a token that ends no later than the present one")
	}
	config, err := RESTConfig(m, fresh)
	if err != nil {
		return c, err
	}
	trial, err := NewAPI(config)
	if err != nil {
		return c, err
	}
	defer trial.http.CloseIdleConnections()
	defer trial.hangUp()
	if _, err := trial.Version(ctx); err != nil {
		return c, fmt.Errorf("the new token does not work: %w", err)
	}
	return fresh, nil
}

// observeCredential judges the reader's credential by its times and by what the API server
// said to it.
func (r *run) observeCredential(a *access, err error) {
	c := federation.Condition{Type: federation.CredentialsValid, Status: true, Reason: "Valid"}
	expires := a.secrets.Reader.Expires
	switch {
	case !expires.IsZero() && r.config.Now().After(expires):
		c.Status, c.Reason = false, "CredentialsExpired"
		c.Message = fmt.Sprintf("expired at %s; run: mesh join cluster %s", expires.UTC().Format(time.RFC3339), a.member.Name)
	case apierrors.IsUnauthorized(err):
		c.Status, c.Reason = false, "CredentialsRefused"
		c.Message = fmt.Sprintf("the API server does not accept them any more; run: mesh join cluster %s", a.member.Name)
	case err != nil:
		return // nothing was said about it
	}
	r.observe(c)
	r.update(func(s *registry.Status) bool {
		changed := !s.CredentialsExpire.Equal(expires)
		s.CredentialsExpire = expires
		return changed
	})
}
