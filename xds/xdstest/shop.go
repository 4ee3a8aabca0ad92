// SPDX-License-Identifier: Apache-2.0

// Package xdstest is the small world that tests of xDS play in: a shop in two clusters,
// east on network n1 and west on n2, which has a gateway.
package xdstest

import (
	"maps"
	"net/netip"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Addresses of that world.
const (
	ClientIP  = "10.1.0.2"
	NearIP    = "10.1.0.3"
	GatewayIP = "172.16.0.3"
	VirtualIP = "240.240.0.5" // of pay
)

// Pay is the service that is sold.
var Pay = federation.ServiceName{Namespace: "shop", Name: "pay"}

// Ports of pay.
func Ports() []federation.Port {
	return []federation.Port{
		{Number: 80, Name: "http", Protocol: federation.HTTP},
		{Number: 81, Name: "grpc", Protocol: federation.GRPC},
		{Number: 82, Protocol: federation.Unknown},
		{Number: 83, Name: "tcp", Protocol: federation.TCP},
		{Number: 84, Protocol: federation.Unknown},
		{Number: 443, Name: "tls", Protocol: federation.TLS},
	}
}

// targets of the ports: HTTP, server-first and TLS.
func targets() map[uint32]uint32 {
	return map[uint32]uint32{80: 8080, 81: 8081, 82: 8082, 83: 9000, 84: 9001, 443: 8443}
}

// Workload is a ready one in namespace shop; its name is also its service account.
func Workload(source federation.SourceID, name, network, ip string, role federation.ProxyRole) *federation.Workload {
	return &federation.Workload{
		Source: source, Namespace: "shop", Name: name, UID: "uid-" + name, Role: role, ServiceAccount: name,
		Network: federation.Network(network), Addresses: []netip.Addr{netip.MustParseAddr(ip)}, Ready: true,
	}
}

// Endpoint is a workload as a ready endpoint of pay.
func Endpoint(w *federation.Workload) federation.Endpoint {
	return federation.Endpoint{
		Workload: w.Name, UID: w.UID, Addresses: w.Addresses, TargetPorts: targets(), Health: federation.Ready,
		Network: w.Network, ServiceAccount: w.ServiceAccount, Mesh: true,
	}
}

// Record is pay as a source reports it.
func Record(source federation.SourceID, endpoints ...federation.Endpoint) *federation.Record {
	return &federation.Record{
		Source: source, Name: Pay, Type: federation.ClusterIP,
		Created: time.Unix(1, 0), Ports: Ports(), Endpoints: endpoints,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.9")},
	}
}

// Snapshot is the world with some workloads and records, at revision 1.
func Snapshot(loads []*federation.Workload, records ...*federation.Record) *federation.Snapshot {
	s := &federation.Snapshot{
		Revision: 1,
		Clusters: map[federation.ClusterID]*federation.Cluster{
			"east": {ID: "east", Name: "east", Network: "n1", Role: federation.Primary},
			"west": {ID: "west", Name: "west", Network: "n2", Role: federation.Primary},
		},
		Records:   map[federation.ServiceName][]*federation.Record{},
		Workloads: map[federation.WorkloadKey]*federation.Workload{},
		Gateways: map[federation.Network][]*federation.Gateway{"n2": {{
			Source: "kube:west", Network: "n2", Name: "isthmus-system/isthmus-eastwestgateway", Ready: 1,
			Addresses: []federation.GatewayAddress{{Host: GatewayIP, Port: 15443}},
		}}},
		Addresses: map[string]federation.VirtualAddress{
			Pay.Host(): {Host: Pay.Host(), V4: netip.MustParseAddr(VirtualIP)},
		},
	}
	for _, r := range records {
		s.Records[r.Name] = append(s.Records[r.Name], r)
	}
	for _, w := range loads {
		s.Workloads[federation.WorkloadKey{Source: w.Source, UID: w.UID}] = w
	}
	return s
}

// Later is a copy at the next revision, whose records and workloads may be changed.
func Later(s *federation.Snapshot) *federation.Snapshot {
	out := *s
	out.Revision++
	out.Records, out.Workloads = maps.Clone(s.Records), maps.Clone(s.Workloads)
	return &out
}
