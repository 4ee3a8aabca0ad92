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

	// Answer is how long the API server may take to answer a list or a watch, and to go on
	// with the first state of a kind, before it is asked again with twice the patience; zero
	// means 10 s. A kind of which nothing is heard for half as long is out of sync. Silence
	// is how long a watch may bring neither changes nor bookmarks, of which kube-apiserver
	// sends one a minute; zero means 90 s.
	Answer, Silence time.Duration

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
	}{{&config.Beat, 5 * time.Second}, {&config.Patience, 2500 * time.Millisecond}, {&config.Discovery, 10 * time.Second}, {&config.Keys, 2 * time.Minute},
		{&config.Answer, 10 * time.Second}, {&config.Silence, 90 * time.Second}} {
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

	wasAway atomic.Bool // it did not answer once

	// guardMu lets one goroutine at a time ask who the cluster is.
	guardMu   sync.Mutex
	verified  time.Time // when it was asked last
	verifier  *access
	verifyErr error

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
		wg.Go(func() { r.keepTrustBundle(ctx) })
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
		level, ok := r.caches.level()
		if ok && r.knowsKinds() {
			r.sink.Offer(level)
			if level.Gateways != nil {
				r.observe(r.caches.gatewayCondition(level.Gateways))
			}
		}
		r.observeSync(r.reachable())
		if !pause(ctx, settle) {
			return
		}
	}
}

// knowsKinds tells whether the kinds of configuration were asked for once.
func (r *run) knowsKinds() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.discovered
}

// reachable tells that the API server is not known to be away.
func (r *run) reachable() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, known := r.status.Condition(federation.Reachable)
	return !known || c.Status
}

// observeSync tells whether all kinds arrive. While the API server is away nothing does,
// and that says it all.
func (r *run) observeSync(reachable bool) {
	h := r.hear()
	settled := h.settled && r.knowsKinds()
	r.update(func(s *registry.Status) bool {
		changed := !s.Unheard.Equal(h.unheard)
		s.Unheard = h.unheard
		return changed
	})
	c := federation.Condition{Type: federation.Synced, Status: true, Reason: "Synced"}
	switch {
	case len(h.denied) > 0:
		c.Status, c.Reason = false, "Forbidden"
		c.Message = fmt.Sprintf("the API server does not show %s, whose last known state stays; run: mesh join cluster %s", strings.Join(h.denied, ", "), r.name())
	case !settled && r.wasSynced() && (!reachable || !h.gaveUp && r.restarting()):
		return
	case !settled:
		c.Status, c.Reason = false, "Waiting"
		c.Message = "waiting for " + strings.Join(h.waiting, ", ") + "; the last known state is served"
	case len(h.silent) > 0 && !reachable:
		return
	case len(h.silent) > 0:
		c.Status, c.Reason = false, "Silent"
		c.Message = fmt.Sprintf("the API server says nothing of %s since %s; the last known state is served", strings.Join(h.silent, ", "), h.since.UTC().Format(time.TimeOnly+"Z"))
	}
	r.observe(c)
}

// heard sorts the kinds by what is heard of them.
type heard struct {
	waiting []string // that did not arrive yet
	denied  []string // that the API server does not show
	silent  []string // that it says nothing of any more
	since   time.Time
	settled bool      // waiting longer would not bring more kinds
	gaveUp  bool      // it was asked for one of those that are waited for in vain
	unheard time.Time // since when one of them is not heard; zero while all are
}

func (r *run) hear() heard {
	h := heard{settled: true}
	now := r.config.Now()
	earlier := func(a, b time.Time) time.Time {
		if a.IsZero() || b.Before(a) {
			return b
		}
		return a
	}
	for kind, s := range r.caches.states() {
		deaf := time.Duration(0)
		if !s.deaf.IsZero() {
			deaf = now.Sub(s.deaf)
		}
		if s.denied == nil && deaf >= deafFor {
			h.unheard = earlier(h.unheard, s.deaf)
		}
		h.settled = h.settled && s.settled()
		switch {
		case s.denied != nil, s.refusedLong(now):
			h.denied = append(h.denied, kind)
		case !s.synced:
			h.waiting = append(h.waiting, kind)
			h.gaveUp = h.gaveUp || s.gaveUp
		case deaf >= r.config.Answer/2: // longer than the pause between attempts to watch
			h.silent = append(h.silent, kind)
			h.since = earlier(h.since, s.deaf)
		}
	}
	if len(h.waiting) == 0 {
		h.waiting = []string{"the list of its kinds"} // discovery
	}
	for _, kinds := range [][]string{h.waiting, h.denied, h.silent} {
		slices.Sort(kinds)
	}
	return h
}

// restartGrace is how long the caches of a member that was read before may take to fill
// again, after a restart or when another replica takes the member over, before that is a
// transition: a healthy one is none.
const restartGrace = 10 * time.Second

// restarting tells that the run is young, and that the API server answered all the time.
func (r *run) restarting() bool {
	return r.config.Now().Sub(r.begun) < restartGrace && !r.wasAway.Load()
}

// wasSynced tells that the member was in sync when that was stored last.
func (r *run) wasSynced() bool {
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

// guard makes sure that what answers is the member, before something is read from it. Who
// waited while somebody else asked takes that answer, also if there was none: else an API
// server that says nothing would keep the last of many kinds waiting for all before it.
func (r *run) guard(ctx context.Context) error {
	select {
	case <-r.usable:
	case <-ctx.Done():
		return ctx.Err()
	}
	came := r.config.Now()
	r.guardMu.Lock()
	defer r.guardMu.Unlock()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	a, now := r.access.Load(), r.config.Now()
	if a == r.verifier && (!r.verified.Before(came) || r.verifyErr == nil && now.Sub(r.verified) < verifiedFor) {
		return r.verifyErr
	}
	r.verifier, r.verified, r.verifyErr = a, now, nil
	attempt, cancel := context.WithTimeout(ctx, 2*r.config.Patience)
	defer cancel()
	id, err := a.api.ClusterID(attempt)
	if err == nil {
		err = r.checkID(id)
	}
	if ctx.Err() != nil {
		r.verifier = nil // whoever asked has gone: that says nothing
	}
	r.verifyErr = err
	return err
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

func (r *run) hearing() hearing {
	return hearing{answer: r.config.Answer, silence: r.config.Silence, log: r.log, wake: r.wakeUp}
}

// followCore keeps the five kinds that services are made of.
func (r *run) followCore(ctx context.Context, wg *sync.WaitGroup) {
	core := func(a *API) restClient { return a.core }
	h := r.hearing()
	wg.Go(func() {
		r.caches.services.follow(ctx, "services", &corev1.Service{}, r.typed(core, "services", "", ""), r.guard, h)
	})
	wg.Go(func() { r.caches.pods.follow(ctx, "pods", &corev1.Pod{}, r.typed(core, "pods", "", ""), r.guard, h) })
	wg.Go(func() {
		r.caches.nodes.follow(ctx, "nodes", &corev1.Node{}, r.typed(core, "nodes", "", ""), r.guard, h)
	})
	wg.Go(func() {
		r.caches.namespaces.follow(ctx, "namespaces", &corev1.Namespace{}, r.typed(core, "namespaces", "", ""), r.guard, h)
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
		r.caches.slices.follow(ctx, "endpointslices", &discoveryv1.EndpointSlice{}, r.typed(slices, "endpointslices", "", ""), r.guard, h)
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
				table.follow(ctx, string(kind), &unstructured.Unstructured{}, r.untyped(gvr), r.guard, r.hearing())
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
