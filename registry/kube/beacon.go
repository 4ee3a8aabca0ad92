// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// beaconLease is the Lease that meshd renews in the member, and watches.
const beaconLease = "isthmus-beacon"

// beaconRow is a renewal as it comes back.
type beaconRow struct {
	holder  string
	renewed time.Time
}

// beat renews the beacon and judges by it whether the API server can be reached.
func (r *run) beat(ctx context.Context) {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	returned := newTable(&registry.Interner{}, beaconOf, same[beaconRow], r.beaconReturned)
	go returned.follow(watching, "beacon", &coordinationv1.Lease{},
		r.typed(func(a *API) restClient { return a.leases }, "leases", Namespace, "metadata.name="+beaconLease), r.guard, r.hearing())
	var since time.Time // when the present silence began
	tick := time.NewTicker(r.config.Beat)
	defer tick.Stop()
	select {
	case <-r.usable:
	case <-ctx.Done():
		return
	}
	for {
		a := r.access.Load()
		began := r.config.Now()
		err := r.beatTwice(ctx, a)
		switch {
		case ctx.Err() != nil:
			return
		case reached(err):
			if !since.IsZero() {
				select {
				case r.again <- struct{}{}:
				default:
				}
			}
			since = time.Time{}
			r.observeSync(true) // first, lest the member looks well in between
			r.observe(federation.Condition{Type: federation.Reachable, Status: true, Reason: "Answers"})
		default:
			if since.IsZero() {
				since = began
			}
			r.wasAway.Store(true)
			r.observe(federation.Condition{Type: federation.Reachable, Reason: reasonOf(err), Message: messageOf(err, a), Since: since})
			// Connections that only seem to live would keep us waiting when it is back.
			a.api.hangUp()
		}
		r.observeCredential(a, err)
		r.wakeUp() // some conditions depend on how long something lasts
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// beatTwice gives a beat that fails a second chance: a connection may just have been
// closed.
func (r *run) beatTwice(ctx context.Context, a *access) error {
	err := r.beatOnce(ctx, a)
	if reached(err) || !pause(ctx, r.config.Patience/5) {
		return err
	}
	return r.beatOnce(ctx, a)
}

func (r *run) beatOnce(ctx context.Context, a *access) error {
	ctx, cancel := context.WithTimeout(ctx, r.config.Patience)
	defer cancel()
	now := metav1.NewMicroTime(r.config.Now())
	spec := coordinationv1.LeaseSpec{HolderIdentity: &r.config.Replica, RenewTime: &now}
	patch, err := json.Marshal(map[string]any{"spec": spec})
	if err != nil {
		return err
	}
	leases := a.api.leases
	err = leases.Patch(types.MergePatchType).Namespace(Namespace).Resource("leases").Name(beaconLease).Body(patch).Do(ctx).Error()
	if apierrors.IsNotFound(err) {
		lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: beaconLease}, Spec: spec}
		err = leases.Post().Namespace(Namespace).Resource("leases").Body(lease).Do(ctx).Error()
	}
	if r.version() == "" && reached(err) {
		if v, err := a.api.Version(ctx); err == nil {
			r.update(func(s *registry.Status) bool { s.Version = v; return true })
		}
	}
	if err != nil && reached(err) && !apierrors.IsUnauthorized(err) {
		return r.probe(ctx, a, now.Time)
	}
	return err
}

func (r *run) version() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status.Version
}

// probe stands in for the beacon where the member does not let us write one (its namespace
// is missing, or it joined by a Secret that grants less): it only measures the way there.
func (r *run) probe(ctx context.Context, a *access, began time.Time) error {
	_, err := a.api.ClusterID(ctx)
	if err != nil {
		return err
	}
	r.update(func(s *registry.Status) bool {
		s.Beacon, s.Lag = began, r.config.Now().Sub(began)
		return true
	})
	return nil
}

func beaconOf(object any) (beaconRow, bool) {
	l, ok := object.(*coordinationv1.Lease)
	if !ok || l.Name != beaconLease || l.Spec.RenewTime == nil {
		return beaconRow{}, false
	}
	return beaconRow{deref(l.Spec.HolderIdentity), l.Spec.RenewTime.Time}, true
}

// beaconReturned measures how long our own renewal took to come back. Those of other
// replicas, whose clocks are not ours, tell nothing.
func (r *run) beaconReturned(_ registry.ObjectName, _, after *beaconRow) {
	if after == nil || after.holder != r.config.Replica {
		return
	}
	now := r.config.Now()
	r.update(func(s *registry.Status) bool {
		if !after.renewed.After(s.Beacon) {
			return false
		}
		s.Beacon, s.Lag = after.renewed, max(0, now.Sub(after.renewed))
		return true
	})
}

// reached tells whether an error still came from a working API server.
func reached(err error) bool {
	var status apierrors.APIStatus
	if err == nil {
		return true
	}
	if !errors.As(err, &status) {
		return false
	}
	code := status.Status().Code
	return code >= 400 && code < 500
}

func reasonOf(err error) string {
	var status apierrors.APIStatus
	var dns *net.DNSError
	var timeout net.Error
	switch {
	case errors.As(err, &status):
		return "ServerError"
	case errors.As(err, &dns):
		return "NoAddress"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "Timeout"
	}
	return "NoConnection"
}

func messageOf(err error, a *access) string {
	return fmt.Sprintf("API server %s: %s; its last known state is served", a.member.APIServer, cut(err.Error()))
}
