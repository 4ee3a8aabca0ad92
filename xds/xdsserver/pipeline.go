// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"context"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// Generator makes the resources of one role's proxies in one scope. xds.Builder is one.
// It is never used concurrently.
type Generator interface {
	// Class is what the proxy has in common with those that get the same.
	Class(view *federation.View, index *config.Index, proxy xds.Proxy) xds.Class
	// Census stays the same as long as Class gives the same for every proxy.
	Census(view *federation.View, index *config.Index) uint64
	// BuildClass makes everything the proxies of a class are told.
	BuildClass(view *federation.View, index *config.Index, class xds.Class) (xds.Resources, []federation.Finding)
	// Forget makes services be made again although they did not change.
	Forget(names ...federation.ServiceName)
}

// Restraint is what a generator must mind beside view and configuration: what is not to be
// told yet. Its functions are those of federation.Query.
type Restraint struct {
	Weigh  func(key federation.WeightKey, ready uint32) uint32
	Closed func(key federation.WeightKey) bool
}

// PipelineConfig of a Pipeline.
type PipelineConfig struct {
	// Generators make, for each role, the generator of one scope.
	Generators map[federation.ProxyRole]func(Restraint) Generator

	// Prepare may change a snapshot before it is used, for example to resolve the host
	// names of gateways; nil means as it is.
	Prepare func(*federation.Snapshot) *federation.Snapshot

	// Pace is the least time between two computations: a change after a quiet spell goes
	// out at once, a burst is taken together. Zero means 20 ms.
	Pace time.Duration

	Log *slog.Logger     // nil means none
	Now func() time.Time // nil means time.Now
}

// Pipeline turns snapshots into what each proxy is told: one view a scope, one
// computation a class, and a wake-up only for feeds whose bytes have changed. It is a
// Source. Before its first snapshot nobody is served.
type Pipeline struct {
	config  PipelineConfig
	metrics *pipelineMetrics
	wake    chan struct{} // capacity 1
	hurry   chan struct{} // capacity 1; the same, whatever the pace
	doors   *doors

	mu       sync.Mutex
	pending  *federation.Snapshot // given, not yet computed
	snapshot *federation.Snapshot
	index    *config.Index
	scopes   map[federation.Scope]*scope
	classes  map[xds.Class]*class
	feeds    map[*feed]struct{}
	gone     map[federation.WorkloadKey]time.Time // workloads that were there once
	absent   map[federation.Network]bool          // see elsewhere
	computed chan struct{}                        // closed after each computation
}

// scope is what the feeds of one scope share.
type scope struct {
	view       *federation.View
	prior      *federation.View     // the one before, during a computation that made another
	made       *federation.Snapshot // what view was made of; nil to make it again
	damper     *federation.Damper
	generators map[federation.ProxyRole]Generator
	used       bool
}

// class is what was last made for a class.
type class struct {
	view      *federation.View
	index     *config.Index
	resources xds.Resources
	findings  []federation.Finding
	used      bool
}

// remembered is how long a deleted workload is refused rather than waited for.
const remembered = time.Hour

// NewPipeline makes a pipeline. Run moves it.
func NewPipeline(c PipelineConfig) *Pipeline {
	if c.Pace == 0 {
		c.Pace = 20 * time.Millisecond
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	p := &Pipeline{
		config: c, metrics: newPipelineMetrics(), wake: make(chan struct{}, 1), hurry: make(chan struct{}, 1),
		scopes: map[federation.Scope]*scope{}, classes: map[xds.Class]*class{},
		feeds: map[*feed]struct{}{}, gone: map[federation.WorkloadKey]time.Time{},
		computed: make(chan struct{}),
	}
	p.doors = newDoors(c.Now, func() { poke(p.hurry) })
	return p
}

// poke fills a channel of capacity one.
func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Update hands over the newest snapshot. It returns at once; an older one that was not
// computed yet is skipped.
func (p *Pipeline) Update(s *federation.Snapshot) {
	p.mu.Lock()
	p.pending = s
	p.mu.Unlock()
	p.Refresh()
}

// Refresh computes the last snapshot again, for when what Prepare knows has changed.
func (p *Pipeline) Refresh() { poke(p.wake) }

// Run computes until the context ends.
func (p *Pipeline) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.wake:
		case <-p.hurry:
		case <-timer.C:
			if wait := p.nextDue(); wait > 0 {
				timer.Reset(wait)
				continue
			}
		}
		p.compute()
		timer.Reset(p.nextDue())
		if err := p.rest(ctx); err != nil {
			return err
		}
	}
}

// rest keeps the pace between two computations.
func (p *Pipeline) rest(ctx context.Context) error {
	pause := time.NewTimer(p.config.Pace)
	defer pause.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-p.hurry:
		poke(p.hurry)
		return nil
	case <-pause.C:
		return nil
	}
}

// compute brings every feed up to the newest snapshot.
func (p *Pipeline) compute() {
	p.mu.Lock()
	defer p.mu.Unlock()
	given := p.pending
	if given == nil {
		return
	}
	start := p.config.Now()
	p.adopt(given)
	p.letGo(start)
	for _, s := range p.scopes {
		s.used = false
	}
	for _, c := range p.classes {
		c.used = false
	}
	// Gateways first: what they do not know yet is not told to callers.
	woken := p.feedAll(true)
	closed := p.turnDoors()
	woken += p.feedAll(false)
	p.keepDoors(closed)
	p.sweep()
	close(p.computed)
	p.computed = make(chan struct{})
	p.metrics.computed(p.config.Now().Sub(start), woken)
	p.metrics.waited(p.doors.tally())
}

// feedAll recomputes what gateways are told, or what all others are, and says for how many
// it has changed.
func (p *Pipeline) feedAll(gateways bool) (woken int) {
	for f := range p.feeds {
		if gateways == f.isGateway() && p.feedIt(f) {
			woken++
		}
	}
	return woken
}

// turnDoors lets callers wait for the gateways at doors that have opened, and tells which
// have closed.
func (p *Pipeline) turnDoors() (closed []door) {
	for at, s := range p.scopes {
		keeper, ok := s.generators[federation.GatewayRole].(Gatekeeper)
		if !ok {
			continue
		}
		var gateways []*feed
		for f := range p.feeds {
			if f.isGateway() && f.subject.Network == at.Network {
				gateways = append(gateways, f)
			}
		}
		if len(gateways) == 0 {
			continue
		}
		opened, shut := keeper.Doors()
		for _, sni := range shut {
			closed = append(closed, door{at.Network, sni})
		}
		resources := gateways[0].told().Resources // all of a network have the same assignments
		for _, sni := range opened {
			p.openDoor(door{at.Network, sni}, resources, gateways)
		}
		p.doors.renew(at.Network, resources)
	}
	return closed
}

// openDoor waits for those gateways that run, and do not have the door's assignment yet.
func (p *Pipeline) openDoor(at door, resources xds.Resources, gateways []*feed) {
	r, _ := resources.Get(xds.EndpointType, at.sni)
	var lack []*feed
	for _, f := range gateways {
		if f.runs.Load() && !f.tardy.Load() && !f.hadAll(at.sni, r.Version) {
			lack = append(lack, f)
		}
	}
	p.doors.open(at, r.Version, lack, p.elsewhere(at.network))
	for _, f := range lack {
		poke(f.changed) // it may have acknowledged already what it has
	}
}

// keepDoors lets gateways keep closed doors until the callers know.
func (p *Pipeline) keepDoors(closed []door) {
	if len(closed) == 0 {
		return
	}
	var callers []*feed
	for f := range p.feeds {
		if !f.isGateway() && !f.tardy.Load() {
			callers = append(callers, f)
		}
	}
	p.doors.close(closed, callers)
}

// elsewhere tells whether a network has a ready gateway that is not connected here. It is
// worked out at most once in a computation.
func (p *Pipeline) elsewhere(network federation.Network) bool {
	if p.absent == nil {
		p.absent = map[federation.Network]bool{}
		here := map[federation.WorkloadKey]bool{}
		for f := range p.feeds {
			here[f.key] = true
		}
		for key, w := range p.snapshot.Workloads {
			if w.Role == federation.GatewayRole && w.Ready && !here[key] {
				p.absent[w.Network] = true
			}
		}
	}
	return p.absent[network]
}

// closed tells whether a scope's callers must not hear of a network's endpoints yet.
func (p *Pipeline) closed(s *scope, key federation.WeightKey) bool {
	if p.scopes[federation.Scope{Network: key.Network, Gateway: true}] == nil && s.arrives(key) && p.elsewhere(key.Network) {
		p.doors.arrive(arrival{key.Service, key.Network})
	}
	return p.doors.closed(key)
}

// arrives tells whether a service has its first ready endpoints in a network.
func (s *scope) arrives(key federation.WeightKey) bool {
	if s.prior == nil {
		return false
	}
	now, ok := s.view.Service(key.Service)
	if !ok || now.ReadyIn(key.Network) == 0 {
		return false
	}
	old, ok := s.prior.Service(key.Service)
	return !ok || old.ReadyIn(key.Network) == 0
}

// adopt takes a snapshot, and notes which workloads are gone since the last one.
func (p *Pipeline) adopt(given *federation.Snapshot) {
	s := given
	if p.config.Prepare != nil {
		s = p.config.Prepare(given)
	}
	now := p.config.Now()
	if p.snapshot != nil && !sameMap(p.snapshot.Workloads, s.Workloads) {
		for key := range p.snapshot.Workloads {
			if _, ok := s.Workloads[key]; !ok {
				p.gone[key] = now
			}
		}
	}
	maps.DeleteFunc(p.gone, func(key federation.WorkloadKey, at time.Time) bool {
		_, back := s.Workloads[key]
		return back || now.Sub(at) > remembered
	})
	if p.snapshot != s {
		p.index = config.NewFrom(p.index, s)
	}
	p.snapshot = s
}

// sameMap compares by identity: what stands in snapshots does not change.
func sameMap[K comparable, V any](a, b map[K]V) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}

// letGo makes the services be made again that were held back long enough.
func (p *Pipeline) letGo(now time.Time) {
	opened, dropped := p.doors.settle()
	for _, at := range dropped {
		if s := p.scopes[federation.Scope{Network: at.network, Gateway: true}]; s != nil {
			if keeper, ok := s.generators[federation.GatewayRole].(Gatekeeper); ok {
				keeper.Close(at.sni)
				s.made = nil
			}
		}
	}
	for _, s := range p.scopes {
		names := slices.Clone(opened)
		for _, key := range s.damper.Due(now) {
			names = append(names, key.Service)
		}
		if len(names) == 0 {
			continue
		}
		for _, g := range s.generators {
			g.Forget(names...)
		}
		s.made = nil // the same services, another split
	}
}

// nextDue is how long to wait before something that is held back may go.
func (p *Pipeline) nextDue() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	wait, now := time.Hour, p.config.Now()
	if at, ok := p.doors.next(); ok {
		wait = min(wait, at.Sub(now))
	}
	for _, s := range p.scopes {
		if at, ok := s.damper.Next(); ok {
			wait = min(wait, at.Sub(now))
		}
	}
	return max(wait, 0)
}

// feedIt recomputes what one feed is told, and tells whether that has changed.
func (p *Pipeline) feedIt(f *feed) bool {
	if w := p.snapshot.Workloads[f.key]; w != nil && w != f.load {
		f.load, f.subject, f.sorted = w, xds.ProxyOf(w, f.peer.TrustDomain), nil
	}
	frame, ok := p.frame(f)
	if !ok {
		return false
	}
	return f.put(frame)
}

// frame makes or finds what a proxy is told now.
func (p *Pipeline) frame(f *feed) (Frame, bool) {
	proxy, at := f.subject, f.subject.Scope()
	s := p.scopes[at]
	if s == nil {
		s = &scope{damper: &federation.Damper{}, generators: map[federation.ProxyRole]Generator{}}
		p.scopes[at] = s
	}
	s.used = true
	if s.made != p.snapshot {
		s.prior, s.view, s.made = s.view, p.snapshot.ViewFrom(s.view, at), p.snapshot
	}
	g := s.generators[proxy.Role]
	if g == nil {
		factory := p.config.Generators[proxy.Role]
		if factory == nil {
			return Frame{}, false
		}
		g = factory(Restraint{
			Weigh: func(key federation.WeightKey, ready uint32) uint32 {
				return s.damper.Weight(p.config.Now(), key, ready)
			},
			Closed: func(key federation.WeightKey) bool { return p.closed(s, key) },
		})
		s.generators[proxy.Role] = g
	}
	if census := g.Census(s.view, p.index); f.sorted != g || f.census != census {
		f.kind, f.sorted, f.census = g.Class(s.view, p.index, proxy), g, census
		f.class = f.kind.String()
	}
	kind := f.kind
	c := p.classes[kind]
	if c == nil {
		c = &class{}
		p.classes[kind] = c
	}
	c.used = true
	if c.view != s.view || c.index != p.index {
		resources, findings := g.BuildClass(s.view, p.index, kind)
		c.view, c.index, c.findings = s.view, p.index, findings
		c.resources = keepLists(c.resources, resources)
		p.metrics.builds.Inc()
	}
	return Frame{Proxy: proxy, Class: f.class, Revision: p.snapshot.Revision, Resources: c.resources}, true
}

// keepLists shares every list that has not changed with what was there before, so that
// equality can be seen without comparing; if none has, it is the very same map.
func keepLists(old, fresh xds.Resources) xds.Resources {
	same := len(old) == len(fresh)
	for typeURL, list := range fresh {
		if equalLists(old[typeURL], list) {
			fresh[typeURL] = old[typeURL]
		} else {
			same = false
		}
	}
	if same && old != nil {
		return old
	}
	return fresh
}

func equalLists(a, b []xds.Resource) bool {
	if len(a) != len(b) || a == nil != (b == nil) {
		return false
	}
	if sameList(a, b) {
		return true
	}
	for i := range a {
		if a[i].Name != b[i].Name || a[i].Version != b[i].Version {
			return false
		}
	}
	return true
}

// sweep drops what no feed uses.
func (p *Pipeline) sweep() {
	maps.DeleteFunc(p.scopes, func(_ federation.Scope, s *scope) bool { return !s.used })
	maps.DeleteFunc(p.classes, func(_ xds.Class, c *class) bool { return !c.used })
	for _, s := range p.scopes {
		s.prior = nil
	}
	p.absent = nil
}

// Attach implements Source.
func (p *Pipeline) Attach(ctx context.Context, peer Peer) (Feed, error) {
	for {
		f, wait, err := p.attach(peer)
		if f != nil || err != nil {
			return f, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, p.tooLate(peer)
		}
	}
}

func (p *Pipeline) tooLate(peer Peer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.snapshot == nil {
		return status.Error(codes.Unavailable, "this replica has not read its store yet; try again")
	}
	return status.Errorf(codes.Unavailable, "workload %s of %s is not known yet; try again", peer.Workload.UID, peer.Workload.Source)
}

// attach is one try. Without a feed and an error, the channel says when to try again.
func (p *Pipeline) attach(peer Peer) (*feed, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.snapshot == nil {
		return nil, p.computed, nil
	}
	w := p.snapshot.Workloads[peer.Workload]
	switch {
	case w == nil && !p.gone[peer.Workload].IsZero():
		return nil, nil, status.Errorf(codes.PermissionDenied, "workload %s of %s has been deleted", peer.Workload.UID, peer.Workload.Source)
	case w == nil:
		return nil, p.computed, nil
	case w.Namespace != peer.Namespace || w.ServiceAccount != peer.ServiceAccount:
		return nil, nil, status.Errorf(codes.PermissionDenied, "workload %s is %s/%s with service account %q, not %s with %q",
			peer.Workload.UID, w.Namespace, w.Name, w.ServiceAccount, peer.Namespace, peer.ServiceAccount)
	}
	f := &feed{pipeline: p, key: peer.Workload, peer: peer, load: w, subject: xds.ProxyOf(w, peer.TrustDomain), changed: make(chan struct{}, 1)}
	frame, ok := p.frame(f)
	if !ok {
		return nil, nil, status.Errorf(codes.FailedPrecondition, "proxies of role %q are not served here", w.Role)
	}
	f.put(frame)
	p.feeds[f] = struct{}{}
	return f, nil, nil
}

// Findings are what views, configuration and translation have to say, for the classes
// that are connected; of proxies that are not, nothing is known.
func (p *Pipeline) Findings() []federation.Finding {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[federation.Finding]bool{}
	var out []federation.Finding
	add := func(list []federation.Finding) {
		for _, f := range list {
			if !seen[f] {
				seen[f] = true
				out = append(out, f)
			}
		}
	}
	for _, s := range p.scopes {
		if s.view != nil {
			add(s.view.Findings)
		}
	}
	for _, c := range p.classes {
		add(c.findings)
	}
	return out
}

// Held is how many scopes have weights, and how many doors callers or gateways, that are
// not told yet although they are known: while it is not zero, more will be sent without
// another snapshot.
func (p *Pipeline) Held() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.doors.held()
	for _, s := range p.scopes {
		if _, ok := s.damper.Next(); ok {
			n++
		}
	}
	return n
}

// Synced tells whether a first snapshot has been computed.
func (p *Pipeline) Synced() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.snapshot != nil
}

// feed implements Feed.
type feed struct {
	pipeline *Pipeline
	key      federation.WorkloadKey
	peer     Peer
	changed  chan struct{}

	// Under the pipeline's lock: who is told, and of which class it is, according to which
	// generator at which census.
	load    *federation.Workload
	subject xds.Proxy
	kind    xds.Class
	class   string
	sorted  Generator
	census  uint64

	acked atomic.Uint64 // the newest frame of which all was acknowledged
	runs  atomic.Bool   // there has been one
	tardy atomic.Bool   // was waited for in vain, and has not been heard of since

	mu  sync.Mutex
	now Frame

	// Of gateways, before is what was told before the last computation, and synced tells
	// that all of it had been acknowledged.
	before xds.Resources
	synced bool
}

func (f *feed) isGateway() bool { return f.subject.Role == federation.GatewayRole }

// put sets the frame and wakes the reader if its resources are others.
func (f *feed) put(frame Frame) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.isGateway() {
		f.before, f.synced = f.now.Resources, f.acked.Load() == f.now.sequence
	}
	frame.sequence = f.now.sequence
	changed := !sameResources(f.now.Resources, frame.Resources)
	if changed {
		frame.sequence++
	}
	f.now = frame
	if changed {
		poke(f.changed)
	}
	return changed
}

// current tells whether all that there is to be told has been acknowledged.
func (f *feed) current() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.acked.Load() == f.now.sequence
}

// hadAll tells whether an assignment was acknowledged before the last computation, and is
// still the same.
func (f *feed) hadAll(name, version string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.before.Get(xds.EndpointType, name)
	return ok && f.synced && r.Version == version
}

// Heard implements Feed.
func (f *feed) Heard(frame Frame, holds Holdings) {
	if holds.Settled() {
		f.acked.Store(frame.sequence)
		f.runs.Store(true)
		f.tardy.Store(false)
	}
	f.pipeline.doors.heard(f, holds)
}

// sameResources compares by identity of the lists.
func sameResources(a, b xds.Resources) bool {
	if len(a) != len(b) {
		return false
	}
	for typeURL, list := range b {
		if !sameList(a[typeURL], list) {
			return false
		}
	}
	return true
}

// Current implements Feed.
func (f *feed) Current() Frame { return f.told() }

func (f *feed) told() Frame {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

// Changed implements Feed.
func (f *feed) Changed() <-chan struct{} { return f.changed }

// Close implements Feed.
func (f *feed) Close() {
	f.pipeline.mu.Lock()
	defer f.pipeline.mu.Unlock()
	delete(f.pipeline.feeds, f)
	f.pipeline.doors.leave(f)
}

type pipelineMetrics struct {
	builds   prometheus.Counter
	duration prometheus.Histogram
	woken    prometheus.Counter
	waits    prometheus.Histogram
	overdue  prometheus.Counter
	classes  *prometheus.Desc
}

func newPipelineMetrics() *pipelineMetrics {
	name := func(s string) prometheus.Opts {
		return prometheus.Opts{Namespace: "isthmus", Subsystem: "xds", Name: s}
	}
	builds, woken, overdue := name("class_builds_total"), name("streams_woken_total"), name("doors_overdue_total")
	builds.Help, woken.Help = "Computations of a proxy class.", "Streams that were woken because their resources changed."
	overdue.Help = "Services that callers or gateways were told of before the other side had acknowledged, because it did not within 2 s."
	return &pipelineMetrics{
		overdue: prometheus.NewCounter(prometheus.CounterOpts(overdue)),
		waits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "door_wait_seconds",
			Help:    "How long callers were not told of a service's first endpoints in a network, until its gateways had acknowledged them.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2},
		}),
		builds: prometheus.NewCounter(prometheus.CounterOpts(builds)),
		woken:  prometheus.NewCounter(prometheus.CounterOpts(woken)),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "computation_seconds",
			Help:    "From a snapshot to the resources of all connected classes.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5},
		}),
		classes: prometheus.NewDesc("isthmus_xds_proxy_classes", "Proxy classes that are connected.", nil, nil),
	}
}

func (m *pipelineMetrics) computed(took time.Duration, woken int) {
	m.duration.Observe(took.Seconds())
	m.woken.Add(float64(woken))
}

func (m *pipelineMetrics) waited(waits []time.Duration, overdue int) {
	for _, w := range waits {
		m.waits.Observe(w.Seconds())
	}
	m.overdue.Add(float64(overdue))
}

// Describe implements prometheus.Collector.
func (p *Pipeline) Describe(ch chan<- *prometheus.Desc) {
	p.metrics.waits.Describe(ch)
	p.metrics.overdue.Describe(ch)
	p.metrics.builds.Describe(ch)
	p.metrics.woken.Describe(ch)
	p.metrics.duration.Describe(ch)
	ch <- p.metrics.classes
}

// Collect implements prometheus.Collector.
func (p *Pipeline) Collect(ch chan<- prometheus.Metric) {
	p.metrics.waits.Collect(ch)
	p.metrics.overdue.Collect(ch)
	p.metrics.builds.Collect(ch)
	p.metrics.woken.Collect(ch)
	p.metrics.duration.Collect(ch)
	p.mu.Lock()
	n := len(p.classes)
	p.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(p.metrics.classes, prometheus.GaugeValue, float64(n))
}
