// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/isthmus-mesh/isthmus/xds"
)

// BenchmarkServiceAdded shows what each proxy is sent when a service is added to 1,000, on
// both networks, five endpoints on each: bytes by type, in the envelope of an incremental
// response; and what making them costs.
func BenchmarkServiceAdded(b *testing.B) {
	w := newWorld()
	add := func(i int) {
		for c, cluster := range []string{"east", "west"} {
			r := w.add(cluster, fmt.Sprintf("svc-%d", i), http80, "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6")
			r.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96 + byte(c), byte(i / 250), byte(i%250 + 1)})}
		}
	}
	for i := range 1000 {
		add(i)
	}
	scope := client.Scope()
	old := w.View(scope)
	add(1000)
	next := w.View(scope)
	builder := &xds.Builder{}
	sent := map[string]int{}
	for b.Loop() {
		before, _ := builder.Build(old, nil, client)
		after, _ := builder.Build(next, nil, client)
		clear(sent)
		for typeURL, list := range after {
			for _, r := range list {
				if had, ok := before.Get(typeURL, r.Name); !ok || had.Version != r.Version {
					sent[typeURL] += len(r.Fragment(typeURL))
				}
			}
		}
	}
	total := 0
	for name, typeURL := range map[string]string{
		"clusters": xds.ClusterType, "endpoints": xds.EndpointType, "listeners": xds.ListenerType, "routes": xds.RouteType, "names": xds.NameTableType,
	} {
		b.ReportMetric(float64(sent[typeURL]), name+"-B")
		total += sent[typeURL]
	}
	b.ReportMetric(float64(total), "B")
}
