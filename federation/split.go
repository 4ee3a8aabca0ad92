// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"math"
	"slices"
	"strings"
)

// How traffic is split.
//
// Every endpoint of the scope's own network is a hop of its own. Every other network is
// its gateways, which together weigh exactly the number of ready endpoints behind them;
// where that number does not divide, all weights of the service's port are multiplied by
// the same factor, so that their proportions stay exact.
//
// Groups are ordered by priority: own cluster (for VMs: own network), own region, the
// rest, and then the same again for sources whose word is stale. A network behind
// gateways has one place in this order, where the middle one of its endpoints stands; an
// endpoint of the own network without a known region counts as near.
//
// Traffic leaves a priority as its health falls. Envoy computes that health itself, as
// the share of healthy hosts among all hosts of the priority, times its overprovisioning
// factor of 1.4, at most 100 %. It can only do so if it sees the hosts that are not
// healthy. So direct endpoints that are not ready remain in their group, as hops with
// Health NotReady, which xds renders as UNHEALTHY. With one of three local endpoints
// unready, 2/3 × 140 % = 93 % of the requests stay and 7 % go to the next priority; from
// three of ten on (7/10 × 140 % = 98 %) requests begin to leave; with none ready all do.
// Load states these numbers. Where there is only one priority nothing can spill, and
// endpoints that are not ready are left out. Whoever renders groups must set Envoy's
// panic threshold to zero, or unready endpoints would get traffic. Groups of the same
// priority and locality are possible, and one locality for Envoy.
//
// Endpoints that terminate but still serve are called only when the whole mesh has no
// ready one of that port and subset (as kube-proxy does).

// Query asks for the hops to a service's port.
type Query struct {
	Service *Service
	Port    uint32

	// Match selects endpoints by label; nil takes all. Subset only names the selection
	// to Weigh.
	Match  func(labels map[string]string) bool
	Subset string

	// Pod limits the answer to one named pod of the service: itself, or the gateways of its
	// network.
	Pod *NamedPod

	// Region of the caller; empty means the view's.
	Region string

	// Weigh may hold back changes of remote weights (see Damper); nil means exact.
	Weigh func(key WeightKey, ready uint32) uint32

	// Closed names what the gateways of a network do not lead to yet: it is left out as if
	// it were not there; nil means nothing. It is asked of every network once.
	Closed func(key WeightKey) bool
}

// key of one network's weight.
func (q *Query) key(scope Scope, network Network, stale bool) WeightKey {
	key := WeightKey{Scope: scope, Service: q.Service.Name, Port: q.Port, Subset: q.Subset, Network: network, Stale: stale}
	if q.Pod != nil {
		key.Pod = q.Pod.SNIHost
	}
	return key
}

// WeightKey is what one remote weight belongs to.
type WeightKey struct {
	Scope   Scope
	Service ServiceName
	Port    uint32
	Subset  string
	Pod     string // SNIHost of a named pod; empty for the service's own weights
	Network Network
	Stale   bool // of the sources that have fallen silent
}

// SNI is what callers say to the network's gateways, in lower case, as these compare it.
func (k WeightKey) SNI() string {
	host := k.Pod
	if host == "" {
		host = k.Service.Host()
	}
	return strings.ToLower(SNI(k.Port, k.Subset, host))
}

// Groups are the hops to a service's port, of the endpoints that match (nil: all), by
// priority. It is empty if the scope can reach none.
func (v *View) Groups(s *Service, port uint32, match func(labels map[string]string) bool) []Group {
	return v.Split(Query{Service: s, Port: port, Match: match})
}

// Split answers a query.
func (v *View) Split(q Query) []Group {
	if q.Region == "" {
		q.Region = v.Region
	}
	chosen := v.choose(q)
	if len(chosen) == 0 {
		return nil
	}
	p := &partition{view: v, query: q, serving: serving(chosen)}
	for _, e := range chosen {
		p.place(e)
	}
	return p.groups()
}

// choose are the endpoints of the query that can be called from here.
func (v *View) choose(q Query) []*ServiceEndpoint {
	closed := v.closed(&q)
	if q.Pod != nil {
		e := &q.Pod.Endpoint
		if !v.reaches(e, q.Port) || closed(e) {
			return nil
		}
		return []*ServiceEndpoint{e}
	}
	list := q.Service.Endpoints
	out := make([]*ServiceEndpoint, 0, len(list))
	for i := range list {
		e := &list[i]
		if !v.reaches(e, q.Port) || closed(e) {
			continue
		}
		if q.Match != nil && !q.Match(e.Labels) {
			continue
		}
		out = append(out, e)
	}
	return withoutDrained(out)
}

// closed tells whether an endpoint is behind gateways that do not lead to it yet.
func (v *View) closed(q *Query) func(*ServiceEndpoint) bool {
	if q.Closed == nil {
		return func(*ServiceEndpoint) bool { return false }
	}
	known := map[Network]bool{}
	return func(e *ServiceEndpoint) bool {
		if e.Direct {
			return false
		}
		shut, asked := known[e.Network]
		if !asked {
			shut = q.Closed(q.key(v.Scope, e.Network, false))
			known[e.Network] = shut
		}
		return shut
	}
}

// reaches tells whether there is a road to the endpoint: its own network's, or a gateway,
// which passes mutual TLS only.
func (v *View) reaches(e *ServiceEndpoint, port uint32) bool {
	if _, ok := e.TargetPorts[port]; !ok {
		return false
	}
	if v.Scope.Gateway {
		return e.Direct && e.Mesh // what it passes is mutual TLS
	}
	return e.Direct || e.Mesh && len(v.Gateways[e.Network]) > 0
}

// withoutDrained leaves out the endpoints of drained sources, unless nobody else has any
// to call.
func withoutDrained(list []*ServiceEndpoint) []*ServiceEndpoint {
	kept := filter(list, func(e *ServiceEndpoint) bool { return e.Standing != Drained })
	if slices.ContainsFunc(kept, func(e *ServiceEndpoint) bool { return e.Health != NotReady }) {
		return kept
	}
	return list
}

// serving is the health that gets traffic: Ready, else Terminating.
func serving(list []*ServiceEndpoint) Health {
	if slices.ContainsFunc(list, func(e *ServiceEndpoint) bool { return e.Health == Ready }) {
		return Ready
	}
	return Terminating
}

// The order of priorities, before gaps are closed. Stale sources add staleRank.
const (
	rankOwn = iota
	rankRegion
	rankRest
	staleRank
)

// rank is the place of one endpoint in the order.
func (p *partition) rank(e *ServiceEndpoint) int {
	r := rankRest
	region := e.Locality.Region
	vm := p.view.Scope.Cluster == ""
	switch {
	case vm && e.Direct, !vm && e.Cluster == p.view.Scope.Cluster:
		r = rankOwn
	case region != "" && region == p.query.Region, region == "" && e.Direct:
		r = rankRegion
	}
	if e.Standing != Fresh {
		r += staleRank
	}
	return r
}

// partition sorts endpoints into groups.
type partition struct {
	view    *View
	query   Query
	serving Health

	direct []directGroup
	remote []remoteGroup
}

type directGroup struct {
	rank     int
	locality Locality
	ready    bool // has a hop that gets traffic
	hops     []Hop
}

// remoteGroup counts what is behind the gateways of one network. A network is counted
// once for fresh and once for stale sources.
type remoteGroup struct {
	network Network
	stale   bool
	ranks   [2 * staleRank]uint32
	total   uint32
	region  string // of all of them, if they agree
	mixed   bool
}

func (p *partition) place(e *ServiceEndpoint) {
	if e.Direct {
		p.placeDirect(e)
		return
	}
	rank := p.rank(e)
	stale := rank >= staleRank
	i := slices.IndexFunc(p.remote, func(g remoteGroup) bool { return g.network == e.Network && g.stale == stale })
	if i < 0 {
		i = len(p.remote)
		p.remote = append(p.remote, remoteGroup{network: e.Network, stale: stale, region: e.Locality.Region})
	}
	if e.Health != p.serving {
		return
	}
	g := &p.remote[i]
	g.ranks[rank]++
	g.total++
	g.mixed = g.mixed || g.region != e.Locality.Region
}

func (p *partition) placeDirect(e *ServiceEndpoint) {
	if len(e.Addresses) == 0 || e.Health == Terminating && p.serving == Ready {
		return // it is leaving, not failing: no reason to spill
	}
	hop := Hop{
		Host: e.Addresses[0].String(), Port: e.TargetPorts[p.query.Port], Weight: 1,
		Mesh: e.Mesh, Health: Ready, Workload: e.Workload, Hostname: e.Hostname,
		Labels: e.Labels, Cluster: e.Cluster, Account: e.ServiceAccount, Also: e.Addresses[1:],
	}
	if e.Health != p.serving {
		hop.Health = NotReady
	}
	rank := p.rank(e)
	i := slices.IndexFunc(p.direct, func(g directGroup) bool { return g.rank == rank && g.locality == e.Locality })
	if i < 0 {
		i = len(p.direct)
		p.direct = append(p.direct, directGroup{rank: rank, locality: e.Locality})
	}
	g := &p.direct[i]
	g.ready = g.ready || hop.Health == Ready
	g.hops = append(g.hops, hop)
}

// groups weighs and orders what was placed.
func (p *partition) groups() []Group {
	p.damp()
	ranks := p.ranks()
	if len(ranks) == 0 {
		return nil
	}
	f := p.factor()
	out := make([]Group, 0, len(p.direct)+len(p.remote))
	for _, g := range p.direct {
		priority := slices.Index(ranks, g.rank)
		if priority < 0 {
			continue
		}
		hops := g.hops
		if len(ranks) == 1 {
			hops = slices.DeleteFunc(hops, func(h Hop) bool { return h.Health != Ready })
		}
		if len(hops) == 0 {
			continue
		}
		for i := range hops {
			hops[i].Weight = f.direct()
		}
		slices.SortFunc(hops, compareHops)
		out = append(out, Group{Priority: uint32(priority), Locality: g.locality, Network: p.view.Scope.Network, Hops: hops})
	}
	for _, g := range p.remote {
		if g.total > 0 {
			out = append(out, Group{Priority: uint32(slices.Index(ranks, g.rank())), Locality: g.locality(), Network: g.network, Hops: f.through(p.view.Gateways[g.network], g.total)})
		}
	}
	slices.SortFunc(out, compareGroups)
	return out
}

// damp lets the query's Weigh have its say.
func (p *partition) damp() {
	if p.query.Weigh == nil {
		return
	}
	for i := range p.remote {
		g := &p.remote[i]
		if w := p.query.Weigh(p.query.key(p.view.Scope, g.network, g.stale), g.total); g.total > 0 {
			g.total = max(1, w)
		}
	}
}

// ranks are those in use, ordered: up to the last one with a hop that gets traffic. A
// rank before it counts even without one: its unready hops are what drives the spill.
func (p *partition) ranks() []int {
	last := -1
	var out []int
	for _, g := range p.direct {
		out = append(out, g.rank)
		if g.ready {
			last = max(last, g.rank)
		}
	}
	for _, g := range p.remote {
		if g.total > 0 {
			out = append(out, g.rank())
			last = max(last, g.rank())
		}
	}
	slices.Sort(out)
	return slices.Compact(slices.DeleteFunc(out, func(r int) bool { return r > last }))
}

// rank of a network is that of its middle endpoint.
func (g *remoteGroup) rank() int {
	var all, sum uint32
	for _, n := range g.ranks {
		all += n
	}
	for r, n := range g.ranks {
		if sum += n; 2*uint64(sum) >= uint64(all) && n > 0 {
			return r
		}
	}
	return rankRest
}

func (g *remoteGroup) locality() Locality {
	if g.mixed {
		return Locality{}
	}
	return Locality{Region: g.region}
}

func compareHops(a, b Hop) int {
	return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Workload, b.Workload))
}

func compareGroups(a, b Group) int {
	return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Network, b.Network),
		cmp.Compare(a.Locality.Region, b.Locality.Region), cmp.Compare(a.Locality.Zone, b.Locality.Zone),
		cmp.Compare(a.Locality.Subzone, b.Locality.Subzone))
}

// factor is what all weights of one answer are multiplied with.
type factor uint64

// factor is the smallest that makes every gateway's share a whole number: the least
// common multiple of gateways/gcd(gateways, endpoints) over the networks. If the weights
// would then no longer add up within 32 bits (Envoy's limit for a locality and for a
// cluster), it is 0, and shares are rounded up instead.
func (p *partition) factor() factor {
	f, total := uint64(1), uint64(0)
	for _, g := range p.direct {
		total += uint64(len(g.hops))
	}
	for _, g := range p.remote {
		n := uint64(len(p.view.Gateways[g.network]))
		step := n / gcd(n, uint64(g.total))
		if f = f / gcd(f, step) * step; f > math.MaxUint32 {
			return 0
		}
		total += uint64(g.total)
	}
	if total > math.MaxUint32/f {
		return 0
	}
	return factor(f)
}

func (f factor) direct() uint32 { return uint32(max(1, f)) }

// through divides the weight of ready endpoints over the gateways.
func (f factor) through(gateways []GatewayAddress, ready uint32) []Hop {
	n := uint64(len(gateways))
	share := uint64(ready) * uint64(f) / n
	if f == 0 {
		share = (uint64(ready) + n - 1) / n
	}
	hops := make([]Hop, 0, n)
	for _, a := range gateways {
		hops = append(hops, Hop{Host: a.Host, Port: a.Port, Weight: uint32(share), Gateway: true, Mesh: true, Health: Ready})
	}
	return hops
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return max(1, a)
}

// overprovisioning is Envoy's default factor, in percent.
const overprovisioning = 140

// Load is the share of requests, in percent, that each priority of the groups gets while
// everything Envoy sees by itself is well. The shares add up to 100; the first priority
// with any health takes the rounding. All zero means that nothing can be called.
//
// It follows Envoy's priority load calculation:
// https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/priority
func Load(groups []Group) []int {
	var healthy, all []int
	for _, g := range groups {
		for int(g.Priority) >= len(all) {
			healthy, all = append(healthy, 0), append(all, 0)
		}
		for _, h := range g.Hops {
			all[g.Priority]++
			if h.Health != NotReady {
				healthy[g.Priority]++
			}
		}
	}
	health, total := make([]int, len(all)), 0
	for i := range all {
		if all[i] > 0 {
			health[i] = min(100, overprovisioning*healthy[i]/all[i])
		}
		total += health[i]
	}
	load := make([]int, len(all))
	if total = min(100, total); total == 0 {
		return load
	}
	left, first := 100, -1
	for i := range health {
		load[i] = min(left, health[i]*100/total)
		left -= load[i]
		if first < 0 && health[i] > 0 {
			first = i
		}
	}
	load[first] += left
	return load
}
