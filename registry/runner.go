// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/federation"
)

// RunnerConfig says what a Runner works with.
type RunnerConfig struct {
	Store Store

	// Cluster makes the source of a member, VMs that of the VMs of a network. Nil means
	// that this process does not sync sources of that kind.
	Cluster func(m *Member) Source
	VMs     func(n federation.Network) Source

	// Those of IngestConfig.
	Holdoff, Retry, Exposure, Absence, Linger time.Duration

	// Log; nil means none.
	Log *slog.Logger
}

// Runner keeps one Ingest for every source that the store knows. Every replica runs one;
// sessions see to it that each source is synced by exactly one of them.
type Runner struct {
	config  RunnerConfig
	metrics *ingestMetrics

	mu      sync.Mutex // guards running, which Run changes
	running map[federation.SourceID]*runningIngest
}

type runningIngest struct {
	*Ingest
	cancel context.CancelFunc
	done   chan struct{}
}

var _ prometheus.Collector = (*Runner)(nil)

// NewRunner makes a Runner, which does nothing until Run.
func NewRunner(config RunnerConfig) *Runner {
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	return &Runner{config: config, metrics: newIngestMetrics(), running: map[federation.SourceID]*runningIngest{}}
}

// Run syncs sources until ctx ends, and gives their sessions back.
func (r *Runner) Run(ctx context.Context) error {
	defer r.stopAll()
	leftovers := true
	for {
		snapshot, changed := r.config.Store.Snapshot()
		if snapshot.Revision > 0 {
			r.adjust(ctx, snapshot, leftovers)
			leftovers = false
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// adjust starts and stops ingests so that they are those of the sources in the store.
func (r *Runner) adjust(ctx context.Context, snapshot *federation.Snapshot, leftovers bool) {
	want := map[federation.SourceID]func() Source{}
	if r.config.Cluster != nil {
		for _, m := range r.config.Store.Members() {
			want[m.Source()] = func() Source { return r.config.Cluster(m) }
		}
	}
	if r.config.VMs != nil {
		for _, n := range r.vmNetworks(snapshot, leftovers) {
			want[federation.VMSource(n)] = func() Source { return r.config.VMs(n) }
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for source, ingest := range r.running {
		if want[source] == nil || ingest.ended() {
			ingest.cancel()
			delete(r.running, source)
			go func() { <-ingest.done }()
		}
	}
	for source, newSource := range want {
		if ingest := r.running[source]; ingest != nil {
			grant, _ := snapshot.GrantOf(source)
			ingest.SetGrant(grant)
			continue
		}
		r.running[source] = r.start(ctx, source, newSource())
	}
}

// vmNetworks are the networks with VMs, and those that have or had some: a source that is
// left behind withdraws what it reported.
func (r *Runner) vmNetworks(snapshot *federation.Snapshot, leftovers bool) []federation.Network {
	seen := map[federation.Network]bool{}
	for name := range r.config.Store.VMs() {
		seen[name.Network] = true
	}
	r.mu.Lock()
	for source := range r.running {
		if n, ok := source.VMNetwork(); ok {
			seen[n] = true
		}
	}
	r.mu.Unlock()
	if leftovers {
		for key := range snapshot.Workloads {
			if n, ok := key.Source.VMNetwork(); ok {
				seen[n] = true
			}
		}
	}
	out := make([]federation.Network, 0, len(seen))
	for n := range seen {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

func (r *Runner) start(ctx context.Context, id federation.SourceID, source Source) *runningIngest {
	ctx, cancel := context.WithCancel(ctx)
	ingest := newIngest(IngestConfig{
		Store: r.config.Store, SourceID: id, Log: r.config.Log, Holdoff: r.config.Holdoff, Retry: r.config.Retry,
		Exposure: r.config.Exposure, Absence: r.config.Absence, Linger: r.config.Linger,
	}, r.metrics)
	running := &runningIngest{ingest, cancel, make(chan struct{})}
	go func() {
		defer close(running.done)
		if err := ingest.Run(ctx, source); err != nil {
			ingest.log.Error("the source cannot be synced", "error", err)
		}
	}()
	return running
}

func (r *runningIngest) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

func (r *Runner) stopAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, ingest := range r.running {
		ingest.cancel()
	}
	for source, ingest := range r.running {
		<-ingest.done
		delete(r.running, source)
	}
}

// Sources tells how the sources are, ordered by name; those that another replica syncs are
// not Holding.
func (r *Runner) Sources() []SourceState {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]SourceState, 0, len(r.running))
	for _, ingest := range r.running {
		out = append(out, ingest.State())
	}
	slices.SortFunc(out, func(a, b SourceState) int { return cmp.Compare(a.Source, b.Source) })
	return out
}
