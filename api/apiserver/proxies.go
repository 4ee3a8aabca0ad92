// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// ListProxies implements api.AdminServer.
func (s *Server) ListProxies(ctx context.Context, req *api.ListProxiesRequest) (*api.ProxyList, error) {
	cluster := req.GetCluster()
	if cluster != "" {
		m, err := s.member(cluster)
		if err != nil {
			return nil, err
		}
		cluster = m.Name
	}
	all := s.proxies(ctx)
	out := &api.ProxyList{ApiVersion: api.Version, Kind: "ProxyList"}
	var names []string
	for _, p := range all {
		names = append(names, p.GetMetadata().GetName())
		switch {
		case cluster != "" && p.GetCluster() != cluster,
			req.GetNamespace() != "" && p.GetMetadata().GetNamespace() != req.GetNamespace(),
			req.GetName() != "" && p.GetMetadata().GetName() != req.GetName() && p.GetNode() != req.GetName(),
			req.GetTroubled() && !troubled(p):
			continue
		}
		out.Items = append(out.Items, p)
	}
	if len(out.Items) == 0 && req.GetName() != "" {
		return nil, unknown("proxy", req.GetName(), names, "mesh proxies")
	}
	return out, nil
}

func troubled(p *api.Proxy) bool {
	return !p.GetSynced() || slices.ContainsFunc(p.GetTypes(), func(t *api.ProxyType) bool { return t.GetState() != "synced" })
}

// proxies are those connected to any replica, by cluster, namespace and name.
func (s *Server) proxies(ctx context.Context) []*api.Proxy {
	var out []*api.Proxy
	if s.cfg.Proxies != nil {
		snapshot, _ := s.cfg.Store.Snapshot()
		for _, status := range s.cfg.Proxies.Proxies() {
			out = append(out, s.proxy(snapshot, status))
		}
	}
	if s.cfg.Peers != nil && !callerOf(ctx).peer() {
		out = append(out, s.cfg.Peers.Proxies(ctx)...)
	}
	slices.SortFunc(out, func(a, b *api.Proxy) int {
		return cmp.Or(cmp.Compare(a.GetCluster(), b.GetCluster()),
			compareNames(a.GetMetadata().GetNamespace(), a.GetMetadata().GetName(), b.GetMetadata().GetNamespace(), b.GetMetadata().GetName()),
			cmp.Compare(a.GetReplica(), b.GetReplica()))
	})
	return out
}

func (s *Server) proxy(snapshot *federation.Snapshot, status xdsserver.ProxyStatus) *api.Proxy {
	p := status.Proxy
	out := &api.Proxy{
		ApiVersion: api.Version, Kind: "Proxy",
		Metadata: &api.Metadata{Name: p.Name, Namespace: p.Namespace, Uid: p.Workload.UID},
		Node:     status.Node, Cluster: snapshot.SourceName(p.Workload.Source), Network: string(p.Network), Role: string(p.Role),
		Identity:  fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", s.cfg.Authority.Bundle().TrustDomain.Name(), p.Namespace, p.ServiceAccount),
		Connected: stamp(status.Connected), Replica: s.cfg.Replica, Synced: status.Synced, BehindSince: stamp(status.Behind),
		AgentVersion: status.AgentVersion, EnvoyVersion: status.EnvoyVersion, CertificateExpires: stamp(status.CertificateExpires),
	}
	for _, t := range status.Types {
		one := &api.ProxyType{
			Type: shortType(t.TypeURL), Version: t.Version, Acked: stamp(t.Acked), Resources: int32(t.Resources), State: "synced",
		}
		if t.Pending {
			one.State = "pending"
		}
		if n := len(t.Refused); n > 0 {
			last := t.Refused[n-1]
			one.State, one.Since = "rejected", stamp(last.At)
			one.Error = strings.Join(last.Resources, ", ") + ": " + last.Message
		}
		out.Types = append(out.Types, one)
	}
	return out
}

// shortType is how people call a type of resources.
func shortType(typeURL string) string {
	name := typeURL[strings.LastIndexByte(typeURL, '.')+1:]
	for _, t := range []struct{ long, short string }{
		{"Listener", "LDS"}, {"RouteConfiguration", "RDS"}, {"Cluster", "CDS"},
		{"ClusterLoadAssignment", "EDS"}, {"Secret", "SDS"}, {"NameTable", "NDS"},
	} {
		if name == t.long {
			return t.short
		}
	}
	return name
}
