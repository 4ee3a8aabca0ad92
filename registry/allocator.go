// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// AllocatorConfig says what an Allocator works with.
type AllocatorConfig struct {
	Store interface {
		Snapshot() (*federation.Snapshot, <-chan struct{})
		Addresses
	}

	// Ranges to allocate from; the zero value means the default ones.
	Ranges federation.VirtualRanges

	// Log; nil means none.
	Log *slog.Logger

	// Now is the time; nil means time.Now.
	Now func() time.Time
}

// Allocator sees to it that every host that needs a virtual address has one. Each replica
// runs one: an address is given by compare-and-create, so that they agree.
type Allocator struct{ config AllocatorConfig }

// NewAllocator makes an Allocator, which does nothing until Run.
func NewAllocator(config AllocatorConfig) *Allocator {
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	return &Allocator{config}
}

// housekeeping is how often addresses are looked at that nobody needs any more.
const housekeeping = time.Hour

// again is how long it waits after a failure.
const again = time.Second

// Run allocates until ctx ends.
func (a *Allocator) Run(ctx context.Context) error {
	for {
		snapshot, changed := a.config.Store.Snapshot()
		wait := housekeeping
		if snapshot.Revision > 0 {
			if err := a.settle(ctx, snapshot); err != nil && ctx.Err() == nil {
				a.config.Log.Warn("virtual addresses", "err", err)
				wait = again
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// settle brings the store to what the snapshot needs.
func (a *Allocator) settle(ctx context.Context, snapshot *federation.Snapshot) error {
	now := a.config.Now()
	plan := federation.PlanAddresses(snapshot.Addresses, federation.NeedsVirtualAddress(snapshot), now)
	if plan.Empty() {
		return nil
	}
	taken := map[netip.Addr]bool{}
	for _, v := range snapshot.Addresses {
		taken[v.V4], taken[v.V6] = true, true
	}
	var put []federation.VirtualAddress
	var errs []error
	for _, host := range plan.Allocate {
		v, err := a.config.Ranges.Allocate(host, func(ip netip.Addr) bool { return taken[ip] })
		if err != nil {
			errs = append(errs, err)
			continue
		}
		taken[v.V4], taken[v.V6] = true, true
		put = append(put, v)
	}
	for _, host := range plan.Revive {
		v := snapshot.Addresses[host]
		v.Released = time.Time{}
		put = append(put, v)
	}
	for _, host := range plan.Release {
		v := snapshot.Addresses[host]
		v.Released = now
		put = append(put, v)
	}
	if len(put) > 0 {
		errs = append(errs, a.config.Store.PutAddresses(ctx, put))
	}
	if len(plan.Delete) > 0 {
		errs = append(errs, a.config.Store.DropAddresses(ctx, plan.Delete, now))
	}
	return errors.Join(errs...)
}
