// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// apiServer is the service that every cluster has, and means its own by.
var apiServer = ServiceName{Namespace: "default", Name: "kubernetes"}

func (r *Record) system() bool { return strings.HasPrefix(r.Name.Namespace, systemPrefix) }

// LocalOnly tells whether a record is seen by its own cluster only: it says so, it is the
// API server, or it is of a system namespace that its grant does not name.
func (s *Snapshot) LocalOnly(r *Record) bool {
	if r.ClusterLocal || r.Name == apiServer {
		return true
	}
	if !r.system() {
		return false
	}
	grant, ok := s.GrantOf(r.Source)
	return !ok || !grant.AllowsNamespace(r.Name.Namespace)
}

// merger merges the records of one service after the other for one scope.
type merger struct {
	snapshot *Snapshot
	scope    Scope
	own      SourceID // empty for a scope of VMs
}

func newMerger(s *Snapshot, scope Scope) *merger {
	m := &merger{snapshot: s, scope: scope}
	if scope.Cluster != "" {
		m.own = KubeSource(scope.Cluster)
	}
	return m
}

// merge is nil where the scope sees nothing of the service.
func (m *merger) merge(name ServiceName, records []*Record) *Service {
	seen := m.visible(records)
	if len(seen) == 0 {
		return nil
	}
	lead := seen[0]
	svc := &Service{
		Name: name, Host: name.Host(), Type: lead.Type,
		Own: lead.Source == m.own && m.own != "", ExternalName: lead.ExternalName,
		ExportTo: lead.ExportTo, Labels: lead.Labels,
		Aliases: []string{name.clustersetHost()},
		records: records,
	}
	note := &notes{merger: m, object: "Service " + name.String()}
	merged := m.mergeable(lead, seen, note)
	svc.Ports = mergePorts(lead, merged, note)
	for _, r := range merged {
		m.contribute(svc, r, note)
	}
	slices.Sort(svc.Accounts)
	svc.Accounts = slices.Compact(svc.Accounts)
	m.address(svc, lead)
	m.namePods(svc, seen)
	svc.sum(m)
	note.outOfReach(svc)
	svc.findings = sortFindings(note.findings)
	return svc
}

// visible are the records that count for the scope: own cluster's first, then oldest
// first, ties by source.
func (m *merger) visible(records []*Record) []*Record {
	out := make([]*Record, 0, len(records))
	for _, r := range records {
		own := r.Source == m.own
		switch {
		case !m.snapshot.admits(r):
		case !own && m.snapshot.LocalOnly(r):
		case !own && !m.scope.Gateway && m.snapshot.draining(r.Source):
		default:
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *Record) int {
		if x, y := a.Source == m.own, b.Source == m.own; x != y {
			if x {
				return -1
			}
			return 1
		}
		return compareAge(a, b)
	})
	return m.withoutForeignNames(out)
}

// withoutForeignNames drops ExternalName records of other sources: they never merge.
func (m *merger) withoutForeignNames(list []*Record) []*Record {
	return filter(list, func(r *Record) bool { return r.Type != ExternalName || r.Source == m.own })
}

func compareAge(a, b *Record) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Source, b.Source))
}

func (s *Snapshot) draining(source SourceID) bool {
	id, ok := source.Cluster()
	return ok && s.Clusters[id] != nil && s.Clusters[id].Draining
}

// mergeable are the records that share the service with the lead one. A headless service
// of the own cluster, and an ExternalName, stand alone.
func (m *merger) mergeable(lead *Record, seen []*Record, note *notes) []*Record {
	for _, r := range seen {
		if r.Type != lead.Type {
			note.warn(CodeServiceType, "is %s in %s and %s in %s; give it the same type, or mark one of them cluster-local", lead.Type, note.at(lead), r.Type, note.at(r))
		}
		if !sameSet(r.ExportTo, lead.ExportTo) {
			note.warn(CodeServiceType, "is exported to %q in %s and to %q in %s; the former holds here", lead.ExportTo, note.at(lead), r.ExportTo, note.at(r))
		}
	}
	if lead.Source == m.own && (lead.Type == ExternalName || lead.Type == Headless) {
		return seen[:1] // a headless name means the own pods; the others have clusterset names
	}
	return seen
}

// mergePorts is the union by number. Protocol and name follow the own cluster's record,
// else the oldest that has the port.
func mergePorts(lead *Record, seen []*Record, note *notes) []Port {
	ports := slices.Clone(lead.Ports)
	decided := make(map[uint32]*Record, len(ports))
	for _, p := range ports {
		decided[p.Number] = lead
	}
	for _, r := range seen {
		for _, p := range r.Ports {
			by, ok := decided[p.Number]
			if !ok {
				ports = append(ports, p)
				decided[p.Number] = r
				continue
			}
			want, _ := by.Port(p.Number)
			switch {
			case p.Protocol != want.Protocol:
				// In the same words from every cluster's view: it is one finding.
				says := []string{want.Protocol.word() + " in " + note.at(by), p.Protocol.word() + " in " + note.at(r)}
				slices.Sort(says)
				note.add(Finding{Code: CodePortProtocol, Severity: SeverityError, Message: fmt.Sprintf(
					"port %d is %s; the two send each other no calls on it until they agree", p.Number, strings.Join(says, " and "))})
			case p.Name != want.Name:
				says := []string{fmt.Sprintf("%q in %s", want.Name, note.at(by)), fmt.Sprintf("%q in %s", p.Name, note.at(r))}
				slices.Sort(says)
				note.warn(CodePortName, "port %d is named %s; each goes by its own name", p.Number, strings.Join(says, " and "))
			}
		}
	}
	slices.SortFunc(ports, func(a, b Port) int { return cmp.Compare(a.Number, b.Number) })
	return ports
}

func (p Protocol) word() string {
	if p == Unknown {
		return "of unknown protocol"
	}
	return string(p)
}

// contribute adds a record's endpoints and accounts to the service.
func (m *merger) contribute(svc *Service, r *Record, note *notes) {
	cluster, _ := r.Source.Cluster()
	grant, _ := m.snapshot.GrantOf(r.Source)
	standing := m.standing(r.Source)
	agreed, all := m.agreedPorts(svc, r)
	portless := len(r.Ports) == 0 // a headless service may have names to give only
	if len(agreed) == 0 && !portless {
		return
	}
	svc.Endpoints = slices.Grow(svc.Endpoints, len(r.Endpoints))
	account := ""
	for i := range r.Endpoints {
		e := ServiceEndpoint{Endpoint: r.Endpoints[i], Source: r.Source, Cluster: cluster, Standing: standing}
		e.Direct = e.Network == m.scope.Network
		switch {
		case grant.AllowsIdentity(r.Name.Namespace, e.ServiceAccount):
		case m.snapshot.LocalOnly(r):
			e.Mesh, e.ServiceAccount = false, ""
		default:
			note.ungranted(r, &e)
			continue
		}
		if !all {
			e.TargetPorts = only(e.TargetPorts, agreed)
		}
		if len(e.TargetPorts) == 0 && !portless {
			continue
		}
		if r.PublishNotReady {
			e.Health = Ready
		}
		if !e.Direct {
			e.Addresses, e.UID = nil, ""
		}
		if e.Mesh && e.ServiceAccount != "" && e.ServiceAccount != account {
			account = e.ServiceAccount
			svc.Accounts = append(svc.Accounts, "ns/"+r.Name.Namespace+"/sa/"+account)
		}
		svc.Endpoints = append(svc.Endpoints, e)
	}
}

// agreedPorts are the numbers on which the record speaks the service's protocol, and
// whether these are all of its ports. A gateway passes bytes, whatever they mean.
func (m *merger) agreedPorts(svc *Service, r *Record) (numbers []uint32, all bool) {
	for _, p := range r.Ports {
		if want, ok := svc.Port(p.Number); ok && (want.Protocol == p.Protocol || m.scope.Gateway) {
			numbers = append(numbers, p.Number)
		}
	}
	return numbers, len(numbers) == len(r.Ports)
}

func only(targets map[uint32]uint32, numbers []uint32) map[uint32]uint32 {
	out := make(map[uint32]uint32, len(numbers))
	for _, n := range numbers {
		if t, ok := targets[n]; ok {
			out[n] = t
		}
	}
	return out
}

// address gives the service what callers of the scope dial.
func (m *merger) address(svc *Service, lead *Record) {
	virtual := m.snapshot.Addresses[svc.Host]
	svc.virtual = virtual
	switch {
	case svc.Type == ExternalName:
	case svc.Own && svc.Type == Headless:
	case svc.Own && len(lead.ClusterIPs) > 0:
		svc.Addresses = lead.ClusterIPs
		svc.AlsoAt = virtual.Addrs()
	default:
		svc.Addresses = virtual.Addrs()
	}
}

// Addrs are the valid ones of both families, IPv4 first.
func (a VirtualAddress) Addrs() []netip.Addr {
	var out []netip.Addr
	for _, ip := range [...]netip.Addr{a.V4, a.V6} {
		if ip.IsValid() {
			out = append(out, ip)
		}
	}
	return out
}

// namePods gives every pod with a host name its name in the cluster set, and those of a
// headless service that exists only elsewhere the name that their StatefulSet promised.
func (m *merger) namePods(svc *Service, seen []*Record) {
	for _, r := range seen {
		id, kube := r.Source.Cluster()
		if !kube || r.Type != Headless {
			continue
		}
		agreed, _ := m.agreedPorts(svc, r)
		grant, _ := m.snapshot.GrantOf(r.Source)
		cluster := m.snapshot.Clusters[id].Name
		for i := range r.Endpoints {
			e := ServiceEndpoint{Endpoint: r.Endpoints[i], Source: r.Source, Cluster: id, Standing: m.standing(r.Source)}
			if !isLabel(e.Hostname) || !grant.AllowsIdentity(r.Name.Namespace, e.ServiceAccount) {
				continue
			}
			e.Direct = e.Network == m.scope.Network
			if !e.Direct {
				e.Addresses, e.UID = nil, ""
			}
			e.TargetPorts = only(e.TargetPorts, agreed)
			if r.PublishNotReady {
				e.Health = Ready
			}
			m.namePod(svc, e, cluster)
		}
	}
}

func (m *merger) namePod(svc *Service, e ServiceEndpoint, cluster string) {
	sni := podHost(e.Hostname, cluster, svc.Name)
	hosts := []string{sni}
	if !svc.Own {
		// Several clusters may have a db-0: the plain name is the oldest record's.
		hosts = []string{e.Hostname + "." + svc.Host, sni}
	}
	for _, host := range hosts {
		if slices.ContainsFunc(svc.Pods, func(p NamedPod) bool { return p.Host == host }) {
			continue
		}
		address := m.snapshot.Addresses[host]
		svc.Pods = append(svc.Pods, NamedPod{Host: host, SNIHost: sni, Address: address.Addrs(), Endpoint: e, virtual: address})
		if e.Mesh && e.ServiceAccount != "" {
			last := &svc.Pods[len(svc.Pods)-1]
			last.Account = "ns/" + svc.Name.Namespace + "/sa/" + e.ServiceAccount
		}
	}
}

// ClustersetDomain is the suffix of the Multi-Cluster Services names.
const ClustersetDomain = "clusterset.local"

func (n ServiceName) clustersetHost() string {
	return n.Name + "." + n.Namespace + ".svc." + ClustersetDomain
}

func sameSet(a, b []string) bool {
	if slices.Equal(a, b) {
		return true
	}
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// notes collects the findings of one service.
type notes struct {
	*merger
	object   string
	findings []Finding
}

func (n *notes) at(r *Record) string { return n.snapshot.SourceName(r.Source) }

func (n *notes) add(f Finding) {
	f.Object = n.object
	n.findings = append(n.findings, f)
}

func (n *notes) warn(code, format string, args ...any) {
	n.add(Finding{Code: code, Severity: SeverityWarning, Message: fmt.Sprintf(format, args...)})
}

func (n *notes) ungranted(r *Record, e *ServiceEndpoint) {
	n.warn(CodeOutsideGrant, "endpoints in %s with service account %q are outside the cluster's grant and left out; widen the grant, or use another account", n.at(r), r.Name.Namespace+"/"+e.ServiceAccount)
}

// outOfReach notes endpoints that other networks cannot call: a gateway passes mutual
// TLS only.
func (n *notes) outOfReach(svc *Service) {
	bare := map[Network]int{}
	for i := range svc.Endpoints {
		if e := &svc.Endpoints[i]; !e.Direct && !e.Mesh && e.Health == Ready {
			bare[e.Network]++
		}
	}
	for network, count := range bare {
		n.add(Finding{Code: CodeNoProxy, Severity: SeverityInfo, Message: fmt.Sprintf(
			"%d endpoints on network %s have no proxy of the mesh and are out of reach from network %s; inject the workloads", count, network, n.scope.Network)})
	}
}
