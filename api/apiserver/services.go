// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
)

// ListServices implements api.AdminServer.
func (s *Server) ListServices(ctx context.Context, req *api.ListServicesRequest) (*api.ServiceList, error) {
	look, err := s.look(ctx, req.GetCluster())
	if err != nil {
		return nil, err
	}
	out := &api.ServiceList{ApiVersion: api.Version, Kind: "ServiceList"}
	findings := s.snapshotFindings(look.snapshot)
	for name, records := range look.snapshot.Records {
		if !matches(name, req.GetNamespace(), req.GetName()) || !slices.ContainsFunc(records, look.wanted) {
			continue
		}
		out.Items = append(out.Items, look.service(name, records, findings.byService[name]))
	}
	if len(out.Items) == 0 && req.GetName() != "" {
		return nil, look.unknownService(req.GetNamespace(), req.GetName())
	}
	slices.SortFunc(out.Items, func(a, b *api.Service) int {
		return compareNames(a.GetMetadata().GetNamespace(), a.GetMetadata().GetName(), b.GetMetadata().GetNamespace(), b.GetMetadata().GetName())
	})
	return out, nil
}

func matches(n federation.ServiceName, namespace, name string) bool {
	return (namespace == "" || n.Namespace == namespace) && (name == "" || n.Name == name)
}

func compareNames(namespace1, name1, namespace2, name2 string) int {
	return cmp.Or(cmp.Compare(namespace1, namespace2), cmp.Compare(name1, name2))
}

// look is one look at a snapshot, possibly at one cluster only.
type look struct {
	snapshot *federation.Snapshot
	source   federation.SourceID // empty: all
	stale    map[federation.SourceID]time.Time
}

// look finds the cluster, or VM network, that a list is restricted to.
func (s *Server) look(ctx context.Context, cluster string) (*look, error) {
	snapshot, _ := s.cfg.Store.Snapshot()
	l := &look{snapshot: snapshot, stale: s.staleSince(ctx)}
	switch {
	case cluster == "":
	case strings.HasPrefix(cluster, "vm:"):
		l.source = federation.SourceID(cluster)
	default:
		m, err := s.member(cluster)
		if err != nil {
			return nil, err
		}
		l.source = m.Source()
	}
	return l, nil
}

// staleSince tells since when the sources have been silent that are.
func (s *Server) staleSince(ctx context.Context) map[federation.SourceID]time.Time {
	out := map[federation.SourceID]time.Time{}
	for _, c := range s.clusters(ctx) {
		for _, condition := range c.GetStatus().GetConditions() {
			if condition.GetType() == federation.Reachable && condition.GetStatus() == "False" {
				out[federation.KubeSource(federation.ClusterID(c.GetMetadata().GetUid()))] = condition.GetLastTransition().AsTime()
			}
		}
	}
	return out
}

func (l *look) wanted(r *federation.Record) bool { return l.source == "" || r.Source == l.source }

func (l *look) unknownService(namespace, name string) error {
	var names []string
	for n := range l.snapshot.Records {
		names = append(names, n.String())
	}
	full := name
	if namespace != "" {
		full = namespace + "/" + name
	}
	return unknown("service", full, names, "mesh services")
}

func (l *look) service(name federation.ServiceName, records []*federation.Record, findings []*api.Finding) *api.Service {
	out := &api.Service{
		ApiVersion: api.Version, Kind: "Service",
		Metadata: &api.Metadata{Name: name.Name, Namespace: name.Namespace, Created: stamp(records[0].Created)},
		Host:     name.Host(), Findings: findings,
	}
	numbers := map[uint32]bool{}
	for _, r := range records {
		out.Records = append(out.Records, l.record(r))
		for _, p := range r.Ports { // of the oldest record that has it
			if !numbers[p.Number] {
				numbers[p.Number] = true
				out.Ports = append(out.Ports, portOut(p))
			}
		}
	}
	slices.SortFunc(out.Ports, func(a, b *api.Port) int { return cmp.Compare(a.GetNumber(), b.GetNumber()) })
	if virtual, ok := l.snapshot.Addresses[name.Host()]; ok && virtual.Released.IsZero() {
		out.Addresses = addressTexts(virtual.Addrs())
	}
	return out
}

func (l *look) record(r *federation.Record) *api.Record {
	out := &api.Record{
		Source: string(r.Source), Cluster: l.snapshot.SourceName(r.Source), Endpoints: int32(len(r.Endpoints)),
		Type: string(r.Type), Exported: !l.snapshot.LocalOnly(r), Addresses: addressTexts(r.ClusterIPs),
		StaleSince: stamp(l.stale[r.Source]),
	}
	if _, vm := r.Source.VMNetwork(); vm {
		out.Type = "VM"
	}
	for _, p := range r.Ports {
		out.Ports = append(out.Ports, portOut(p))
	}
	for i := range r.Endpoints {
		if r.Endpoints[i].Health == federation.Ready {
			out.Ready++
		}
	}
	return out
}

func portOut(p federation.Port) *api.Port {
	return &api.Port{Number: p.Number, Name: p.Name, Protocol: string(p.Protocol)}
}

func addressTexts(addresses []netip.Addr) []string {
	var out []string
	for _, a := range addresses {
		out = append(out, a.String())
	}
	return out
}

// ListEndpoints implements api.AdminServer.
func (s *Server) ListEndpoints(ctx context.Context, req *api.ListEndpointsRequest) (*api.EndpointList, error) {
	look, err := s.look(ctx, req.GetCluster())
	if err != nil {
		return nil, err
	}
	out := &api.EndpointList{ApiVersion: api.Version, Kind: "EndpointList"}
	found := false
	for name, records := range look.snapshot.Records {
		if !matches(name, req.GetNamespace(), req.GetService()) {
			continue
		}
		found = true
		for _, r := range records {
			if look.wanted(r) {
				out.Items = append(out.Items, look.endpoints(r)...)
			}
		}
	}
	if !found && req.GetService() != "" {
		return nil, look.unknownService(req.GetNamespace(), req.GetService())
	}
	slices.SortFunc(out.Items, func(a, b *api.Endpoint) int {
		return cmp.Or(compareNames(a.GetNamespace(), a.GetService(), b.GetNamespace(), b.GetService()),
			cmp.Compare(a.GetCluster(), b.GetCluster()), cmp.Compare(a.GetInstance(), b.GetInstance()),
			slices.Compare(a.GetAddresses(), b.GetAddresses()))
	})
	return out, nil
}

func (l *look) endpoints(r *federation.Record) []*api.Endpoint {
	out := make([]*api.Endpoint, 0, len(r.Endpoints))
	for i := range r.Endpoints {
		e := &r.Endpoints[i]
		one := &api.Endpoint{
			Namespace: r.Name.Namespace, Service: r.Name.Name, Source: string(r.Source), Cluster: l.snapshot.SourceName(r.Source),
			Network: string(e.Network), Addresses: addressTexts(e.Addresses), State: string(e.Health), Instance: e.Workload,
			ServiceAccount: e.ServiceAccount, StaleSince: stamp(l.stale[r.Source]), Mesh: e.Mesh,
			Locality: strings.TrimRight(e.Locality.Region+"/"+e.Locality.Zone+"/"+e.Locality.Subzone, "/"),
		}
		for _, target := range e.TargetPorts {
			if !slices.Contains(one.Ports, target) {
				one.Ports = append(one.Ports, target)
			}
		}
		slices.Sort(one.Ports)
		out = append(out, one)
	}
	return out
}
