// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/isthmus-mesh/isthmus/registry"
)

// The codes of findings about keys.
const (
	codeSameKey    = "MESH1012" // another cluster has one of them
	codeKeysDenied = "MESH1013" // the API server does not show them
)

// keysObject is what findings about keys are about.
const keysObject = "service account signing keys"

// keysAtMost is how often keys are read at most, whoever asks for it: anybody can show a
// token with a key that nobody has.
const keysAtMost = 5 * time.Second

// keepKeys keeps the registered keys those that the member's API server publishes, so that
// tokens are recognised after its signing key was rotated. It looks when it connects, every
// now and then, and when somebody showed a token of a key that no member has. What was
// known stays while the API server is away.
func (r *run) keepKeys(ctx context.Context) {
	select {
	case <-r.usable:
	case <-ctx.Done():
		return
	}
	for {
		var unknown <-chan struct{}
		if r.config.UnknownKeys != nil {
			unknown = r.config.UnknownKeys() // before the look: none is missed
		}
		wait := r.config.Keys
		if err := r.refreshKeys(ctx); err != nil {
			r.log.Debug("cannot read the keys of service account tokens", "error", err)
			wait = min(wait, 2*keysAtMost)
		}
		if !pause(ctx, keysAtMost) {
			return
		}
		timer := time.NewTimer(max(0, wait-keysAtMost))
		select {
		case <-ctx.Done():
		case <-unknown:
		case <-r.again:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// refreshKeys looks once.
func (r *run) refreshKeys(ctx context.Context) error {
	attempt, cancel := context.WithTimeout(ctx, 4*r.config.Patience)
	defer cancel()
	if err := r.guard(attempt); err != nil {
		return err
	}
	keys, _, err := r.access.Load().api.JWKS(attempt)
	if apierrors.IsForbidden(err) {
		r.caches.report(codeKeysDenied, keysObject, fmt.Sprintf("the API server does not show them to %s, so that a rotated key is not noticed: "+
			"bind the account to the ClusterRole system:service-account-issuer-discovery, as Kubernetes does by default, or run after every rotation: mesh join cluster %s", ReaderAccount, r.name()))
	}
	if err != nil {
		return err
	}
	m := r.config.Store.Members()[r.config.ID]
	if m == nil || sameKeys(m.IssuerKeys, keys) {
		r.caches.report("", keysObject, "")
		return nil
	}
	err = r.config.Store.UpdateMember(attempt, r.config.ID, func(m *registry.Member) error {
		m.IssuerKeys = keys
		return nil
	})
	switch {
	case errors.Is(err, registry.ErrSameKey):
		r.caches.report(codeSameKey, keysObject, fmt.Sprintf("the API server publishes other keys than those registered, which stay: %v. "+
			"Give this cluster a key of its own: kube-apiserver --service-account-signing-key-file", err))
		return nil
	case err != nil:
		return err
	}
	r.caches.report("", keysObject, "")
	r.log.Info("the cluster publishes other signing keys now, and tokens of these are accepted")
	return nil
}

func sameKeys(a, b []byte) bool {
	x, err1 := registry.KeyThumbprints(a)
	y, err2 := registry.KeyThumbprints(b)
	return err1 == nil && err2 == nil && slices.Equal(x, y)
}

// report replaces the finding about something that is no object; an empty code ends it.
func (c *caches) report(code, object, message string) {
	c.mu.Lock()
	before := c.findings[object]
	delete(c.findings, object)
	if code != "" {
		c.find(code, object, message)
	}
	changed := c.findings[object] != before
	c.mu.Unlock()
	if changed {
		c.wake()
	}
}
