// SPDX-License-Identifier: Apache-2.0

package federation

// Revision orders snapshots. It is etcd's revision where the store is etcd.
type Revision int64

// Snapshot is the immutable whole of what all sources reported, at one revision.
// Its maps and slices are shared: nobody changes them.
type Snapshot struct {
	Revision Revision

	Clusters map[ClusterID]*Cluster

	// Records by service, each list ordered oldest first (then by source).
	Records map[ServiceName][]*Record

	// Workloads by source and UID.
	Workloads map[WorkloadKey]*Workload

	// Gateways by network, ordered by source and name.
	Gateways map[Network][]*Gateway

	// Objects of configuration, ordered by kind, namespace, name, creation, source.
	Objects []*Object

	// Addresses are the virtual addresses by host name.
	Addresses map[string]VirtualAddress

	// Standing of the sources that are not fresh (see StalePolicy). It is not stored:
	// ages live in memory, and a snapshot is taken anew when one crosses a limit.
	Standing map[SourceID]Standing

	place place // in the history of its maker, if it has one
}

// WorkloadKey is how a credential names a workload.
type WorkloadKey struct {
	Source SourceID
	UID    string
}
