// SPDX-License-Identifier: Apache-2.0

package kube

import (
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
	labels labelSets

	services   *table[*serviceRow]
	slices     *table[*sliceRow]
	pods       *table[*podRow]
	nodes      *table[*nodeRow]
	namespaces *table[*namespaceRow]

	// mu guards what follows: indexes, and what changed since the last level.
	mu         sync.Mutex
	member     *registry.Member
	slicesOf   map[federation.ServiceName]map[string]*sliceRow
	servicesOf map[string]map[federation.ServiceName]int // by pod: how many slices name it
	gateways   map[federation.ServiceName]bool
	configs    map[registry.ObjectKind]*table[*federation.Object]
	dirty      map[federation.ServiceName]bool
	dirtyPods  map[string]bool
	dirtyKinds map[registry.ObjectKind]bool
	dirtyAll   bool

	// Only level uses these: what it made last.
	last     registry.Level
	findings map[string]federation.Finding // by object
}

func newCaches(m *registry.Member, budget Budget, wake func()) *caches {
	budget.setDefaults()
	c := &caches{
		source: m.Source(), budget: budget, wake: wake, member: m,
		slicesOf:   map[federation.ServiceName]map[string]*sliceRow{},
		servicesOf: map[string]map[federation.ServiceName]int{},
		gateways:   map[federation.ServiceName]bool{},
		configs:    map[registry.ObjectKind]*table[*federation.Object]{},
		dirty:      map[federation.ServiceName]bool{},
		dirtyPods:  map[string]bool{},
		dirtyKinds: map[registry.ObjectKind]bool{},
		dirtyAll:   true,
		findings:   map[string]federation.Finding{},
	}
	c.services = newTable(c.labels.service, same[*serviceRow], c.serviceChanged)
	c.slices = newTable(endpointSlice, same[*sliceRow], c.sliceChanged)
	c.pods = newTable(c.labels.pod, same[*podRow], c.podChanged)
	c.nodes = newTable(node, same[*nodeRow], func(string, **nodeRow, **nodeRow) { c.changeAll() })
	c.namespaces = newTable(namespace, same[*namespaceRow], func(_ string, before, after **namespaceRow) {
		if before != nil && after != nil && (*before).network == (*after).network {
			c.wake()
			return
		}
		c.changeAll()
	})
	return c
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
	same := was.Network == m.Network && was.Name == m.Name && slices.Equal(was.GatewayAddresses, m.GatewayAddresses)
	c.dirtyAll = c.dirtyAll || was.Network != m.Network
	c.mu.Unlock()
	if !same {
		c.wake()
	}
}

func (c *caches) serviceChanged(_ string, before, after **serviceRow) {
	defer c.wake()
	c.mu.Lock()
	defer c.mu.Unlock()
	if before != nil {
		c.dirty[(*before).name] = true
		delete(c.gateways, (*before).name)
	}
	if after != nil {
		c.dirty[(*after).name] = true
		if (*after).gateway {
			c.gateways[(*after).name] = true
		}
	}
}

func (c *caches) sliceChanged(key string, before, after **sliceRow) {
	defer c.wake()
	c.mu.Lock()
	defer c.mu.Unlock()
	if before != nil {
		name := (*before).service
		c.dirty[name] = true
		delete(c.slicesOf[name], key)
		if len(c.slicesOf[name]) == 0 {
			delete(c.slicesOf, name)
		}
		c.countPods(*before, -1)
	}
	if after != nil {
		name := (*after).service
		c.dirty[name] = true
		if c.slicesOf[name] == nil {
			c.slicesOf[name] = map[string]*sliceRow{}
		}
		c.slicesOf[name][key] = *after
		c.countPods(*after, 1)
	}
}

func (c *caches) countPods(r *sliceRow, n int) {
	for i := range r.endpoints {
		if r.endpoints[i].pod == "" {
			continue
		}
		pod := objectKeyOf(r.service.Namespace, r.endpoints[i].pod)
		if c.servicesOf[pod] == nil {
			c.servicesOf[pod] = map[federation.ServiceName]int{}
		}
		c.servicesOf[pod][r.service] += n
		if c.servicesOf[pod][r.service] <= 0 {
			delete(c.servicesOf[pod], r.service)
		}
		if len(c.servicesOf[pod]) == 0 {
			delete(c.servicesOf, pod)
		}
	}
}

func (c *caches) podChanged(key string, before, after **podRow) {
	defer c.wake()
	if before == nil && after == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dirtyPods[key] = true
	for name := range c.servicesOf[key] {
		c.dirty[name] = true
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
	t = newTable(configObject(c.source, name), sameObject, func(string, **federation.Object, **federation.Object) {
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
	c.last = next
	return next, true
}

func (c *caches) levelRecords(next *registry.Level) {
	next.Records, next.Workloads = maps.Clone(c.last.Records), maps.Clone(c.last.Workloads)
	if c.dirtyAll || next.Records == nil {
		next.Records = map[federation.ServiceName]*federation.Record{}
		next.Workloads = map[string]*federation.Workload{}
		clear(c.dirty)
		c.services.each(func(_ string, s *serviceRow) { c.dirty[s.name] = true })
		for name := range c.last.Records {
			c.dirty[name] = true
		}
		clear(c.dirtyPods)
		c.pods.each(func(key string, _ *podRow) { c.dirtyPods[key] = true })
	}
	for name := range c.dirty {
		object := "Service " + name.String()
		delete(c.findings, object)
		s, ok := c.services.get(objectKeyOf(name.Namespace, name.Name))
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
	clear(c.dirty)
	clear(c.dirtyPods)
	c.dirtyAll = false
	c.boundRecords(next)
}

func (c *caches) levelWorkloads(next *registry.Level) {
	last := c.last.Workloads
	byPod := map[string]string{} // of the pods that changed, which UID they had
	for uid, w := range next.Workloads {
		if key := objectKeyOf(w.Namespace, w.Name); c.dirtyPods[key] {
			byPod[key] = uid
		}
	}
	for key := range c.dirtyPods {
		object := "Pod " + key
		delete(c.findings, object)
		if uid, ok := byPod[key]; ok {
			delete(next.Workloads, uid)
		}
		p, ok := c.pods.get(key)
		if !ok || !p.mesh || p.uid == "" {
			continue
		}
		if len(p.problems) > 0 {
			c.find(codeMalformed, object, strings.Join(p.problems, "; "))
		}
		w := c.workload(p)
		if old := last[p.uid]; old != nil && same(old, w) {
			w = old
		}
		next.Workloads[p.uid] = w
	}
}

func (c *caches) workload(p *podRow) *federation.Workload {
	return &federation.Workload{
		Source: c.source, Namespace: p.namespace, Name: p.name, UID: p.uid, Role: p.role, ServiceAccount: p.account,
		Network: c.networkOf(p), Locality: c.localityOf(p.node, ""), Addresses: p.addresses, Labels: p.labels, Ready: p.ready,
	}
}

// networkOf is the pod's own network, else its namespace's, else what the cluster joined
// with.
func (c *caches) networkOf(p *podRow) federation.Network {
	if p.network != "" {
		return p.network
	}
	if n, ok := c.namespaces.get(objectKeyOf("", p.namespace)); ok && n.network != "" {
		return n.network
	}
	return c.member.Network
}

func (c *caches) localityOf(nodeName, zone string) federation.Locality {
	if n, ok := c.nodes.get(objectKeyOf("", nodeName)); ok {
		return n.locality
	}
	return federation.Locality{Zone: zone}
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
	rows := c.slicesOf[s.name]
	byKey := map[string]*federation.Endpoint{}
	ports := map[string]map[uint32]uint32{}
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		row := rows[name]
		*problems = append(*problems, row.problems...)
		target := targetPorts(s.ports, row.ports, ports)
		for i := range row.endpoints {
			e, ok := c.endpoint(s, &row.endpoints[i])
			if !ok {
				continue
			}
			known := byKey[e.Key()]
			if known == nil {
				e.TargetPorts = target
				byKey[e.Key()] = &e
				continue
			}
			mergeAddress(known, e.Addresses[0])
		}
	}
	out := make([]federation.Endpoint, 0, len(byKey))
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		out = append(out, *byKey[key])
	}
	return out
}

// mergeAddress adds an address of the family that the endpoint lacks, IPv4 first.
func mergeAddress(e *federation.Endpoint, addr netip.Addr) {
	for _, a := range e.Addresses {
		if a.Is4() == addr.Is4() {
			return
		}
	}
	e.Addresses = append(e.Addresses, addr)
	slices.SortFunc(e.Addresses, netip.Addr.Compare)
}

// targetPorts maps service ports to those of a slice, which carries them under the same
// names. Equal maps are shared.
func targetPorts(service []federation.Port, slice []slicePort, shared map[string]map[uint32]uint32) map[uint32]uint32 {
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
	if m, ok := shared[key]; ok {
		return m
	}
	shared[key] = out
	return out
}

// endpoint is one row of a slice. One whose pod is not there, or is another incarnation,
// does not count: without its account and its proxy nobody could call it rightly.
func (c *caches) endpoint(s *serviceRow, row *sliceEndpoint) (federation.Endpoint, bool) {
	e := federation.Endpoint{Addresses: []netip.Addr{row.addr}, Health: row.health, Hostname: row.hostname}
	if s.publishNotReady && row.ready {
		e.Health = federation.Ready
	}
	if row.pod == "" {
		e.Network, e.Locality = c.member.Network, c.localityOf(row.node, row.zone)
		return e, true
	}
	p, ok := c.pods.get(objectKeyOf(s.name.Namespace, row.pod))
	if !ok || row.uid != "" && row.uid != p.uid {
		return e, false
	}
	e.Workload, e.UID = p.name, p.uid
	e.Network, e.Locality = c.networkOf(p), c.localityOf(p.node, row.zone)
	e.ServiceAccount, e.Labels, e.Mesh = p.account, p.labels, p.mesh
	return e, true
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
	t.each(func(key string, o *federation.Object) {
		switch {
		case o.Raw == nil:
			c.find(codeTooLarge, prefix+key, fmt.Sprintf("has more than %d bytes and is left out; make it smaller", objectBytes))
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
