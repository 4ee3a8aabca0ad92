// SPDX-License-Identifier: Apache-2.0

package gateways

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Resolver finds the addresses of gateways that are known by host name only, as the load
// balancers of some clouds are. Envoy's endpoint discovery takes addresses, not names,
// and every client would have to look up every gateway; so it is done once, here.
type Resolver struct {
	// Lookup finds a name's addresses; nil means the system's resolver.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	// Interval between look-ups of a name; zero means 10 s.
	Interval time.Duration
	// Changed is called after the addresses of any name changed; nil for no one.
	Changed func()
	Log     *slog.Logger

	mu     sync.Mutex
	wanted map[string]bool
	known  map[string][]netip.Addr
	wake   chan struct{}
}

// Resolve returns a snapshot in which names that have been looked up are replaced by
// their addresses. It never blocks: a name is looked up after it was first seen, and keeps
// its last addresses while look-ups fail. The snapshot given is not changed.
func (r *Resolver) Resolve(s *federation.Snapshot) *federation.Snapshot {
	wanted := map[string]bool{}
	r.mu.Lock()
	defer r.mu.Unlock()
	out := *s
	for network, list := range s.Gateways {
		for i, g := range list {
			addresses, names := r.replace(g)
			if len(names) == 0 {
				continue
			}
			for _, n := range names {
				wanted[n] = true
			}
			out.Gateways = withGateway(out.Gateways, network, i, g, addresses)
		}
	}
	if !maps.Equal(wanted, r.wanted) {
		r.wanted = wanted
		select {
		case r.wakeUp() <- struct{}{}:
		default:
		}
	}
	return &out
}

// wakeUp is made on first use, under the lock.
func (r *Resolver) wakeUp() chan struct{} {
	if r.wake == nil {
		r.wake = make(chan struct{}, 1)
	}
	return r.wake
}

// replace lists a gateway's addresses with names resolved, and those names.
func (r *Resolver) replace(g *federation.Gateway) (out []federation.GatewayAddress, names []string) {
	for _, a := range g.Addresses {
		if _, err := netip.ParseAddr(a.Host); err == nil {
			out = append(out, a)
			continue
		}
		names = append(names, a.Host)
		ips := r.known[a.Host]
		if len(ips) == 0 {
			out = append(out, a)
		}
		for _, ip := range ips {
			out = append(out, federation.GatewayAddress{Host: ip.String(), Port: a.Port})
		}
	}
	return out, names
}

// withGateway is a copy of all in which one gateway has other addresses.
func withGateway(all map[federation.Network][]*federation.Gateway, network federation.Network, i int, g *federation.Gateway, addresses []federation.GatewayAddress) map[federation.Network][]*federation.Gateway {
	all = maps.Clone(all)
	changed := *g
	changed.Addresses = addresses
	all[network] = slices.Clone(all[network])
	all[network][i] = &changed
	return all
}

// Run looks names up until the context ends.
func (r *Resolver) Run(ctx context.Context) error {
	interval := r.Interval
	if interval == 0 {
		interval = 10 * time.Second
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	r.mu.Lock()
	wake := r.wakeUp()
	r.mu.Unlock()
	for {
		if r.lookUp(ctx) && r.Changed != nil {
			r.Changed()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		case <-wake:
		}
	}
}

// lookUp asks for every wanted name and tells whether any answer is new.
func (r *Resolver) lookUp(ctx context.Context) bool {
	r.mu.Lock()
	names := slices.Sorted(maps.Keys(r.wanted))
	r.mu.Unlock()
	changed := false
	for _, name := range names {
		ips, err := r.ask(ctx, name)
		if err != nil || len(ips) == 0 {
			if r.Log != nil && ctx.Err() == nil {
				r.Log.Warn("gateway host name not resolved", "host", name, "error", err)
			}
			continue
		}
		slices.SortFunc(ips, netip.Addr.Compare)
		r.mu.Lock()
		if !slices.Equal(r.known[name], ips) {
			if r.known == nil {
				r.known = map[string][]netip.Addr{}
			}
			r.known[name] = ips
			changed = true
		}
		r.mu.Unlock()
	}
	return changed
}

func (r *Resolver) ask(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if r.Lookup != nil {
		return r.Lookup(ctx, host)
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	return ips, err
}
