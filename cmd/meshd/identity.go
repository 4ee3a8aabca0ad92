// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// members answers the authority's questions about clusters, VMs and their workloads from
// the store, which answers from memory.
type members struct{ store registry.Store }

var (
	_ ca.Grants        = members{}
	_ attest.Clusters  = members{}
	_ attest.Workloads = members{}
)

// Keys implements attest.Clusters.
func (m members) Keys(context.Context) ([]attest.ClusterKeys, error) {
	var keys []attest.ClusterKeys
	for id, member := range m.store.Members() {
		if len(member.IssuerKeys) == 0 {
			continue
		}
		keys = append(keys, attest.ClusterKeys{
			ClusterID: string(id), Name: member.Name, Issuer: member.Issuer,
			JWKS: member.IssuerKeys, IstioAudience: member.AllowIstioCA,
		})
	}
	return keys, nil
}

// Allows implements ca.Grants: a cluster hosts what its grant says, a VM network the
// accounts of its registrations.
func (m members) Allows(source ca.Source, namespace, serviceAccount string) error {
	id := federation.SourceID(source)
	if cluster, ok := id.Cluster(); ok {
		member, joined := m.store.Members()[cluster]
		if !joined {
			return fmt.Errorf("cluster %s has not joined", cluster)
		}
		if !member.Grant.AllowsIdentity(namespace, serviceAccount) {
			return fmt.Errorf("cluster %s may not host %s/%s: widen its grant by: mesh join cluster %s --grant", member.Name, namespace, serviceAccount, member.Name)
		}
		return nil
	}
	if network, ok := id.VMNetwork(); ok {
		for name, vm := range m.store.VMs() {
			if name.Network == network && vm.Service.Namespace == namespace && vm.ServiceAccount == serviceAccount {
				return nil
			}
		}
		return fmt.Errorf("no machine of network %s is registered with account %s/%s", network, namespace, serviceAccount)
	}
	return fmt.Errorf("source %s hosts no workloads", source)
}

// Workload implements attest.Workloads.
func (m members) Workload(_ context.Context, source ca.Source, instance string) (attest.Workload, error) {
	id := federation.SourceID(source)
	if network, ok := id.VMNetwork(); ok {
		vm, registered := m.store.VMs()[registry.VMName{Network: network, Name: instance}]
		if !registered {
			return attest.Workload{Presence: attest.Deleted}, nil
		}
		return attest.Workload{Presence: attest.Known, Namespace: vm.Service.Namespace, ServiceAccount: vm.ServiceAccount}, nil
	}
	snapshot, _ := m.store.Snapshot()
	if w, ok := snapshot.Workloads[federation.WorkloadKey{Source: id, UID: instance}]; ok {
		return attest.Workload{Presence: attest.Known, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}, nil
	}
	cluster, _ := id.Cluster()
	for _, condition := range []string{federation.Reachable, federation.Synced} {
		if !m.holds(cluster, condition) {
			return attest.Workload{Presence: attest.Away}, nil
		}
	}
	return attest.Workload{Presence: attest.Unknown}, nil
}

// holds tells whether a condition of a cluster is true.
func (m members) holds(cluster federation.ClusterID, condition string) bool {
	member, ok := m.store.Members()[cluster]
	if !ok {
		return false
	}
	for _, c := range member.Conditions {
		if c.Type == condition {
			return c.Status
		}
	}
	return false
}
