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
	// Moved are the workloads of which Class may say something else than when Moved was
	// asked last; all tells that they may be any. It is asked with every view.
	Moved(view *federation.View, index *config.Index) (some []federation.WorkloadKey, all bool)
	// BuildClass makes everything the proxies of a class are told. It is asked again
	// whenever services, roads or configuration have changed, or some were forgotten.
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

	revision atomic.Int64 // of the last snapshot that was computed

	mu       sync.Mutex
	pending  *federation.Snapshot // given, not yet computed
	snapshot *federation.Snapshot
	index    *config.Index
	scopes   map[federation.Scope]*scope
	feeds    map[federation.WorkloadKey]map[*feed]struct{}
	sequence uint64                               // of the last state of a class
	gone     map[federation.WorkloadKey]time.Time // workloads that were there once
	tidied   time.Time                            // when those of gone that are long gone were dropped
	absent   map[federation.Network]bool          // see elsewhere
	computed chan struct{}                        // closed after each computation
}

// scope is what the feeds of one scope share.
type scope struct {
	view   *federation.View
	prior  *federation.View     // the one before, during a computation that made another
	made   *federation.Snapshot // what view was made of
	damper *federation.Damper
	roles  map[federation.ProxyRole]*role
}

// role is what the feeds of one role in a scope share.
type role struct {
	generator Generator
	view      *federation.View // what the classes were made for
	index     *config.Index
	stale     bool // something is to be made again although nothing has changed
	classes   map[xds.Class]*class
}

// class is what its feeds are told: those that are not told anything else are not touched
// by a change.
type class struct {
	kind     xds.Class
	name     string
	feeds    map[*feed]struct{}
	findings []federation.Finding
	state    atomic.Pointer[state]
}

// state is what a class is told from one change to the next. It is immutable.
type state struct {
	resources xds.Resources
	sequence  uint64 // no other state of the pipeline has it
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
		scopes: map[federation.Scope]*scope{}, feeds: map[federation.WorkloadKey]map[*feed]struct{}{},
		gone:     map[federation.WorkloadKey]time.Time{},
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
	wakeAll(p.renew())
}

// renew works out what has changed for whom, and returns those who are to be woken.
func (p *Pipeline) renew() []*feed {
	p.mu.Lock()
	defer p.mu.Unlock()
	given := p.pending
	if given == nil {
		return nil
	}
	start := p.config.Now()
	moved := p.adopt(given)
	p.letGo(start)
	// Gateways first: what they do not know yet is not told to callers.
	gateways := p.renewAll(true, moved)
	closed := p.turnDoors()
	wakeAll(gateways)
	woken := p.renewAll(false, moved)
	p.revision.Store(int64(p.snapshot.Revision))
	p.keepDoors(closed)
	p.sweep()
	close(p.computed)
	p.computed = make(chan struct{})
	p.metrics.computed(p.config.Now().Sub(start), len(gateways)+len(woken))
	p.metrics.waited(p.doors.tally())
	return woken
}

// renewAll recomputes what gateways are told, or what all others are, and returns those
// for whom it has changed. moved are the workloads whose record has.
func (p *Pipeline) renewAll(gateways bool, moved []federation.WorkloadKey) (woken []*feed) {
	for at, s := range p.scopes {
		for kind, r := range s.roles {
			if gateways == (kind == federation.GatewayRole) {
				woken = p.renewRole(at, s, r, woken)
			}
		}
	}
	for _, key := range moved {
		for f := range p.feeds[key] {
			w := p.snapshot.Workloads[key]
			if w == nil || w == f.load || gateways != (w.Role == federation.GatewayRole) {
				continue // who is gone keeps what he has
			}
			f.know(w)
			if p.place(f) {
				woken = append(woken, f)
			}
		}
	}
	return woken
}

// renewRole recomputes the classes of one role in one scope, if anything has changed
// there, and adds those that are to be woken.
func (p *Pipeline) renewRole(at federation.Scope, s *scope, r *role, woken []*feed) []*feed {
	p.look(at, s)
	some, all := r.generator.Moved(s.view, p.index)
	if r.stale || r.index != p.index || !s.view.SameRoads(r.view) || len(s.view.Changed(r.view)) > 0 {
		for kind, c := range r.classes {
			if len(c.feeds) == 0 {
				delete(r.classes, kind)
			} else if p.make(s, r, c) {
				woken = slices.AppendSeq(woken, maps.Keys(c.feeds))
			}
		}
	}
	r.view, r.index, r.stale = s.view, p.index, false
	if all {
		some = nil
		for _, c := range r.classes {
			for f := range c.feeds {
				some = append(some, f.key)
			}
		}
	}
	for _, key := range some {
		for f := range p.feeds[key] {
			if c := f.class.Load(); r.classes[c.kind] == c && p.place(f) {
				woken = append(woken, f)
			}
		}
	}
	return woken
}

// look brings a scope's view up to the newest snapshot.
func (p *Pipeline) look(at federation.Scope, s *scope) {
	if s.made != p.snapshot {
		s.prior, s.view, s.made = s.view, p.snapshot.ViewFrom(s.view, at), p.snapshot
	}
}

// make computes what a class is told, and tells whether that has changed.
func (p *Pipeline) make(s *scope, r *role, c *class) bool {
	for f := range c.feeds {
		if !f.isGateway() {
			break // all or none
		}
		f.remember()
	}
	resources, findings := r.generator.BuildClass(s.view, p.index, c.kind)
	p.metrics.builds.Inc()
	c.findings = findings
	was := c.state.Load()
	if was != nil {
		if resources = keepLists(was.resources, resources); sameResources(was.resources, resources) {
			return false
		}
	}
	p.sequence++
	c.state.Store(&state{resources, p.sequence})
	return true
}

// place finds the class of a feed, and tells whether it is told something else there.
func (p *Pipeline) place(f *feed) bool {
	was, is := f.class.Load(), p.classOf(f.subject)
	if was == is || is == nil {
		return false
	}
	if was != nil {
		delete(was.feeds, f)
	}
	is.feeds[f] = struct{}{}
	f.class.Store(is)
	return true
}

// classOf finds or makes the class of a proxy; nil if its role is not served.
func (p *Pipeline) classOf(proxy xds.Proxy) *class {
	at := proxy.Scope()
	s := p.scopes[at]
	if s == nil {
		s = &scope{damper: &federation.Damper{}, roles: map[federation.ProxyRole]*role{}}
		p.scopes[at] = s
	}
	p.look(at, s)
	r := s.roles[proxy.Role]
	if r == nil {
		factory := p.config.Generators[proxy.Role]
		if factory == nil {
			return nil
		}
		r = &role{view: s.view, index: p.index, classes: map[xds.Class]*class{}, generator: factory(Restraint{
			Weigh: func(key federation.WeightKey, ready uint32) uint32 {
				return s.damper.Weight(p.config.Now(), key, ready)
			},
			Closed: func(key federation.WeightKey) bool { return p.closed(s, key) },
		})}
		r.generator.Moved(s.view, p.index) // from now on
		s.roles[proxy.Role] = r
	}
	kind := r.generator.Class(s.view, p.index, proxy)
	c := r.classes[kind]
	if c == nil {
		c = &class{kind: kind, name: kind.String(), feeds: map[*feed]struct{}{}}
		p.make(s, r, c)
		r.classes[kind] = c
	}
	return c
}

// turnDoors lets callers wait for the gateways at doors that have opened, and tells which
// have closed.
func (p *Pipeline) turnDoors() (closed []door) {
	for at, s := range p.scopes {
		r := s.roles[federation.GatewayRole]
		if r == nil {
			continue
		}
		keeper, ok := r.generator.(Gatekeeper)
		gateways := r.all()
		if !ok || len(gateways) == 0 {
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

// all are the feeds of a role.
func (r *role) all() []*feed {
	var out []*feed
	for _, c := range r.classes {
		out = slices.AppendSeq(out, maps.Keys(c.feeds))
	}
	return out
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
		f.wake() // it may have acknowledged already what it has
	}
}

// keepDoors lets gateways keep closed doors until the callers know.
func (p *Pipeline) keepDoors(closed []door) {
	if len(closed) == 0 {
		return
	}
	var callers []*feed
	for _, s := range p.scopes {
		for kind, r := range s.roles {
			if kind == federation.GatewayRole {
				continue
			}
			for _, f := range r.all() {
				if !f.tardy.Load() {
					callers = append(callers, f)
				}
			}
		}
	}
	p.doors.close(closed, callers)
}

// elsewhere tells whether a network has a ready gateway that is not connected here. It is
// worked out at most once in a computation.
func (p *Pipeline) elsewhere(network federation.Network) bool {
	if p.absent == nil {
		p.absent = map[federation.Network]bool{}
		for key, w := range p.snapshot.Workloads {
			if w.Role == federation.GatewayRole && w.Ready && len(p.feeds[key]) == 0 {
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

// adopt takes a snapshot, notes which workloads are gone since the last one, and returns
// those whose record has changed.
func (p *Pipeline) adopt(given *federation.Snapshot) (moved []federation.WorkloadKey) {
	s := given
	if p.config.Prepare != nil {
		s = p.config.Prepare(given)
	}
	now := p.config.Now()
	if p.snapshot != nil {
		moved = s.ChangedWorkloads(p.snapshot)
	}
	for _, key := range moved {
		if _, there := s.Workloads[key]; there {
			delete(p.gone, key)
		} else {
			p.gone[key] = now
		}
	}
	if now.Sub(p.tidied) > remembered/60 {
		p.tidied = now
		maps.DeleteFunc(p.gone, func(_ federation.WorkloadKey, at time.Time) bool { return now.Sub(at) > remembered })
	}
	if p.snapshot != s {
		p.index = config.NewFrom(p.index, s)
	}
	p.snapshot = s
	return moved
}

// letGo makes the services be made again that were held back long enough.
func (p *Pipeline) letGo(now time.Time) {
	opened, dropped := p.doors.settle()
	for _, at := range dropped {
		if s := p.scopes[federation.Scope{Network: at.network, Gateway: true}]; s != nil && s.roles[federation.GatewayRole] != nil {
			r := s.roles[federation.GatewayRole]
			if keeper, ok := r.generator.(Gatekeeper); ok {
				keeper.Close(at.sni)
				r.stale = true
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
		for _, r := range s.roles {
			r.generator.Forget(names...)
			r.stale = true // the same services, another split
		}
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

// keepLists shares every list that has not changed with what was there before, so that
// equality can be seen without comparing; if none has, it is the very same map.
func keepLists(old, fresh xds.Resources) xds.Resources {
	if sameMap(old, fresh) {
		return old
	}
	same, again := len(old) == len(fresh), xds.Resources{}
	for typeURL, list := range fresh {
		if !equalLists(old[typeURL], list) {
			same = false
		} else if !sameList(old[typeURL], list) {
			again[typeURL] = old[typeURL]
		}
	}
	if same && old != nil {
		return old
	}
	if len(again) > 0 {
		fresh = maps.Clone(fresh) // it is not ours
		maps.Copy(fresh, again)
	}
	return fresh
}

// sameMap compares by identity: who makes resources does not change them.
func sameMap(a, b xds.Resources) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
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
	for at, s := range p.scopes {
		s.prior = nil
		for kind, r := range s.roles {
			maps.DeleteFunc(r.classes, func(_ xds.Class, c *class) bool { return len(c.feeds) == 0 })
			if len(r.classes) == 0 {
				delete(s.roles, kind)
			}
		}
		if len(s.roles) == 0 {
			delete(p.scopes, at)
		}
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
	f := &feed{pipeline: p, key: peer.Workload, peer: peer, changed: make(chan struct{}, 1)}
	f.know(w)
	if !p.place(f) {
		return nil, nil, status.Errorf(codes.FailedPrecondition, "proxies of role %q are not served here", w.Role)
	}
	if p.feeds[f.key] == nil {
		p.feeds[f.key] = map[*feed]struct{}{}
	}
	p.feeds[f.key][f] = struct{}{}
	poke(f.changed)
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
	for _, s := range p.scopes {
		for _, r := range s.roles {
			for _, c := range r.classes {
				add(c.findings)
			}
		}
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
