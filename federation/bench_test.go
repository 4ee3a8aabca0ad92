// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/federation"
)

// fleet is two clusters on two networks with n services of m endpoints each, all in both.
func fleet(n, m int) *Snapshot {
	s := &Snapshot{
		Clusters: map[ClusterID]*Cluster{
			"east": {ID: "east", Name: "east", Network: "n1"}, "west": {ID: "west", Name: "west", Network: "n2"},
		},
		Records: map[ServiceName][]*Record{},
		Gateways: map[Network][]*Gateway{"n2": {{
			Source: KubeSource("west"), Network: "n2", Ready: 2,
			Addresses: []GatewayAddress{{Host: "203.0.113.1", Port: 15443}, {Host: "203.0.113.2", Port: 15443}},
		}}},
	}
	for i := range n {
		name := ServiceName{Namespace: fmt.Sprint("ns-", i%50), Name: fmt.Sprint("svc-", i)}
		for _, c := range s.Clusters {
			r := &Record{
				Source: KubeSource(c.ID), Name: name, Type: ClusterIP, Created: time.Unix(1, 0),
				Ports: []Port{{Number: 80, Protocol: HTTP, Name: "http"}, {Number: 90, Protocol: GRPC, Name: "grpc"}},
			}
			for j := range m / 2 {
				r.Endpoints = append(r.Endpoints, Endpoint{
					Workload: fmt.Sprint(name.Name, "-", j), Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(j), byte(i >> 8), byte(i)})},
					TargetPorts: map[uint32]uint32{80: 8080, 90: 9090}, Health: Ready, Network: c.Network,
					Locality: Locality{Region: "eu", Zone: "eu-1"}, ServiceAccount: "default", Mesh: true,
				})
			}
			s.Records[name] = append(s.Records[name], r)
		}
	}
	return s
}

func BenchmarkView(b *testing.B) {
	s := fleet(1000, 10)
	b.ReportAllocs()
	for b.Loop() {
		s.View(eastSees)
	}
}

// BenchmarkViewFrom is one endpoint's change among 1,000 services of 10.
func BenchmarkViewFrom(b *testing.B) {
	s := fleet(1000, 10)
	v := s.View(eastSees)
	name := v.Services[500].Name
	changed := *s
	changed.Records = maps.Clone(s.Records)
	r := *s.Records[name][0]
	changed.Records[name] = []*Record{&r, s.Records[name][1]}
	b.ReportAllocs()
	for b.Loop() {
		changed.ViewFrom(v, eastSees)
	}
}

func BenchmarkGroups(b *testing.B) {
	s := fleet(1000, 10)
	v := s.View(eastSees)
	b.ReportAllocs()
	for b.Loop() {
		for _, svc := range v.Services {
			v.Groups(svc, 80, nil)
		}
	}
}
