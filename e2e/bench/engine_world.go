// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"net/netip"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// engineWorld is the mesh that the engine's figures are measured in: services that stand in
// two clusters on two networks, and proxies of the first, which never run.
type engineWorld struct {
	Services int // each with 10 endpoints, half of them behind the other network's gateway
	Proxies  int
	Classes  int // namespaces that the proxies are in
	snapshot *federation.Snapshot
	history  *federation.History // as a store keeps it
	flapping federation.ServiceName
	other    map[federation.ServiceName][]*federation.Record // with flapping in its other state
}

const (
	engineNamespaces = 50
	engineEndpoints  = 5 // of a service in each cluster
)

// lone is the one proxy that sees the one service that nobody else does.
const lone = "lone"

func engineService(i int) federation.ServiceName {
	return federation.ServiceName{Namespace: fmt.Sprintf("team-%d", i%engineNamespaces), Name: fmt.Sprintf("svc-%d", i)}
}

var loneService = federation.ServiceName{Namespace: lone, Name: lone}

// build makes the first snapshot.
func (w *engineWorld) build() {
	w.history = &federation.History{}
	w.snapshot = &federation.Snapshot{
		Revision: 1,
		Clusters: map[federation.ClusterID]*federation.Cluster{
			"east": {ID: "east", Name: "east", Network: "n1", Role: federation.Primary},
			"west": {ID: "west", Name: "west", Network: "n2", Role: federation.Primary},
		},
		Records:   map[federation.ServiceName][]*federation.Record{},
		Workloads: map[federation.WorkloadKey]*federation.Workload{},
		Gateways: map[federation.Network][]*federation.Gateway{"n2": {{
			Source: "kube:west", Network: "n2", Name: "isthmus-system/isthmus-eastwestgateway", Ready: 1,
			Addresses: []federation.GatewayAddress{{Host: "198.18.0.9", Port: 15443}},
		}}},
	}
	for i := range w.Services {
		name := engineService(i)
		w.snapshot.Records[name] = []*federation.Record{w.record("kube:east", name, i), w.record("kube:west", name, i)}
	}
	private := w.record("kube:east", loneService, w.Services)
	private.ExportTo = []string{"."}
	w.snapshot.Records[loneService] = []*federation.Record{private}
	for i := range w.Proxies + 1 {
		load := w.proxy(i)
		w.snapshot.Workloads[federation.WorkloadKey{Source: load.Source, UID: load.UID}] = load
	}
	w.history.Append(w.snapshot, federation.Change{AnyService: true, AnyWorkload: true})
}

// proxy is the workload of a client; the last one is the lone one.
func (w *engineWorld) proxy(i int) *federation.Workload {
	namespace := fmt.Sprintf("app-%d", i%max(1, w.Classes))
	if i == w.Proxies {
		namespace = lone
	}
	return &federation.Workload{
		Source: "kube:east", Namespace: namespace, Name: fmt.Sprintf("app-%d", i), UID: fmt.Sprintf("uid-%d", i),
		Role: federation.Sidecar, ServiceAccount: "app", Network: "n1", Ready: true,
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)})},
	}
}

func (w *engineWorld) record(source federation.SourceID, name federation.ServiceName, i int) *federation.Record {
	r := &federation.Record{
		Source: source, Name: name, Type: federation.ClusterIP, Created: time.Unix(1, 0),
		Ports:      []federation.Port{{Number: 80, Name: "http", Protocol: federation.HTTP}},
		ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})},
	}
	network, second := federation.Network("n1"), byte(1)
	if source == "kube:west" {
		network, second = "n2", 2
	}
	for e := range engineEndpoints {
		n := i*engineEndpoints + e
		r.Endpoints = append(r.Endpoints, federation.Endpoint{
			Workload: fmt.Sprintf("%s-%d", name.Name, e), UID: fmt.Sprintf("%s-%s-%d", source, name.Name, e),
			Addresses:   []netip.Addr{netip.AddrFrom4([4]byte{10, second + byte(n>>16), byte(n >> 8), byte(n)})},
			TargetPorts: map[uint32]uint32{80: 8080}, Health: federation.Ready, Network: network, ServiceAccount: name.Name, Mesh: true,
			Locality: federation.Locality{Region: fmt.Sprintf("region-%d", e%2), Zone: fmt.Sprintf("zone-%d", e%4)},
		})
	}
	return r
}

// flap makes one endpoint of a service unready, or ready again. Both states of the service
// that flapped last are kept, so that flapping it on costs nothing but what comes after.
func (w *engineWorld) flap(name federation.ServiceName) *federation.Snapshot {
	if w.flapping != name {
		w.flapping, w.other = name, w.flapped(name)
	}
	next := *w.snapshot
	next.Revision++
	next.Records, w.other = w.other, next.Records
	w.history.Append(&next, federation.Change{Services: []federation.ServiceName{name}})
	w.snapshot = &next
	return w.snapshot
}

// flapped are the records with the first endpoint of a service in its other state.
func (w *engineWorld) flapped(name federation.ServiceName) map[federation.ServiceName][]*federation.Record {
	out := maps.Clone(w.snapshot.Records)
	records := append([]*federation.Record{}, out[name]...)
	changed := *records[0]
	changed.Endpoints = append([]federation.Endpoint{}, changed.Endpoints...)
	if e := &changed.Endpoints[0]; e.Health == federation.Ready {
		e.Health = federation.NotReady
	} else {
		e.Health = federation.Ready
	}
	records[0] = &changed
	out[name] = records
	return out
}
