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

// Allocator gives virtual addresses to the hosts that need one, and takes them back after
// they have rested. Every replica runs one: which address a host gets follows from its
// name, so that replicas agree, and the store decides where they do not.
type Allocator struct {
	Store interface {
		Snapshot() (*federation.Snapshot, <-chan struct{})
		Addresses
	}

	// Ranges of the addresses; zero means federation's defaults.
	Ranges federation.VirtualRanges

	// Holdoff is the least time between two plans; zero means 50 ms.
	Holdoff time.Duration

	// Log; nil means none.
	Log *slog.Logger

	// Now is the time; nil means time.Now.
	Now func() time.Time
}

// Run keeps addresses until ctx ends.
func (a Allocator) Run(ctx context.Context) error {
	if a.Holdoff == 0 {
		a.Holdoff = 50 * time.Millisecond
	}
	if a.Log == nil {
		a.Log = slog.New(slog.DiscardHandler)
	}
	if a.Now == nil {
		a.Now = time.Now
	}
	rest := time.NewTicker(10 * time.Minute) // what has rested long enough goes by time alone
	defer rest.Stop()
	for {
		snapshot, changed := a.Store.Snapshot()
		var again <-chan time.Time
		if snapshot.Revision > 0 {
			if err := a.plan(ctx, snapshot); err != nil && ctx.Err() == nil {
				a.Log.Warn("cannot keep virtual addresses", "error", err)
				again = time.After(time.Second)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(a.Holdoff):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		case <-rest.C:
		}
	}
}

// plan does what is to do at one snapshot.
func (a Allocator) plan(ctx context.Context, s *federation.Snapshot) error {
	now := a.Now()
	p := federation.PlanAddresses(s.Addresses, federation.NeedsVirtualAddress(s), now)
	if p.Empty() {
		return nil
	}
	var put []federation.VirtualAddress
	for _, host := range p.Revive {
		address := s.Addresses[host]
		address.Released = time.Time{}
		put = append(put, address)
	}
	for _, host := range p.Release {
		address := s.Addresses[host]
		address.Released = now.UTC().Truncate(time.Second)
		put = append(put, address)
	}
	taken := make(map[netip.Addr]bool, 2*len(s.Addresses))
	for _, address := range s.Addresses {
		taken[address.V4], taken[address.V6] = true, true
	}
	var errs []error
	for _, host := range p.Allocate {
		address, err := a.Ranges.Allocate(host, func(ip netip.Addr) bool { return taken[ip] })
		if err != nil {
			errs = append(errs, err)
			break // the range is full: so it is for the next one
		}
		taken[address.V4], taken[address.V6] = true, true
		put = append(put, address)
	}
	if len(put) > 0 {
		errs = append(errs, a.Store.PutAddresses(ctx, put))
	}
	if len(p.Delete) > 0 {
		errs = append(errs, a.Store.DropAddresses(ctx, p.Delete, now))
	}
	return errors.Join(errs...)
}
