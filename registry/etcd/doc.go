// SPDX-License-Identifier: Apache-2.0

// Package etcd is the registry.Store on etcd, embedded or external.
//
// Keys, below a configurable prefix; every value is JSON with its schema version "v":
//
//	clusters/<uid>                        a registry.Member
//	clusters/<uid>/conditions             transitions of its conditions
//	clusters/<uid>/credentials            its credentials, sealed under this very key
//	names/<name>                          UID of the cluster of that name
//	issuer-keys/<thumbprint>              UID of the cluster that signs with that key
//	records/<source>/<ns>/<service>       head of a record: all but its endpoints
//	records/<source>/<ns>/<service>/<n>   a slice of its endpoints, tables interned
//	workloads/<source>/<bundle>           some workloads of the source
//	gateways/<network>/<source>/<name>    a federation.Gateway
//	config/<source>/<kind>/<ns>/<name>    a federation.Object
//	addresses/by-host/<host>              a federation.VirtualAddress
//	addresses/by-ip/<address>             the host that has it
//	vms/<network>/<name>                  a registered VM
//	vms/<network>/<name>/health           what it reported last
//	vms/<network>/<name>/present          there while some replica hears of it
//	sessions/<source>                     who syncs the source: the fence
//	settled/<source>                      which session has stored a whole level of the source
//	replicas/<name>                       a Replica, there while it lives
//	changes/<time>                        why endpoints came and went
//
// Parts of keys are percent-encoded where they contain a slash.
//
// The fence: a session is a key with a lease. Every transaction of a session compares the
// create revision of that key, so that a replica that was paused, and comes back after
// another one took over, writes nothing.
//
// Generations: a head and its slices carry the same generation, and a slice of another
// generation is invisible. A change that fits into one transaction keeps the generation; a
// larger one writes its slices under the next generation first and becomes visible, as a
// whole, with its head.
//
// Reads are answered from a replica in memory that one watch keeps up to date. It is the
// newest state this process knows, whether or not etcd can be reached now. What a source
// says while it cannot be stored takes the place of what is stored of it (see
// Store.Expose), in this process alone.
package etcd
