// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Limits of a Gate. Zero means the default that stands beside each.
type Limits struct {
	Connections int           // at once: 20000
	Strangers   int           // of these, whose handshake is not done: 4000
	Handshakes  int           // that begin at once, and as many that end: half of the processors, at least 1
	Share       float64       // of the processors that may be busy while more streams are let in: 0.8
	Wait        time.Duration // of a connection, and again of a stream, before it is refused: 10 s
	Names       int           // of one type that a stream may ask for or say to have: 100000
	Types       int           // that one stream may ask for: 64
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	set(&l.Connections, 20000)
	set(&l.Strangers, 4000)
	set(&l.Handshakes, max(1, runtime.GOMAXPROCS(0)/2))
	set(&l.Names, 100000)
	set(&l.Types, 64)
	if l.Share == 0 {
		l.Share = 0.8
	}
	if l.Wait == 0 {
		l.Wait = 10 * time.Second
	}
	return l
}

// Gate lets proxies in, so that a storm of them (a cold start, a replica that went away)
// costs those that are there little, and ends as soon as the processors allow. It has two
// queues, since nobody's importance is known before the handshake.
//
// Handshakes wait in the order in which they came, for one of a few processors; a peer
// that is slow holds none. First requests of streams wait for processor time: while the
// process uses less than its share they are let in at once, otherwise at the rate at which
// they can be answered: gateways first, then proxies that say to have something already,
// which cost least, then the others. Who waits too long is refused, and may find another
// replica idle.
type Gate struct {
	limits  Limits
	budget  budget
	metrics *gateMetrics

	beginning, ending chan struct{} // a place for each handshake that computes its first answer, and what comes after

	mu          sync.Mutex
	connections int
	strangers   int
	queues      [ranks][]chan struct{} // closed when it is their turn
	looking     bool                   // a timer runs that looks again
}

// rank is how early a stream's first request is answered.
type rank int

const (
	rankGateway rank = iota
	rankReturning
	rankNew
	ranks
)

var rankNames = [ranks]string{"gateway", "returning", "new"}

// How the gate works.
const (
	// lookAgain is how often the gate looks whether there is processor time, while
	// somebody waits.
	lookAgain = 5 * time.Millisecond

	// arriving is how long a stream that was let in is counted with those that are being
	// brought up, if it does not say that it has all: it may be a slow one.
	arriving = 2 * time.Second
)

// NewGate makes a gate, for one process: it measures the processor time of all of it.
func NewGate(l Limits) *Gate {
	l = l.withDefaults()
	return newGate(l, budget{rate: l.Share * float64(runtime.GOMAXPROCS(0)), now: time.Now, used: processorTime})
}

func newGate(l Limits, b budget) *Gate {
	return &Gate{limits: l, budget: b, metrics: newGateMetrics(), beginning: make(chan struct{}, l.Handshakes), ending: make(chan struct{}, l.Handshakes)}
}

// enter waits until a stream may be served. The returned function is to be called when it
// has all that it asked for, and when it ends; twice does no harm.
func (g *Gate) enter(ctx context.Context, r rank) (func(), error) {
	g.mu.Lock()
	turn := make(chan struct{})
	g.queues[r] = append(g.queues[r], turn)
	g.next()
	g.mu.Unlock()
	start := g.budget.now()
	timer := time.NewTimer(g.limits.Wait)
	defer timer.Stop()
	select {
	case <-turn:
	case <-timer.C:
	case <-ctx.Done():
	}
	if !g.has(turn, r) {
		g.metrics.refused.WithLabelValues("stream").Inc()
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		return nil, status.Errorf(codes.ResourceExhausted, "this replica is bringing up others, and had no time within %v; try again", g.limits.Wait)
	}
	g.metrics.waited.WithLabelValues(rankNames[r]).Observe(g.budget.now().Sub(start).Seconds())
	var once sync.Once
	leave := func() { once.Do(g.leave) }
	slow := time.AfterFunc(arriving, leave)
	return func() { slow.Stop(); leave() }, nil
}

// has tells whether it was a stream's turn, and takes it out of its queue if not.
func (g *Gate) has(turn chan struct{}, r rank) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.queues[r], turn)
	if i < 0 {
		return true
	}
	g.queues[r] = slices.Delete(g.queues[r], i, i+1)
	return false
}

func (g *Gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.budget.arrived++
	g.budget.arriving--
	g.next()
}

// next lets in whoever there is processor time for. It is called under mu.
func (g *Gate) next() {
	g.budget.measure()
	for r := range g.queues {
		for len(g.queues[r]) > 0 && g.budget.allows() {
			close(g.queues[r][0])
			g.queues[r] = g.queues[r][1:]
			g.budget.arriving++
		}
		if len(g.queues[r]) > 0 {
			g.look()
			return
		}
	}
}

// look makes the gate look again in a moment. It is called under mu.
func (g *Gate) look() {
	if g.looking {
		return
	}
	g.looking = true
	time.AfterFunc(lookAgain, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.looking = false
		g.next()
	})
}

// enter waits at the server's gate, if it has one.
func (s *Server) enter(ctx context.Context, peer Peer, first request) (leave func(), err error) {
	if s.config.Gate == nil {
		return func() {}, nil
	}
	var role federation.ProxyRole
	if source, ok := s.config.Source.(interface {
		Role(federation.WorkloadKey) federation.ProxyRole
	}); ok {
		role = source.Role(peer.Workload)
	}
	return s.config.Gate.enter(ctx, rankOf(role, first))
}

// bring tells the gate once that the proxy has all that it asked for. The stream's lock is
// held.
func (st *stream) bring() {
	if st.arrived != nil && st.machine.Settled() {
		st.arrived()
		st.arrived = nil
	}
}

// Role is what the store says that a workload's proxy is; empty if it knows none.
func (p *Pipeline) Role(key federation.WorkloadKey) federation.ProxyRole {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.snapshot == nil || p.snapshot.Workloads[key] == nil {
		return ""
	}
	return p.snapshot.Workloads[key].Role
}

// bound ends a stream that asks for more than is kept in mind for anybody.
func (l Limits) bound(m *machine, r request) error {
	known := m.subs[r.typeURL]
	if known == nil && len(m.subs) >= l.Types {
		return status.Errorf(codes.ResourceExhausted, "a stream asks for more than %d types", l.Types)
	}
	n := len(r.names) + len(r.subscribe) + len(r.unsubscribe) + len(r.initial)
	if known != nil && !m.sotw {
		n += len(known.names.common) + len(known.names.except)
	}
	if n > l.Names {
		return status.Errorf(codes.ResourceExhausted, "a stream asks for %d names of %s; want at most %d", n, kind(r.typeURL), l.Names)
	}
	return nil
}

// rankOf is the place of a stream, by the role of its workload and its first request.
func rankOf(role federation.ProxyRole, first request) rank {
	switch {
	case role == federation.GatewayRole:
		return rankGateway
	case len(first.initial) > 0 || first.version != "":
		return rankReturning
	}
	return rankNew
}

// budget is processor time that may be spent. It grows as time goes on, and shrinks as the
// process uses its processors, for whatever purpose. It is not safe for concurrent use.
type budget struct {
	rate float64 // processors
	now  func() time.Time
	used func() time.Duration // processor time of the process so far

	at       time.Time     // of the last look
	then     time.Duration // used at that time
	left     time.Duration
	cost     time.Duration // of one stream, estimated
	arriving int           // streams that were let in and are still to be paid for
	arrived  int           // since the last look
}

const (
	savings     = 500 * time.Millisecond // that a processor may save up for a storm
	firstCost   = 5 * time.Millisecond   // of a stream, before it is known
	leastCost   = 500 * time.Microsecond
	shortLook   = time.Millisecond // looks closer together see nothing: processor time is counted in ticks
	weightOfNew = 0.1              // of a measurement in the estimated cost
)

// measure brings the budget up to now.
func (b *budget) measure() {
	now := b.now()
	most := time.Duration(b.rate * float64(savings))
	if b.at.IsZero() {
		b.at, b.then, b.left, b.cost = now, b.used(), most, firstCost
		return
	}
	passed := now.Sub(b.at)
	if passed < shortLook {
		return
	}
	used := b.used()
	spent := used - b.then
	b.left = max(-most, min(most, b.left+time.Duration(b.rate*float64(passed))-spent))
	if b.arrived > 0 {
		one := max(leastCost, spent/time.Duration(b.arrived))
		b.cost += time.Duration(weightOfNew * float64(min(one, 10*firstCost)-b.cost))
	}
	b.at, b.then, b.arrived = now, used, 0
}

// allows tells whether another stream can be paid for. One at a time always can: others may
// keep the process busy for good.
func (b *budget) allows() bool {
	return b.arriving == 0 || b.left > time.Duration(b.arriving)*b.cost
}

type gateMetrics struct {
	waited  *prometheus.HistogramVec
	refused *prometheus.CounterVec
	queued  *prometheus.Desc
	open    *prometheus.Desc
}

func newGateMetrics() *gateMetrics {
	return &gateMetrics{
		waited: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "admission_wait_seconds",
			Help:    "How long handshakes waited for a processor, and first requests for processor time, by rank.",
			Buckets: []float64{.001, .01, .1, .5, 1, 2, 5, 10},
		}, []string{"rank"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "admissions_refused_total",
			Help: "Connections and streams that were turned away because there were too many, or because they waited too long.",
		}, []string{"what"}),
		queued: prometheus.NewDesc("isthmus_xds_admission_queue", "Streams that wait to be let in.", []string{"rank"}, nil),
		open:   prometheus.NewDesc("isthmus_xds_connections", "Connections on the port for proxies; strangers have not shaken hands yet.", []string{"state"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (g *Gate) Describe(ch chan<- *prometheus.Desc) {
	g.metrics.waited.Describe(ch)
	g.metrics.refused.Describe(ch)
	ch <- g.metrics.queued
	ch <- g.metrics.open
}

// Collect implements prometheus.Collector.
func (g *Gate) Collect(ch chan<- prometheus.Metric) {
	g.metrics.waited.Collect(ch)
	g.metrics.refused.Collect(ch)
	g.mu.Lock()
	defer g.mu.Unlock()
	for r, queue := range g.queues {
		ch <- prometheus.MustNewConstMetric(g.metrics.queued, prometheus.GaugeValue, float64(len(queue)), rankNames[r])
	}
	ch <- prometheus.MustNewConstMetric(g.metrics.open, prometheus.GaugeValue, float64(g.connections-g.strangers), "known")
	ch <- prometheus.MustNewConstMetric(g.metrics.open, prometheus.GaugeValue, float64(g.strangers), "stranger")
}
