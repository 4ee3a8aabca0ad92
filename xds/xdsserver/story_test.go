// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"net/netip"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

const (
	clientIP  = "10.1.0.2"
	nearIP    = "10.1.0.3"
	gatewayIP = "172.16.0.3"
	virtualIP = "240.240.0.5"
)

var shopPorts = []federation.Port{
	{Number: 80, Name: "http", Protocol: federation.HTTP},
	{Number: 81, Name: "grpc", Protocol: federation.GRPC},
	{Number: 82, Protocol: federation.Unknown},
	{Number: 83, Name: "tcp", Protocol: federation.TCP},
	{Number: 84, Protocol: federation.Unknown},
	{Number: 443, Name: "tls", Protocol: federation.TLS},
}

// targets of the ports: HTTP, server-first and TLS.
var shopTargets = map[uint32]uint32{80: 8080, 81: 8081, 82: 8082, 83: 9000, 84: 9001, 443: 8443}

func workload(source federation.SourceID, name, network, ip string, role federation.ProxyRole) *federation.Workload {
	return &federation.Workload{
		Source: source, Namespace: "shop", Name: name, UID: "uid-" + name, Role: role, ServiceAccount: name,
		Network: federation.Network(network), Addresses: []netip.Addr{netip.MustParseAddr(ip)}, Ready: true,
	}
}

func endpoint(w *federation.Workload) federation.Endpoint {
	return federation.Endpoint{
		Workload: w.Name, UID: w.UID, Addresses: w.Addresses, TargetPorts: shopTargets, Health: federation.Ready,
		Network: w.Network, ServiceAccount: w.ServiceAccount, Mesh: true,
	}
}

func record(source federation.SourceID, endpoints ...federation.Endpoint) *federation.Record {
	return &federation.Record{
		Source: source, Name: federation.ServiceName{Namespace: "shop", Name: "pay"}, Type: federation.ClusterIP,
		Created: time.Unix(1, 0), Ports: shopPorts, Endpoints: endpoints,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.9")},
	}
}

func snapshotOf(loads []*federation.Workload, records ...*federation.Record) *federation.Snapshot {
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
			Addresses: []federation.GatewayAddress{{Host: gatewayIP, Port: 15443}},
		}}},
		Addresses: map[string]federation.VirtualAddress{
			"pay.shop.svc.cluster.local": {Host: "pay.shop.svc.cluster.local", V4: netip.MustParseAddr(virtualIP)},
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

func generators() map[federation.ProxyRole]func(xdsserver.Weigh) xdsserver.Generator {
	sidecar := func(w xdsserver.Weigh) xdsserver.Generator { return &xds.Builder{Weigh: w} }
	return map[federation.ProxyRole]func(xdsserver.Weigh) xdsserver.Generator{
		federation.Sidecar: sidecar, federation.VMRole: sidecar,
	}
}
