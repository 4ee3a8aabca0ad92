// SPDX-License-Identifier: Apache-2.0

package federation

import "net/netip"

// Scope says whose view: the proxies of one cluster on one network. Proxies of VMs have
// no cluster: their scope's Cluster is empty.
type Scope struct {
	Cluster ClusterID
	Network Network
}

// View is what the proxies of one scope should see. It is immutable and a pure function
// of a Snapshot and a Scope.
type View struct {
	Scope    Scope
	Revision Revision
	Services []*Service // ordered by name
	Findings []Finding  // conflicts met while merging, for the services of this view

	// Gateways are the ways into every other network, ready ones only, addresses with
	// host names as they are.
	Gateways map[Network][]GatewayAddress
}

// Group is the hops of one priority and locality to the endpoints of a service's port.
type Group struct {
	Priority uint32 // 0 first; without gaps
	Locality Locality
	Network  Network
	Hops     []Hop
}

// Hop is one address to send to: an endpoint of the own network, or a gateway.
type Hop struct {
	Host    string // IP address; DNS names only for gateways that have nothing else
	Port    uint32
	Weight  uint32 // at least 1
	Gateway bool   // speaks for a whole network, chosen by SNI
	Mesh    bool   // expects mutual TLS; always true for gateways

	// Of direct endpoints only.
	Health   Health
	Workload string
	Hostname string
	Labels   map[string]string
}

// Service is a merged service as one scope sees it.
type Service struct {
	Name  ServiceName
	Host  string
	Type  ServiceType
	Ports []Port

	// Addresses a caller of this scope dials: the ClusterIPs of its own cluster's record,
	// else the virtual address. Empty for a headless service of the own cluster.
	Addresses []netip.Addr

	// Aliases are further host names with the same meaning (…svc.clusterset.local).
	Aliases []string

	ExternalName string
	ExportTo     []string
	Labels       map[string]string

	// Own tells that the scope's cluster itself has a record of this service.
	Own bool

	// Endpoints that may get traffic, own network and others. Endpoints of other networks
	// carry no addresses here: only what is needed to weigh and select them.
	Endpoints []ServiceEndpoint

	// Accounts are the SPIFFE paths "ns/<namespace>/sa/<account>" that may answer, of all
	// records that contribute endpoints, ordered.
	Accounts []string

	// Pods are the named pods of a headless service that exists only elsewhere, or of
	// clusterset names: each has an address and an SNI of its own.
	Pods []NamedPod
}

// ServiceEndpoint is an endpoint with where it came from.
type ServiceEndpoint struct {
	Endpoint
	Source  SourceID
	Cluster ClusterID // empty for VMs

	// Direct tells that it is on the scope's own network; otherwise it is reached through
	// the gateways of its network.
	Direct bool
}

// NamedPod is one pod of a headless service under a name of its own.
type NamedPod struct {
	Host     string       // db-0.db.ns.svc.cluster.local, or db-0.<cluster>.db.ns.svc.clusterset.local
	Address  []netip.Addr // virtual
	Endpoint ServiceEndpoint
}

// Finding is something a person should know, with a stable code.
type Finding struct {
	Code     string // MESH2203, …
	Severity string // "error", "warning"
	Object   string // kind namespace/name @ source
	Message  string // names field, value, and what would be right
}
