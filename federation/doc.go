// SPDX-License-Identifier: Apache-2.0

// Package federation holds the nouns of the mesh and the pure computation on them.
//
// Data flows one way:
//
//	source ─► Record, Workload ─► store ─► Snapshot ─► View ─► xds, gateways
//
// A source (a joined cluster, the VMs of a network) reports Records: one service as
// that source sees it, with its endpoints. A Snapshot is the immutable whole of what all
// sources reported at one revision. Services of the same namespace and name are one
// service (namespace sameness); a View is what the proxies of one cluster on one network
// should see of it: endpoints of their own network as they are, every other network
// represented by its east-west gateways (split horizon).
//
// An address means something only together with its network. No View holds a pod
// address of another network or a ClusterIP of another cluster.
//
// Nothing in this package does I/O, starts a goroutine, or knows Kubernetes, etcd or Envoy.
package federation
