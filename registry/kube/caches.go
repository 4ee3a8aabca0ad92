// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// The codes of this package's findings.
const (
	codeMalformed = "MESH2101" // part of an object is ignored, because it cannot be right
	codeLarge     = "MESH2102" // more endpoints than are reasonable, or than are served
	codeBudget    = "MESH2103" // a cluster reports more than it may
	codeTooLarge  = "MESH2104" // an object is left out, because it is too large
	codeIstio     = "MESH2105" // Istio's proxies count as none, because the cluster did not opt in
)

// Budget bounds what one member may report, so that it cannot take the others down.
type Budget struct {
	Services            int // zero means 10,000
	EndpointsPerService int // zero means 10,000
	LargeService        int // from here on a finding says so; zero means 1,000
	Objects             int // of one kind; zero means 10,000
	Findings            int // zero means 200
}

func (b *Budget) setDefaults() {
	for _, f := range []struct {
		field *int
		value int
	}{{&b.Services, 10000}, {&b.EndpointsPerService, 10000}, {&b.LargeService, 1000}, {&b.Objects, 10000}, {&b.Findings, 200}} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
}

// caches are the tables of one member and what follows from them. Tables call back when a
// row changed; level works out again only what depends on that.
type caches struct {
	source federation.SourceID
	budget Budget
	wake   func()
	reduce reducer

	services   *table[*serviceRow]
	slices     *table[*sliceRow]
	pods       *table[*podRow]
	nodes      *table[*nodeRow]
	namespaces *table[*namespaceRow]

	// mu guards what follows: indexes, and what changed since the last level.
	mu         sync.Mutex
	member     *registry.Member
	slicesOf   map[federation.ServiceName][]serviceSlice
	gateways   map[federation.ServiceName]gatewayMark
	istio      map[registry.ObjectName]bool // pods with a proxy of Istio's
	configs    map[registry.ObjectKind]*table[*federation.Object]
	dirty      map[federation.ServiceName]bool
	dirtyPods  map[registry.ObjectName]string // with the UID they had at the last level
	dirtyKinds map[registry.ObjectKind]bool
	dirtyAll   bool
	dirtyIstio bool

	// Only level uses these: what it made last. (Findings also come from elsewhere.)
	last     registry.Level
	findings map[string]federation.Finding // by object
	ports    map[string]map[uint32]uint32  // target ports, shared
}

// serviceSlice is a slice among those of its service.
type serviceSlice struct {
	name string
	row  *sliceRow
}

func newCaches(m *registry.Member, budget Budget, wake func()) *caches {
	budget.setDefaults()
	c := &caches{
		source: m.Source(), budget: budget, wake: wake, member: m,
		slicesOf:   map[federation.ServiceName][]serviceSlice{},
		gateways:   map[federation.ServiceName]gatewayMark{},
		istio:      map[registry.ObjectName]bool{},
		configs:    map[registry.ObjectKind]*table[*federation.Object]{},
		dirty:      map[federation.ServiceName]bool{},
		dirtyPods:  map[registry.ObjectName]string{},
		dirtyKinds: map[registry.ObjectKind]bool{},
		dirtyAll:   true,
		findings:   map[string]federation.Finding{},
	}
	names := &c.reduce.names
	c.services = newTable(names, c.reduce.service, same[*serviceRow], c.serviceChanged)
	c.slices = newTable(names, c.reduce.endpointSlice, same[*sliceRow], c.sliceChanged)
	c.pods = newTable(names, c.reduce.pod, same[*podRow], c.podChanged)
	c.reduce.pods = c.pods.get
	c.nodes = newTable(names, node, same[*nodeRow], func(registry.ObjectName, **nodeRow, **nodeRow) { c.changeAll() })
	c.namespaces = newTable(names, namespace, same[*namespaceRow], func(_ registry.ObjectName, before, after **namespaceRow) {
		if before != nil && after != nil && (*before).network == (*after).network {
			c.wake()
			return
		}
		c.changeAll()
	})
	return c
}

// know takes what is stored for what was reported last: what is still as it was stored is
// the very same then, and not in memory twice.
func (c *caches) know(stored *federation.Snapshot) {
	c.last.Records, c.last.Workloads = map[federation.ServiceName]*federation.Record{}, map[string]*federation.Workload{}
	for name, records := range stored.Records {
		for _, r := range records {
			if r.Source == c.source {
				c.last.Records[name] = r
			}
		}
	}
	for key, w := range stored.Workloads {
		if key.Source == c.source {
			c.last.Workloads[key.UID] = w
		}
	}
}

// optedIn tells whether the cluster's Istio proxies have their certificates from the mesh.
func (c *caches) optedIn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.member.AllowIstioCA
}

func (c *caches) changeAll() {
	c.mu.Lock()
	c.dirtyAll = true
	c.mu.Unlock()
	c.wake()
}

// setMember takes in what the registration says about the cluster.
func (c *caches) setMember(m *registry.Member) {
	c.mu.Lock()
	was := c.member
	c.member = m
	same := was.Network == m.Network && was.Name == m.Name && slices.Equal(was.GatewayAddresses, m.GatewayAddresses) && was.AllowIstioCA == m.AllowIstioCA
	c.dirtyAll = c.dirtyAll || was.Network != m.Network || was.AllowIstioCA != m.AllowIstioCA
	c.mu.Unlock()
	if !same {
		c.wake()
	}
}

func (c *caches) serviceChanged(_ registry.ObjectName, before, after **serviceRow) {
	defer c.wake()
	c.mu.Lock()
	defer c.mu.Unlock()
	if before != nil {
		c.dirty[(*before).name] = true
		delete(c.gateways, (*before).name)
	}
	if after != nil {
		c.dirty[(*after).name] = true
		if mark := (*after).gateway; mark != noGateway {
			c.gateways[(*after).name] = mark
		}
	}
}

func (c *caches) sliceChanged(key registry.ObjectName, before, after **sliceRow) {
	defer c.wake()
	c.mu.Lock()
	defer c.mu.Unlock()
	if before != nil {
		name := (*before).service
		c.dirty[name] = true
		left := slices.DeleteFunc(slices.Clone(c.slicesOf[name]), func(s serviceSlice) bool { return s.name == key.Name })
		if len(left) == 0 {
			delete(c.slicesOf, name)
		} else {
			c.slicesOf[name] = left
		}
	}
	if after != nil {
		name := (*after).service
		c.dirty[name] = true
		list := c.slicesOf[name]
		at, _ := slices.BinarySearchFunc(list, key.Name, func(s serviceSlice, name string) int { return strings.Compare(s.name, name) })
		c.slicesOf[name] = slices.Insert(slices.Clip(list), at, serviceSlice{key.Name, *after})
	}
}

func (c *caches) podChanged(key registry.ObjectName, before, after **podRow) {
	defer c.wake()
	if before == nil && after == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, noted := c.dirtyPods[key]; !noted {
		c.dirtyPods[key] = ""
		if before != nil {
			c.dirtyPods[key] = (*before).uid
		}
	}
	was, is := before != nil && (*before).istio, after != nil && (*after).istio
	if was != is {
		c.dirtyIstio = true
		delete(c.istio, key)
		if is {
			c.istio[key] = true
		}
	}
}

// dirtyOfPods marks the services whose slices name a pod that changed. To look for them
// once a level is quick; to remember them for every pod would take more memory than the
// endpoints do.
func (c *caches) dirtyOfPods() {
	if len(c.dirtyPods) == 0 {
		return
	}
	for name, list := range c.slicesOf {
		if c.dirty[name] {
			continue
		}
		for _, slice := range list {
			for i := range slice.row.endpoints {
				key := registry.ObjectName{Namespace: name.Namespace, Name: slice.row.endpoints[i].pod}
				if _, changed := c.dirtyPods[key]; changed {
					c.dirty[name] = true
				}
			}
		}
	}
}

// config is the table of a kind of configuration, made when it is first asked for.
func (c *caches) config(kind registry.ObjectKind, name string) (t *table[*federation.Object], fresh bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.configs[kind]; t != nil {
		return t, false
	}
	sameObject := func(a, b *federation.Object) bool {
		return a.Generation == b.Generation && string(a.Raw) == string(b.Raw) && a.APIVersion == b.APIVersion && a.Created.Equal(b.Created)
	}
	t = newTable(&c.reduce.names, configObject(c.source, name), sameObject, func(registry.ObjectName, **federation.Object, **federation.Object) {
		c.mu.Lock()
		c.dirtyKinds[kind] = true
		c.mu.Unlock()
		c.wake()
	})
	c.configs[kind] = t
	return t, true
}

// coreStates are the tables that records depend on.
func (c *caches) coreStates() map[string]tableState {
	return map[string]tableState{
		"services": c.services.state(), "endpointslices": c.slices.state(), "pods": c.pods.state(),
		"nodes": c.nodes.state(), "namespaces": c.namespaces.state(),
	}
}

// states are those of all tables.
func (c *caches) states() map[string]tableState {
	out := c.coreStates()
	c.mu.Lock()
	defer c.mu.Unlock()
	for kind, t := range c.configs {
		out[string(kind)] = t.state()
	}
	return out
}

// level is everything the member reports now; false while some kind is still on its way
// for the first time.
func (c *caches) level() (registry.Level, bool) {
	complete := true
	for _, s := range c.states() {
		if !s.settled() {
			return registry.Level{}, false
		}
	}
	for _, s := range c.coreStates() {
		complete = complete && s.synced
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	next := registry.Level{Objects: c.levelObjects()}
	if complete {
		c.levelRecords(&next)
		next.Gateways = c.levelGateways()
	}
	c.boundFindings(&next)
	known := c.last
	c.last = next
	if !complete {
		c.last.Records, c.last.Workloads, c.last.Gateways = known.Records, known.Workloads, known.Gateways
	}
	return next, true
}

func (c *caches) levelRecords(next *registry.Level) {
	next.Records, next.Workloads = maps.Clone(c.last.Records), maps.Clone(c.last.Workloads)
	if c.dirtyAll || next.Records == nil {
		next.Records = map[federation.ServiceName]*federation.Record{}
		next.Workloads = map[string]*federation.Workload{}
		clear(c.dirty)
		c.services.each(func(_ registry.ObjectName, s *serviceRow) { c.dirty[s.name] = true })
		for name := range c.last.Records {
			c.dirty[name] = true
		}
		clear(c.dirtyPods)
		c.pods.each(func(key registry.ObjectName, p *podRow) { c.dirtyPods[key] = p.uid })
	} else {
		c.dirtyOfPods()
	}
	for name := range c.dirty {
		object := "Service " + name.String()
		delete(c.findings, object)
		s, ok := c.services.get(registry.ObjectName(name))
		if !ok {
			delete(next.Records, name)
			continue
		}
		record := c.record(s, object)
		if old := c.last.Records[name]; old != nil && equalRecord(old, record) {
			record = old
		}
		next.Records[name] = record
	}
	c.levelWorkloads(next)
	c.findIstio()
	// New maps, because a map that was large stays large.
	c.dirty, c.dirtyPods, c.dirtyAll = map[federation.ServiceName]bool{}, map[registry.ObjectName]string{}, false
	c.boundRecords(next)
}

func (c *caches) levelWorkloads(next *registry.Level) {
	// All that went come before those that came: a UID may have moved to another name.
	for _, uid := range c.dirtyPods {
		delete(next.Workloads, uid)
	}
	for key := range c.dirtyPods {
		object := "Pod " + key.Namespace + "/" + key.Name
		delete(c.findings, object)
		p, ok := c.pods.get(key)
		if !ok || c.roleOf(p) == "" || p.uid == "" {
			continue
		}
		if p.problems != nil {
			c.find(codeMalformed, object, strings.Join(*p.problems, "; "))
		}
		w := c.workload(key.Namespace, p)
		if old := c.last.Workloads[p.uid]; old != nil && same(old, w) {
			w = old
		}
		next.Workloads[p.uid] = w
	}
}

// roleOf is what a pod's proxy does for the mesh; empty without a proxy of the mesh. One of
// Istio's has our root, and we its, only where the cluster opted in.
func (c *caches) roleOf(p *podRow) federation.ProxyRole {
	if p.istio && !c.member.AllowIstioCA {
		return ""
	}
	return p.role
}

// findIstio tells of proxies that do not count, but would if the cluster opted in.
func (c *caches) findIstio() {
	const object = "Istio's proxies"
	if !c.dirtyIstio && !c.dirtyAll {
		return
	}
	c.dirtyIstio = false
	delete(c.findings, object)
	if c.member.AllowIstioCA || len(c.istio) == 0 {
		return
	}
	example := slices.MinFunc(slices.Collect(maps.Keys(c.istio)), func(a, b registry.ObjectName) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	c.find(codeIstio, object, fmt.Sprintf("%d pods, for example %s/%s, have a proxy of Istio's, whose roots are not the mesh's: they are called in plaintext, and their gateways are not used. "+
		"If their certificates come from the mesh, join the cluster again with --allow-istio-ca", len(c.istio), example.Namespace, example.Name))
}

func (c *caches) workload(namespace string, p *podRow) *federation.Workload {
	return &federation.Workload{
		Source: c.source, Namespace: namespace, Name: p.name, UID: p.uid, Role: c.roleOf(p), ServiceAccount: p.account,
		Network: c.networkOf(namespace, p), Locality: c.localityOf(&place{node: p.node}), Addresses: p.addresses, Labels: p.labels, Ready: p.ready,
	}
}

// networkOf is the pod's own network, else its namespace's, else what the cluster joined
// with.
func (c *caches) networkOf(namespace string, p *podRow) federation.Network {
	if p.network != "" {
		return p.network
	}
	if n, ok := c.namespaces.get(inCluster(namespace)); ok && n.network != "" {
		return n.network
	}
	return c.member.Network
}

// localityOf is that of the node, else the zone alone.
func (c *caches) localityOf(at *place) federation.Locality {
	if at == nil {
		return federation.Locality{}
	}
	if n, ok := c.nodes.get(inCluster(at.node)); ok {
		return n.locality
	}
	return federation.Locality{Zone: at.zone}
}

// record is a service with its endpoints.
func (c *caches) record(s *serviceRow, object string) *federation.Record {
	r := &federation.Record{
		Source: c.source, Name: s.name, Type: s.kind, Created: s.created, Ports: s.ports, ClusterIPs: s.clusterIPs,
		ExternalName: s.externalName, Labels: s.labels, ClusterLocal: s.local, ExportTo: s.exportTo, PublishNotReady: s.publishNotReady,
	}
	problems := slices.Clone(s.problems)
	if s.kind != federation.ExternalName {
		r.Endpoints = c.endpoints(s, &problems)
	}
	if len(problems) > 0 {
		c.find(codeMalformed, object, strings.Join(problems, "; "))
	}
	if n := len(r.Endpoints); n > c.budget.EndpointsPerService {
		r.Endpoints = r.Endpoints[:c.budget.EndpointsPerService]
		c.find(codeLarge, object, fmt.Sprintf("has %d endpoints, of which only %d are served; split the service", n, c.budget.EndpointsPerService))
	} else if n > c.budget.LargeService {
		c.find(codeLarge, object, fmt.Sprintf("has %d endpoints, more than %d: every proxy that calls it keeps all of them; consider a Sidecar or splitting it", n, c.budget.LargeService))
	}
	return r
}

// endpoints merges the slices of a service: the addresses of both families of a pod are
// one endpoint.
func (c *caches) endpoints(s *serviceRow, problems *[]string) []federation.Endpoint {
	byKey := map[string]int{}
	var out []federation.Endpoint
	if rows := c.slicesOf[s.name]; len(rows) > 0 {
		out = make([]federation.Endpoint, 0, len(rows[0].row.endpoints)) // mostly all
	}
	for _, slice := range c.slicesOf[s.name] {
		*problems = append(*problems, slice.row.problems...)
		target := c.targetPorts(s.ports, slice.row.ports)
		for i := range slice.row.endpoints {
			e, ok := c.endpoint(s, &slice.row.endpoints[i])
			if !ok {
				continue
			}
			if at, known := byKey[e.Key()]; known {
				mergeAddress(&out[at], e.Addresses[0])
				continue
			}
			e.TargetPorts = target
			byKey[e.Key()] = len(out)
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b federation.Endpoint) int { return strings.Compare(a.Key(), b.Key()) })
	if len(out) == 0 {
		return nil
	}
	return slices.Clip(out)
}

// mergeAddress adds an address of the family that the endpoint lacks, IPv4 first.
func mergeAddress(e *federation.Endpoint, addr netip.Addr) {
	for _, a := range e.Addresses {
		if a.Is4() == addr.Is4() {
			return
		}
	}
	e.Addresses = append(slices.Clone(e.Addresses), addr)
	slices.SortFunc(e.Addresses, netip.Addr.Compare)
}

// targetPorts maps service ports to those of a slice, which carries them under the same
// names. Equal maps are shared.
func (c *caches) targetPorts(service []federation.Port, slice []slicePort) map[uint32]uint32 {
	out := map[uint32]uint32{}
	for _, p := range service {
		for _, t := range slice {
			if t.name == p.Name {
				out[p.Number] = t.number
				break
			}
		}
	}
	if len(out) == 0 {
		return nil
	}
	key := fmt.Sprint(out)
	if m, ok := c.ports[key]; ok {
		return m
	}
	if c.ports == nil || len(c.ports) > 1<<10 {
		c.ports = map[string]map[uint32]uint32{} // what is in use stays in use
	}
	c.ports[key] = out
	return out
}

// endpoint is one row of a slice. One whose pod is not there, or is another incarnation,
// does not count: without its account and its proxy nobody could call it rightly.
func (c *caches) endpoint(s *serviceRow, row *sliceEndpoint) (federation.Endpoint, bool) {
	e := federation.Endpoint{Health: healths[row.health]}
	if row.place != nil {
		e.Hostname = row.place.hostname
	}
	if s.publishNotReady && row.ready {
		e.Health = federation.Ready
	}
	if row.pod == "" {
		e.Addresses = []netip.Addr{row.addr}
		e.Network, e.Locality = c.member.Network, c.localityOf(row.place)
		return e, true
	}
	p, ok := c.pods.get(registry.ObjectName{Namespace: s.name.Namespace, Name: row.pod})
	if !ok || row.uid != "" && row.uid != p.uid {
		return e, false
	}
	at := place{node: p.node}
	if row.place != nil {
		at.zone = row.place.zone
	}
	e.Addresses = p.address(row.addr)
	e.Workload, e.UID = p.name, p.uid
	e.Network, e.Locality = c.networkOf(s.name.Namespace, p), c.localityOf(&at)
	e.ServiceAccount, e.Labels, e.Mesh = p.account, p.labels, c.roleOf(p) != ""
	return e, true
}

// address is a list of one address: a piece of the pod's own list, if it is there.
func (p *podRow) address(addr netip.Addr) []netip.Addr {
	if i := slices.Index(p.addresses, addr); i >= 0 {
		return p.addresses[i : i+1 : i+1]
	}
	return []netip.Addr{addr}
}

func equalRecord(a, b *federation.Record) bool { return same(a, b) }

// boundRecords leaves out the youngest services of a cluster that has too many.
func (c *caches) boundRecords(next *registry.Level) {
	const object = "cluster"
	delete(c.findings, object)
	over := len(next.Records) - c.budget.Services
	if over <= 0 {
		return
	}
	names := slices.SortedFunc(maps.Keys(next.Records), func(a, b federation.ServiceName) int {
		if n := next.Records[b].Created.Compare(next.Records[a].Created); n != 0 {
			return n
		}
		return b.Compare(a)
	})
	for _, name := range names[:over] {
		delete(next.Records, name)
	}
	c.dirtyAll = true // what is left out must be found again
	c.find(codeBudget, object, fmt.Sprintf("has %d services, %d more than its budget; the youngest ones are left out, for example %s", len(names), over, names[0]))
}

func (c *caches) levelObjects() map[registry.ObjectKind]map[registry.ObjectName]*federation.Object {
	out := map[registry.ObjectKind]map[registry.ObjectName]*federation.Object{}
	for kind, t := range c.configs {
		if !t.state().synced {
			continue
		}
		if last, ok := c.last.Objects[kind]; ok && !c.dirtyKinds[kind] {
			out[kind] = last
			continue
		}
		out[kind] = c.objectsOf(kind, t)
	}
	clear(c.dirtyKinds)
	return out
}

func (c *caches) objectsOf(kind registry.ObjectKind, t *table[*federation.Object]) map[registry.ObjectName]*federation.Object {
	objects := map[registry.ObjectName]*federation.Object{}
	prefix := string(kind) + " "
	maps.DeleteFunc(c.findings, func(object string, _ federation.Finding) bool { return strings.HasPrefix(object, prefix) })
	over := 0
	t.each(func(key registry.ObjectName, o *federation.Object) {
		switch {
		case o.Raw == nil:
			c.find(codeTooLarge, prefix+key.Namespace+"/"+key.Name, fmt.Sprintf("has more than %d bytes and is left out; make it smaller", objectBytes))
		case len(objects) >= c.budget.Objects:
			over++
		default:
			objects[registry.ObjectName{Namespace: o.Namespace, Name: o.Name}] = o
		}
	})
	if over > 0 {
		c.find(codeBudget, prefix, fmt.Sprintf("%d objects are more than the budget and left out", over))
	}
	return objects
}

// find notes the one finding of an object.
func (c *caches) find(code, object, message string) {
	if old, ok := c.findings[object]; ok {
		if strings.Contains(old.Message, message) {
			return
		}
		message = old.Message + "; " + message
	}
	if len(message) > 600 {
		message = message[:600] + "…"
	}
	c.findings[object] = federation.Finding{
		Code: code, Severity: federation.SeverityWarning, Object: object + " @ " + c.member.Name, Message: message,
	}
}

func (c *caches) boundFindings(next *registry.Level) {
	for i, object := range slices.Sorted(maps.Keys(c.findings)) {
		if i == c.budget.Findings {
			next.Findings = append(next.Findings, federation.Finding{
				Code: codeBudget, Severity: federation.SeverityWarning, Object: "cluster " + c.member.Name,
				Message: fmt.Sprintf("%d more findings about its objects are not shown", len(c.findings)-i),
			})
			return
		}
		next.Findings = append(next.Findings, c.findings[object])
	}
}
