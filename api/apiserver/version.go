// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"runtime"

	"github.com/isthmus-mesh/isthmus/api"
)

// GetVersion implements api.AdminServer.
func (s *Server) GetVersion(ctx context.Context, _ *api.GetVersionRequest) (*api.VersionReport, error) {
	out := &api.VersionReport{ApiVersion: api.Version, Kind: "VersionReport", Server: &api.ServerVersion{
		Version: s.cfg.Version, Commit: s.cfg.Commit, GoVersion: runtime.Version(), Replica: s.cfg.Replica,
		Started: stamp(s.cfg.Started), TrustDomain: s.cfg.Authority.Bundle().TrustDomain.Name(), Etcd: s.cfg.EtcdMode, Advertised: s.advertised(),
	}}
	proxies, agents := map[string]map[string]int32{}, map[string]map[string]int32{}
	for _, p := range s.proxies(ctx) {
		if proxies[p.GetCluster()] == nil {
			proxies[p.GetCluster()], agents[p.GetCluster()] = map[string]int32{}, map[string]int32{}
		}
		version := "unknown"
		if p.GetEnvoyVersion() != "" {
			version = "envoy " + p.GetEnvoyVersion()
		}
		proxies[p.GetCluster()][version]++
		agents[p.GetCluster()][cmp.Or(p.GetAgentVersion(), "unknown")]++
	}
	for _, c := range s.clusters(ctx) {
		name := c.GetMetadata().GetName()
		out.Members = append(out.Members, &api.MemberVersion{
			Cluster: name, Kubernetes: c.GetStatus().GetKubernetesVersion(), Proxies: proxies[name], Agents: agents[name],
		})
	}
	return out, nil
}
