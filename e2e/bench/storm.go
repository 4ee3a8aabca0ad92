// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/isthmus-mesh/isthmus/xds"
)

// crowdSize is how many proxies the figures are measured with that need no more.
const crowdSize = 500

// someProxies is that number, or fewer if fewer were asked for.
func (b *bench) someProxies() int { return min(b.proxies, crowdSize) }

// world starts a server with some services, and proxies that ask for everything it has.
func (b *bench) world(ctx context.Context, services, proxies int, c certificates) (*measuredSubject, error) {
	config := subjectConfig{World: engineWorld{Services: services, Proxies: proxies, Classes: 1}, CA: c.root, Cert: c.cert, Key: c.key}
	s, err := b.subject(ctx, subjectOurs, config, c)
	if err != nil {
		return nil, err
	}
	s.crowd.last = -1 // nobody is alone
	err = s.crowd.connect(ctx, proxies, true)
	if err == nil {
		err = s.crowd.arrived(ctx, 4*int64(proxies)) // clusters, endpoints, listeners, routes
	}
	if err == nil {
		err = s.crowd.quiet(ctx, time.Second)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// atOnce is how many proxies shake hands at a time when they come back.
const atOnce = 256

// playReconnect has everybody come to a replica that has only just started, with
// all that another one told them.
func playReconnect(ctx context.Context, b *bench) error {
	certificates, err := newCertificates()
	if err != nil {
		return err
	}
	before, err := b.world(ctx, engineServices, 1, certificates)
	if err != nil {
		return err
	}
	kept := before.crowd.learnt
	before.close()
	config := subjectConfig{World: engineWorld{Services: engineServices, Proxies: b.proxies, Classes: 1}, CA: certificates.root, Cert: certificates.cert, Key: certificates.key}
	s, err := b.subject(ctx, subjectOurs, config, certificates)
	if err != nil {
		return err
	}
	defer s.close()
	s.crowd.kept, s.crowd.last, s.crowd.together = kept, -1, atOnce
	start, err := s.order("settle")
	if err != nil {
		return err
	}
	began := time.Now()
	if err := b.profiled(s, "reconnect", func() error {
		if err := s.crowd.connect(ctx, b.proxies, true); err != nil {
			return err
		}
		return s.crowd.arrived(ctx, int64(b.proxies))
	}); err != nil {
		return err
	}
	took := time.Since(began)
	if err := s.crowd.quiet(ctx, time.Second); err != nil {
		return err
	}
	end, err := s.order("usage")
	if err != nil {
		return err
	}
	n := float64(b.proxies)
	note := fmt.Sprintf("%d proxies that have %d services come, %d at a time, mutual TLS without tickets; %.2f messages and %.1f KiB to each",
		b.proxies, engineServices, atOnce, float64(s.crowd.messages.Load())/n, float64(s.crowd.bytes.Load())/1024/n)
	b.report("reconnect-cpu-ms-per-proxy", (end.CPU-start.CPU)/1000/n, "%s", note)
	b.report("reconnect-last-s", took.Seconds(), "%s; until the last is in sync", note)
	return nil
}

// playGrowth measures one endpoint's change in worlds of different sizes, in turn.
func playGrowth(ctx context.Context, b *bench) error {
	certificates, err := newCertificates()
	if err != nil {
		return err
	}
	sizes := []int{100, 1000}
	if slices.Contains(b.wanted, "flap-growth-services") {
		sizes = append(sizes, 5000)
	}
	n := b.someProxies()
	var worlds []*measuredSubject
	for _, services := range sizes {
		s, err := b.world(ctx, services, n, certificates)
		if err != nil {
			return err
		}
		defer s.close()
		worlds = append(worlds, s)
	}
	cpu, bytes := make([][]float64, len(worlds)), make([]int64, len(worlds))
	mallocs := make([][]float64, len(worlds))
	for range enginePairs {
		for i, s := range worlds {
			was := s.crowd.bytes.Load()
			u, err := s.flap(ctx)
			if err != nil {
				return err
			}
			cpu[i] = append(cpu[i], u.CPU/float64(n))
			mallocs[i] = append(mallocs[i], float64(u.Mallocs)/float64(n))
			bytes[i] = (s.crowd.bytes.Load() - was) / int64(n)
		}
	}
	note, last := fmt.Sprintf("%d proxies, one message each;", n), len(sizes)-1
	for i, services := range sizes {
		note += fmt.Sprintf(" %d services: %.1f µs, %d bytes and %.2f allocations a proxy;", services, quantile(cpu[i], .5), bytes[i], quantile(mallocs[i], .5))
	}
	b.report("flap-growth-services", quantile(cpu[last], .5)/quantile(cpu[0], .5), "%s medians of %d rounds in turn", note, enginePairs)
	return nil
}

// playLinear compares one endpoint's change with go-control-plane's LinearCache.
func playLinear(ctx context.Context, b *bench) error {
	certificates, err := newCertificates()
	if err != nil {
		return err
	}
	for _, services := range []int{100, 500} {
		if err := b.linear(ctx, services, certificates); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) linear(ctx context.Context, services int, c certificates) error {
	n := b.someProxies()
	ours, err := b.world(ctx, services, n, c)
	if err != nil {
		return err
	}
	defer ours.close()
	config := subjectConfig{World: engineWorld{Services: services, Proxies: n, Classes: 1}, CA: c.root, Cert: c.cert, Key: c.key}
	theirs, err := b.subject(ctx, subjectLinear, config, c)
	if err != nil {
		return err
	}
	defer theirs.close()
	theirs.crowd.only = xds.EndpointType
	if err := theirs.crowd.connect(ctx, n, true); err != nil {
		return err
	}
	if err := theirs.crowd.arrived(ctx, int64(n)); err != nil {
		return err
	}
	if err := theirs.crowd.quiet(ctx, time.Second); err != nil {
		return err
	}
	var ratios, one, other []float64
	for range enginePairs {
		x, err := ours.flap(ctx)
		if err != nil {
			return err
		}
		y, err := theirs.flap(ctx)
		if err != nil {
			return fmt.Errorf("LinearCache: %w", err)
		}
		ratios, one, other = append(ratios, x.CPU/y.CPU), append(one, x.CPU/float64(n)), append(other, y.CPU/float64(n))
	}
	b.report(fmt.Sprintf("flap-vs-linearcache-%d", services), quantile(ratios, .5),
		"%d proxies that ask for the endpoints of %d services, medians of %d rounds in turn: ours %.1f µs a proxy, the computation of the change included, LinearCache with the same options of the transport %.1f, without it",
		n, services, enginePairs, quantile(one, .5), quantile(other, .5))
	return nil
}

// slowFlaps is how many changes are timed with slow readers and without.
const slowFlaps = 200

// playSlow measures whether proxies that do not answer, or refuse, delay the others.
func playSlow(ctx context.Context, b *bench) error {
	certificates, err := newCertificates()
	if err != nil {
		return err
	}
	n := b.someProxies()
	s, err := b.world(ctx, engineServices, n, certificates)
	if err != nil {
		return err
	}
	defer s.close()
	times := func(healthy int) ([]float64, error) {
		var out []float64
		for range slowFlaps {
			want, began := s.crowd.messages.Load()+int64(healthy), time.Now()
			if _, err := s.order("all"); err != nil {
				return nil, err
			}
			if err := s.crowd.arrived(ctx, want); err != nil {
				return nil, err
			}
			out = append(out, float64(time.Since(began).Microseconds())/1000)
			if err := s.crowd.quiet(ctx, 10*time.Millisecond); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	without, err := times(n)
	if err != nil {
		return err
	}
	slow, picky := n/20, n/100
	for i, p := range s.crowd.proxies[1:] {
		p.slow.Store(i < slow)
		p.picky.Store(i >= slow && i < slow+picky)
	}
	with, err := times(n - slow)
	if err != nil {
		return err
	}
	b.report("slow-readers-p99-ratio", quantile(with, .99)/quantile(without, .99),
		"%d proxies, %d changes: until the last has it %.1f ms, p99 %.1f; with %d that answer nothing and %d that refuse, the last of the others %.1f ms, p99 %.1f",
		n, slowFlaps, quantile(without, .5), quantile(without, .99), slow, picky, quantile(with, .5), quantile(with, .99))
	return nil
}

// churnPace and churnLength are how fast endpoints change, and for how long. No service
// changes twice.
const (
	churnPace   = 20 * time.Millisecond
	churnLength = 1000
)

// playChurn changes many services one after the other.
func playChurn(ctx context.Context, b *bench) error {
	certificates, err := newCertificates()
	if err != nil {
		return err
	}
	n := b.someProxies()
	s, err := b.world(ctx, engineServices, n, certificates)
	if err != nil {
		return err
	}
	defer s.close()
	last := map[string]time.Time{}
	heard := func(name string, at time.Time) { last[name] = at } // under the crowd's lock
	s.crowd.heard.Store(&heard)
	before, err := s.order("usage")
	if err != nil {
		return err
	}
	messages := s.crowd.messages.Load()
	changed := make([]time.Time, churnLength)
	ticker := time.NewTicker(churnPace)
	defer ticker.Stop()
	for i := range changed {
		changed[i] = time.Now()
		if _, err := s.order(fmt.Sprintf("flap %d", i)); err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := s.crowd.quiet(ctx, time.Second); err != nil {
		return err
	}
	after, err := s.order("usage")
	if err != nil {
		return err
	}
	s.crowd.mu.Lock()
	defer s.crowd.mu.Unlock()
	var late []float64
	for i, at := range changed {
		name := engineService(i)
		got, ok := last[fmt.Sprintf("outbound|80||%s", name.Host())]
		if !ok {
			return fmt.Errorf("nobody heard of the change of %s", name.Host())
		}
		late = append(late, float64(got.Sub(at).Microseconds())/1000)
	}
	note := fmt.Sprintf("%d changes, %.0f a second, %d proxies; %.1f messages a proxy", churnLength, float64(time.Second/churnPace), n, float64(s.crowd.messages.Load()-messages)/float64(n))
	b.report("churn-cpu-s", (after.CPU-before.CPU)/1e6, "%s", note)
	b.report("churn-p99-ms", quantile(late, .99), "from a change until the last proxy has it, median %.1f; %s", quantile(late, .5), note)
	return nil
}
