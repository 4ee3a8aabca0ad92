// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// SourceConfig says what the source of a member works with.
type SourceConfig struct {
	// Store has the member and its credentials, and takes renewed ones.
	Store registry.Store

	// ID of the member.
	ID federation.ClusterID

	// Roots returns the PEM of the mesh's roots, which the member's injected namespaces
	// are given; nil leaves them alone. It is asked again and again.
	Roots func() []byte

	// Replica names this process in the beacon.
	Replica string

	// Beat is how often the beacon is renewed; zero means 5 s. Patience is how long the
	// API server may take to answer it; zero means 2.5 s.
	Beat, Patience time.Duration

	// UnknownKeys returns a channel that is closed when somebody next shows a token of a key
	// that no member has; nil if nobody tells.
	UnknownKeys func() <-chan struct{}

	// Keys is how often the member is asked for the keys of its service account tokens, if
	// nothing else makes it; zero means 2 min.
	Keys time.Duration

	// Discovery is how often the member is asked for kinds that it did not have; zero
	// means 10 s.
	Discovery time.Duration

	Budget Budget

	// Log; nil means none.
	Log *slog.Logger

	// Now is the time; nil means time.Now.
	Now func() time.Time
}

// Source is the registry.Source of a member cluster.
type Source struct {
	config SourceConfig
	log    *slog.Logger
}

var _ registry.Source = (*Source)(nil)

// NewSource makes a source, which does nothing until it is run.
func NewSource(config SourceConfig) *Source {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{{&config.Beat, 5 * time.Second}, {&config.Patience, 2500 * time.Millisecond}, {&config.Discovery, 10 * time.Second}, {&config.Keys, 2 * time.Minute}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if config.Replica == "" {
		config.Replica = "meshd"
	}
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	return &Source{config: config, log: config.Log.With("cluster", config.ID)}
}

// settle is how long changes are gathered after a level was offered.
const settle = 5 * time.Millisecond

// configGroups are the API groups of configuration that primaries contribute.
var configGroups = []string{
	"networking.istio.io", "security.istio.io", "telemetry.istio.io", "extensions.istio.io",
	"gateway.networking.k8s.io", "multicluster.x-k8s.io",
}

// run is one run of a source: fresh caches, and the goroutines that keep them.
type run struct {
	*Source
	sink   registry.Sink
	caches *caches
	begun  time.Time
	wake   chan struct{}
	access atomic.Pointer[access]
	usable chan struct{} // closed when there is an access
	again  chan struct{} // the API server answers again

	// guardMu lets one goroutine at a time ask who the cluster is.
	guardMu  sync.Mutex
	verified time.Time
	verifier *access

	mu         sync.Mutex
	status     registry.Status
	discovered bool // the kinds of configuration were asked for once
}

// Run implements registry.Source.
func (s *Source) Run(ctx context.Context, sink registry.Sink) error {
	m := s.config.Store.Members()[s.config.ID]
	if m == nil {
		return fmt.Errorf("cluster %s: %w", s.config.ID, registry.ErrNotFound)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &run{Source: s, sink: sink, begun: s.config.Now(), wake: make(chan struct{}, 1), usable: make(chan struct{}), again: make(chan struct{}, 1)}
	snapshot, _ := s.config.Store.Snapshot()
	r.caches = newCaches(m, s.config.Budget, r.wakeUp)
	r.caches.know(snapshot)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { r.keepAccess(ctx) })
	wg.Go(func() { r.beat(ctx) })
	wg.Go(func() { r.renew(ctx) })
	wg.Go(func() { r.keepKeys(ctx) })
	wg.Go(func() { r.followCore(ctx, &wg) })
	wg.Go(func() { r.discover(ctx, &wg) })
	if s.config.Roots != nil {
		wg.Go(func() { r.keepRoots(ctx) })
	}
	r.offer(ctx)
	return nil
}

func (r *run) wakeUp() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// offer hands over a level whenever something changed.
func (r *run) offer(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		}
		r.mu.Lock()
		discovered := r.discovered
		r.mu.Unlock()
		level, ok := r.caches.level()
		if ok && discovered {
			r.sink.Offer(level)
			if level.Gateways != nil {
				r.observe(r.caches.gatewayCondition(level.Gateways))
			}
		}
		r.observeSync(ok && discovered)
		if !pause(ctx, settle) {
			return
		}
	}
}

// observeSync tells whether all kinds arrive.
func (r *run) observeSync(settled bool) {
	var waiting, denied []string
	for kind, s := range r.caches.states() {
		switch {
		case s.denied != nil, s.refusedLong(r.config.Now()):
			denied = append(denied, kind)
		case !s.synced:
			waiting = append(waiting, kind)
		}
	}
	if len(waiting) == 0 {
		waiting = []string{"the list of its kinds"} // discovery
	}
	slices.Sort(waiting)
	slices.Sort(denied)
	c := federation.Condition{Type: federation.Synced, Status: true, Reason: "Synced"}
	switch {
	case len(denied) > 0:
		c.Status, c.Reason = false, "Forbidden"
		c.Message = fmt.Sprintf("the API server does not show %s, whose last known state stays; run: mesh join cluster %s", strings.Join(denied, ", "), r.name())
	case !settled && r.restarting():
		return
	case !settled:
		c.Status, c.Reason = false, "Waiting"
		c.Message = "waiting for " + strings.Join(waiting, ", ") + "; the last known state is served"
	}
	r.observe(c)
}

// restartGrace is how long the caches of a member that was read before may take to fill
// again, after a restart or when another replica takes the member over, before that is a
// transition: a healthy one is none.
const restartGrace = 10 * time.Second

// restarting tells that the run is young, and that the member was in sync before.
func (r *run) restarting() bool {
	if r.config.Now().Sub(r.begun) >= restartGrace {
		return false
	}
	m := r.config.Store.Members()[r.config.ID]
	return m != nil && slices.ContainsFunc(m.Conditions, func(c federation.Condition) bool { return c.Type == federation.Synced && c.Status })
}

func (r *run) name() string {
	if m := r.config.Store.Members()[r.config.ID]; m != nil {
		return m.Name
	}
	return string(r.config.ID)
}

// observe replaces conditions and hands the status on if it means something else.
func (r *run) observe(conditions ...federation.Condition) {
	r.update(func(s *registry.Status) bool {
		changed := false
		for _, c := range conditions {
			changed = setCondition(s, c, r.config.Now()) || changed
		}
		return changed
	})
}

func setCondition(s *registry.Status, c federation.Condition, now time.Time) bool {
	if c.Since.IsZero() {
		c.Since = now
	}
	for i := range s.Conditions {
		old := &s.Conditions[i]
		if old.Type != c.Type {
			continue
		}
		if old.Status == c.Status {
			c.Since = old.Since
		}
		if *old == c {
			return false
		}
		// What was handed on is not changed: the sink may still read it.
		s.Conditions = slices.Clone(s.Conditions)
		s.Conditions[i] = c
		return true
	}
	s.Conditions = append(slices.Clone(s.Conditions), c)
	return true
}

func (r *run) update(change func(s *registry.Status) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if change(&r.status) {
		r.sink.Observe(r.status)
	}
}

// errNoAccess: there is no credential to try with.
var errNoAccess = errors.New("no credential for the API server")

// errOtherCluster: what answers at the member's address is another cluster.
var errOtherCluster = errors.New("another cluster answers")

// api is the present way to the API server.
func (r *run) api() (*API, error) {
	a := r.access.Load()
	if a == nil {
		return nil, errNoAccess
	}
	return a.api, nil
}

// verifiedFor is how long an answer to "who are you" is good for: reflectors that connect
// again at the same time need not all ask.
const verifiedFor = time.Second

// guard makes sure that what answers is the member, before something is read from it.
func (r *run) guard(ctx context.Context) error {
	select {
	case <-r.usable:
	case <-ctx.Done():
		return ctx.Err()
	}
	r.guardMu.Lock()
	defer r.guardMu.Unlock()
	a := r.access.Load()
	if a == r.verifier && r.config.Now().Sub(r.verified) < verifiedFor {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*r.config.Patience)
	defer cancel()
	id, err := a.api.ClusterID(ctx)
	if err != nil {
		return err
	}
	if err := r.checkID(id); err != nil {
		return err
	}
	r.verifier, r.verified = a, r.config.Now()
	return nil
}

func (r *run) checkID(id federation.ClusterID) error {
	if id == r.config.ID {
		r.observe(federation.Condition{Type: federation.SameCluster, Status: true, Reason: "Verified"})
		return nil
	}
	r.observe(federation.Condition{
		Type: federation.SameCluster, Reason: "OtherCluster",
		Message: fmt.Sprintf("the cluster behind the address has UID %s instead of %s; nothing is read from it. If it was rebuilt, run: mesh join cluster %s --replace", id, r.config.ID, r.name()),
	})
	return fmt.Errorf("%w: uid %s", errOtherCluster, id)
}

// followCore keeps the five kinds that services are made of.
func (r *run) followCore(ctx context.Context, wg *sync.WaitGroup) {
	core := func(a *API) restClient { return a.core }
	wg.Go(func() {
		r.caches.services.follow(ctx, "services", &corev1.Service{}, r.typed(core, "services", "", ""), r.guard)
	})
	wg.Go(func() { r.caches.pods.follow(ctx, "pods", &corev1.Pod{}, r.typed(core, "pods", "", ""), r.guard) })
	wg.Go(func() { r.caches.nodes.follow(ctx, "nodes", &corev1.Node{}, r.typed(core, "nodes", "", ""), r.guard) })
	wg.Go(func() {
		r.caches.namespaces.follow(ctx, "namespaces", &corev1.Namespace{}, r.typed(core, "namespaces", "", ""), r.guard)
	})
	wg.Go(func() {
		// Pods first: slices name them, and share their strings. There is no level without
		// either of them anyway.
		for !r.caches.pods.state().settled() {
			if !pause(ctx, settle) {
				return
			}
		}
		slices := func(a *API) restClient { return a.discovery }
		r.caches.slices.follow(ctx, "endpointslices", &discoveryv1.EndpointSlice{}, r.typed(slices, "endpointslices", "", ""), r.guard)
	})
}

// discover looks for kinds of configuration, and again for those that are not installed
// yet. Remotes are asked too: their objects do nothing, and must be seen to say so.
func (r *run) discover(ctx context.Context, wg *sync.WaitGroup) {
	for {
		failed := !r.discoverOnce(ctx, wg)
		r.mu.Lock()
		r.discovered = r.discovered || !failed
		r.mu.Unlock()
		r.wakeUp()
		wait := r.config.Discovery
		if failed {
			wait = min(wait, time.Second)
		}
		if !pause(ctx, wait) {
			return
		}
	}
}

// discoverOnce starts a table for every kind that is new, and tells whether all groups
// were answered for.
func (r *run) discoverOnce(ctx context.Context, wg *sync.WaitGroup) bool {
	complete := true
	for _, group := range configGroups {
		attempt, cancel := context.WithTimeout(ctx, 2*r.config.Patience)
		a, err := r.api()
		if err == nil {
			err = r.guard(attempt)
		}
		if err != nil {
			cancel()
			return false
		}
		resources, kinds, err := a.resources(attempt, group)
		cancel()
		if err != nil {
			r.log.Debug("cannot discover a group", "group", group, "error", err)
			complete = false
			continue
		}
		for _, gvr := range resources {
			kind := registry.ObjectKind(kinds[gvr] + "." + group)
			table, fresh := r.caches.config(kind, kinds[gvr])
			if !fresh {
				continue
			}
			r.log.Debug("found a kind of configuration", "kind", kind, "version", gvr.Version)
			wg.Go(func() {
				table.follow(ctx, string(kind), &unstructured.Unstructured{}, r.untyped(gvr), r.guard)
			})
		}
	}
	return complete
}

// injectedNamespaces have a pod with a proxy, or say that they will.
func (r *run) injectedNamespaces() []string {
	seen := map[string]bool{}
	exists := map[string]bool{}
	r.caches.namespaces.each(func(key registry.ObjectName, n *namespaceRow) {
		exists[key.Name] = true
		if n.injected {
			seen[key.Name] = true
		}
	})
	istio := r.caches.optedIn()
	r.caches.pods.each(func(key registry.ObjectName, p *podRow) {
		if p.role != "" && (istio || !p.istio) && exists[key.Namespace] {
			seen[key.Namespace] = true
		}
	})
	return slices.Sorted(maps.Keys(seen))
}

// pause waits, and tells whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
