// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"weak"
)

// Scope says whose view: the proxies of one cluster on one network. Proxies of VMs have
// no cluster: their scope's Cluster is empty.
type Scope struct {
	Cluster ClusterID
	Network Network

	// Gateway is the scope of a network's east-west gateways: what strangers may be let
	// through to. It has no cluster. Its groups are endpoints of its own network only, of
	// every cluster on it, whatever the callers think of them: a port's protocol, a source
	// gone stale and a cluster that drains are the callers' business.
	Gateway bool
}

// View is what the proxies of one scope should see. It is immutable and a pure function
// of a Snapshot and a Scope.
type View struct {
	Scope    Scope
	Revision Revision
	Services []*Service // ordered by name
	Findings []Finding  // conflicts met while merging, for the services of this view

	// Gateways are the ways into every other network, ready ones only, addresses with
	// host names as they are; those of the own network are there too, for who needs them.
	Gateways map[Network][]GatewayAddress

	// Region is where the proxies of the scope are: the commonest one of the own
	// cluster's endpoints (of the own network's, for VMs). Empty if unknown.
	Region string

	shape     shape
	place     place                     // of the snapshot, without its maps
	addresses map[string]VirtualAddress // of the snapshot
	regions   map[string]int            // how many endpoints stand where the proxies do, by region

	// What differs from the view that it was computed from, ordered.
	basis   weak.Pointer[View]
	changed []ServiceName
}

// Group is the hops of one priority and locality to the endpoints of a service's port.
type Group struct {
	Priority uint32 // 0 first; without gaps
	Locality Locality
	Network  Network
	Hops     []Hop
}

// Hop is one address to send to: an endpoint of the own network, or a gateway.
type Hop struct {
	Host    string // IP address; DNS names only for gateways that have nothing else
	Port    uint32
	Weight  uint32 // at least 1
	Gateway bool   // speaks for a whole network, chosen by SNI
	Mesh    bool   // expects mutual TLS; always true for gateways

	// Of direct endpoints only. Health is Ready for a hop that gets traffic (also for a
	// Terminating endpoint that is called because there is nothing better), else
	// NotReady: it is there to be counted (see Split).
	Health   Health
	Workload string
	Hostname string
	Labels   map[string]string
	Cluster  ClusterID
	Account  string       // service account, without its namespace
	Also     []netip.Addr // the endpoint's address of the other family, if any
}

// Service is a merged service as one scope sees it. Two views of the same scope share
// the pointer of a service that did not change between them.
type Service struct {
	Name  ServiceName
	Host  string
	Type  ServiceType
	Ports []Port

	// Addresses a caller of this scope dials: the ClusterIPs of its own cluster's record,
	// else the virtual address. Empty for a headless service of the own cluster, and
	// while no virtual address has been allocated yet.
	Addresses []netip.Addr

	// AlsoAt are addresses that are still good, but no longer given out: the virtual
	// address of a service that meanwhile has a ClusterIP here.
	AlsoAt []netip.Addr

	// Aliases are further host names with the same meaning (…svc.clusterset.local).
	Aliases []string

	ExternalName string
	ExportTo     []string
	Labels       map[string]string

	// Own tells that the scope's cluster itself has a record of this service.
	Own bool

	// Endpoints of any health, own network and others. Endpoints of other networks carry
	// no addresses here: only what is needed to weigh and select them.
	Endpoints []ServiceEndpoint

	// Accounts are the SPIFFE paths "ns/<namespace>/sa/<account>" that may answer, of all
	// records that contribute endpoints, ordered. Endpoints that are not ready count: an
	// account is here before its endpoint is called.
	Accounts []string

	// Pods are the pods with names of their own: the clusterset name of every pod with a
	// host name, and the plain names of a headless service that exists only elsewhere.
	Pods []NamedPod

	records  []*Record // what it was merged from, to know when it must be merged again
	virtual  VirtualAddress
	findings []Finding
	home     vote            // of its endpoints' regions, for View.Region
	remote   map[Network]int // other networks' ready mesh endpoints
}

// ServiceEndpoint is an endpoint with where it came from.
type ServiceEndpoint struct {
	Endpoint
	Source  SourceID
	Cluster ClusterID // empty for VMs

	// Direct tells that it is on the scope's own network; otherwise it is reached through
	// the gateways of its network.
	Direct bool

	// Standing tells whether its source's word is still fresh.
	Standing Standing
}

// NamedPod is one pod of a headless service under a name of its own.
type NamedPod struct {
	Host     string       // db-0.db.ns.svc.cluster.local, or db-0.<cluster>.db.ns.svc.clusterset.local
	SNIHost  string       // always the latter: what gateways know the pod by
	Address  []netip.Addr // virtual
	Account  string       // "ns/<namespace>/sa/<account>", empty without a proxy
	Endpoint ServiceEndpoint

	virtual VirtualAddress
}

// vote is the commonest region of some endpoints and how many are there.
type vote struct {
	region string
	n      int
}

// Port returns the port with that number.
func (s *Service) Port(number uint32) (Port, bool) {
	for _, p := range s.Ports {
		if p.Number == number {
			return p, true
		}
	}
	return Port{}, false
}

// ReadyIn is how many ready endpoints another network has that its gateways can lead to.
func (s *Service) ReadyIn(network Network) int { return s.remote[network] }

// HeadlessHere tells that the service's name resolves to its pods' own addresses, which
// are the Direct endpoints. It is false for a headless service that exists only elsewhere.
func (s *Service) HeadlessHere() bool { return s.Type == Headless && s.Own }

// VisibleTo tells whether a namespace may see the service by its ExportTo.
func (s *Service) VisibleTo(namespace string) bool {
	if len(s.ExportTo) == 0 {
		return true
	}
	for _, to := range s.ExportTo {
		switch to {
		case "*", namespace:
			return true
		case ".":
			if namespace == s.Name.Namespace {
				return true
			}
		}
	}
	return false
}

// View computes what the proxies of a scope should see.
func (s *Snapshot) View(scope Scope) *View { return s.ViewFrom(nil, scope) }

// ViewFrom is View, sharing with an earlier view of the same scope every service that did
// not change since: one endpoint's change merges one service, and looks at no other if the
// snapshot's maker keeps a History. A nil or foreign prev costs a full computation.
func (s *Snapshot) ViewFrom(prev *View, scope Scope) *View {
	v := &View{Scope: scope, Revision: s.Revision, shape: s.shape(scope), addresses: s.Addresses}
	if sameMap(s.place.records, s.Records) {
		v.place = place{history: s.place.history, step: s.place.step}
	}
	v.Gateways = s.waysIn()
	if prev != nil && !prev.shape.equal(v.shape) {
		prev = nil
	}
	if prev == nil || !v.amend(prev, s) {
		v.compose(prev, s)
	}
	if prev != nil {
		v.basis = weak.Make(prev)
	}
	v.Region = winner(v.regions).region
	return v
}

// compose looks at every service.
func (v *View) compose(prev *View, s *Snapshot) {
	m := newMerger(s, v.Scope)
	v.Services = make([]*Service, 0, len(s.Records))
	for name, records := range s.Records {
		var old *Service
		if prev != nil {
			old, _ = prev.Service(name)
		}
		svc := m.renew(old, name, records)
		if svc != nil {
			v.Services = append(v.Services, svc)
		}
		if svc != old {
			v.changed = append(v.changed, name)
		}
	}
	slices.SortFunc(v.Services, func(a, b *Service) int { return a.Name.Compare(b.Name) })
	if prev != nil {
		for _, old := range prev.Services {
			if _, ok := s.Records[old.Name]; !ok {
				v.changed = append(v.changed, old.Name)
			}
		}
	}
	slices.SortFunc(v.changed, ServiceName.Compare)
	v.regions = map[string]int{}
	for _, svc := range v.Services {
		v.count(svc, 1)
	}
	v.Findings = v.collect()
}

// amend looks only at the services that the history names; false if it does not know.
func (v *View) amend(prev *View, s *Snapshot) bool {
	if !sameMap(prev.addresses, s.Addresses) {
		return false
	}
	names, ok := s.changedServices(prev.place)
	if !ok {
		return false
	}
	m := newMerger(s, v.Scope)
	fresh := make([]*Service, 0, len(names)) // of the changed ones; nil for those that went
	for _, name := range names {
		old, _ := prev.Service(name)
		var svc *Service
		if records := s.Records[name]; len(records) > 0 {
			svc = m.renew(old, name, records)
		}
		if svc != old {
			v.changed, fresh = append(v.changed, name), append(fresh, svc)
		}
	}
	v.Services, v.regions, v.Findings = prev.Services, prev.regions, prev.Findings
	if len(v.changed) > 0 {
		v.exchange(prev, fresh)
	}
	if !v.complainsAlike(prev, fresh) {
		v.Findings = v.collect()
	}
	return true
}

// exchange puts in the changed services.
func (v *View) exchange(prev *View, fresh []*Service) {
	v.Services, v.regions = make([]*Service, 0, len(prev.Services)+len(fresh)), maps.Clone(prev.regions)
	rest := prev.Services
	for i, name := range v.changed {
		at, found := slices.BinarySearchFunc(rest, name, compareService)
		v.Services = append(v.Services, rest[:at]...)
		rest = rest[at:]
		if found {
			v.count(rest[0], -1)
			rest = rest[1:]
		}
		if fresh[i] != nil {
			v.count(fresh[i], 1)
			v.Services = append(v.Services, fresh[i])
		}
	}
	v.Services = append(v.Services, rest...)
}

// complainsAlike tells whether the findings are those of before.
func (v *View) complainsAlike(prev *View, fresh []*Service) bool {
	if !maps.EqualFunc(v.Gateways, prev.Gateways, slices.Equal[[]GatewayAddress]) {
		return false
	}
	for i, name := range v.changed {
		old, _ := prev.Service(name)
		if old == nil {
			old = &Service{}
		}
		svc := fresh[i]
		if svc == nil {
			svc = &Service{}
		}
		if !slices.Equal(old.findings, svc.findings) || !maps.EqualFunc(old.remote, svc.remote, func(int, int) bool { return true }) {
			return false
		}
	}
	return true
}

// count adds the regions of a service's endpoints to those of the view, or takes them away.
func (v *View) count(s *Service, sign int) {
	if s.home.n == 0 {
		return
	}
	if v.regions[s.home.region] += sign * s.home.n; v.regions[s.home.region] == 0 {
		delete(v.regions, s.home.region)
	}
}

func compareService(s *Service, name ServiceName) int { return s.Name.Compare(name) }

// Service returns the service with that name.
func (v *View) Service(name ServiceName) (*Service, bool) {
	i, ok := v.Index(name)
	if !ok {
		return nil, false
	}
	return v.Services[i], true
}

// Index is where in Services the one with that name stands, or would stand.
func (v *View) Index(name ServiceName) (int, bool) {
	return slices.BinarySearchFunc(v.Services, name, compareService)
}

// Changed are the names of the services that differ between two views of one scope,
// ordered; also those that came or went. It costs nothing if v was computed from prev.
func (v *View) Changed(prev *View) []ServiceName {
	if prev != nil && v.basis == weak.Make(prev) {
		return v.changed
	}
	var before []*Service
	if prev != nil {
		before = prev.Services
	}
	var out []ServiceName
	i := 0
	for _, svc := range v.Services {
		for ; i < len(before) && before[i].Name.Compare(svc.Name) < 0; i++ {
			out = append(out, before[i].Name)
		}
		if i < len(before) && before[i].Name == svc.Name {
			if i++; before[i-1] == svc {
				continue
			}
		}
		out = append(out, svc.Name)
	}
	for ; i < len(before); i++ {
		out = append(out, before[i].Name)
	}
	return out
}

// SameRoads tells whether gateways and region are as in prev: if so, the groups of every
// service whose pointer is the same are the same too.
func (v *View) SameRoads(prev *View) bool {
	return prev != nil && v.Region == prev.Region &&
		maps.EqualFunc(v.Gateways, prev.Gateways, slices.Equal[[]GatewayAddress])
}

// renew is the service made of these records: the old one, which may be nil, if it still
// holds.
func (m *merger) renew(old *Service, name ServiceName, records []*Record) *Service {
	if old != nil && old.current(m.snapshot, records) {
		return old
	}
	return m.merge(name, records)
}

// current tells whether merging these records again would give the same service.
func (s *Service) current(snapshot *Snapshot, records []*Record) bool {
	if !slices.Equal(s.records, records) || snapshot.Addresses[s.Host] != s.virtual {
		return false
	}
	for i := range s.Pods {
		if snapshot.Addresses[s.Pods[i].Host] != s.Pods[i].virtual {
			return false
		}
	}
	return true
}

// waysIn are the addresses of the ready gateways by network. Gateways of a draining
// cluster count only where there are no others.
func (s *Snapshot) waysIn() map[Network][]GatewayAddress {
	out := make(map[Network][]GatewayAddress, len(s.Gateways))
	for network, list := range s.Gateways {
		var staying, leaving []GatewayAddress
		for _, g := range list {
			if g.Ready == 0 || !s.AdmitsGateway(g) {
				continue
			}
			if s.draining(g.Source) {
				leaving = append(leaving, g.reachable()...)
			} else {
				staying = append(staying, g.reachable()...)
			}
		}
		if len(staying) == 0 {
			staying = leaving
		}
		if len(staying) == 0 {
			continue
		}
		slices.SortFunc(staying, GatewayAddress.Compare)
		out[network] = slices.Compact(staying)
	}
	return out
}

// reachable are its IP addresses, else its host names.
func (g *Gateway) reachable() []GatewayAddress {
	ips := filter(g.Addresses, func(a GatewayAddress) bool {
		_, err := netip.ParseAddr(a.Host)
		return err == nil
	})
	if len(ips) > 0 {
		return ips
	}
	return g.Addresses
}

// Compare orders by host, then port.
func (a GatewayAddress) Compare(o GatewayAddress) int {
	return cmp.Or(cmp.Compare(a.Host, o.Host), cmp.Compare(a.Port, o.Port))
}

// sum keeps what views need to know of all services, so that they need not look at every
// endpoint again.
func (s *Service) sum(m *merger) {
	regions := map[string]int{}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if m.isHome(e) && e.Locality.Region != "" {
			regions[e.Locality.Region]++
		}
		if !e.Direct && e.Mesh && e.Health == Ready {
			if s.remote == nil {
				s.remote = map[Network]int{}
			}
			s.remote[e.Network]++
		}
	}
	s.home = winner(regions)
}

// isHome tells whether the endpoint stands where the scope's proxies stand.
func (m *merger) isHome(e *ServiceEndpoint) bool {
	if m.scope.Cluster == "" {
		return e.Direct
	}
	return e.Cluster == m.scope.Cluster
}

func winner(regions map[string]int) vote {
	var best vote
	for region, n := range regions {
		if n > best.n || n == best.n && region < best.region {
			best = vote{region, n}
		}
	}
	return best
}

// collect gathers the services' findings, and names the networks that have endpoints but
// no way in.
func (v *View) collect() []Finding {
	var out []Finding
	dark := map[Network][]string{}
	for _, s := range v.Services {
		out = append(out, s.findings...)
		for network := range s.remote {
			if len(v.Gateways[network]) == 0 {
				dark[network] = append(dark[network], s.Name.String())
			}
		}
	}
	for network, names := range dark {
		shown := names[:min(3, len(names))]
		out = append(out, Finding{
			Code: CodeNetworkNoGateway, Severity: SeverityWarning, Object: "Network " + string(network),
			Message: fmt.Sprintf("has no ready gateway with an address, so its endpoints of %d services (%s, …) cannot be called from network %s; install an east-west gateway there",
				len(names), strings.Join(shown, ", "), v.Scope.Network),
		})
	}
	return sortFindings(out)
}

// shape is what every service of a view depends on, beside its own records.
type shape struct {
	scope    Scope
	clusters map[ClusterID]member
	standing map[SourceID]Standing
}

type member struct {
	name     string
	draining bool
	grant    Grant
}

func (s *Snapshot) shape(scope Scope) shape {
	out := shape{scope: scope, clusters: make(map[ClusterID]member, len(s.Clusters)), standing: s.Standing}
	for id, c := range s.Clusters {
		out.clusters[id] = member{c.Name, c.Draining, c.Grant}
	}
	return out
}

func (a shape) equal(b shape) bool {
	return a.scope == b.scope && maps.Equal(a.standing, b.standing) &&
		maps.EqualFunc(a.clusters, b.clusters, func(x, y member) bool {
			return x.name == y.name && x.draining == y.draining && x.grant.Equal(y.grant)
		})
}
