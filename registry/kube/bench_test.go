// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"fmt"
	"runtime"
	"testing"

	discoveryv1 "k8s.io/api/discovery/v1"
	k8sruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
)

func liveHeap() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

// BenchmarkCaches500x5 measures what a source keeps of a cluster with 500 services of five
// pods, with the level that it has offered. Every object is decoded as it comes by the
// wire: nothing is shared but what the source shares.
func BenchmarkCaches500x5(b *testing.B) {
	wire := protobuf.NewSerializer(typedScheme, typedScheme)
	decoded := func(o k8sruntime.Object) k8sruntime.Object {
		out, _, err := codecs.UniversalDeserializer().Decode([]byte(k8sruntime.EncodeOrDie(wire, o)), nil, nil)
		if err != nil {
			b.Fatal(err)
		}
		return out
	}
	for b.Loop() {
		before := liveHeap()
		c := member(b, Budget{})
		for i := range 500 {
			name, namespace := fmt.Sprint("service-", i), fmt.Sprint("team-", i%20)
			s := service(name, nil)
			s.Namespace, s.APIVersion, s.Kind, s.Labels = namespace, "v1", "Service", map[string]string{"app": name}
			c.services.Add(decoded(s))
			var endpoints []discoveryv1.Endpoint
			for e := range 5 {
				n := i*5 + e
				ip := fmt.Sprintf("10.0.%d.%d", n>>8, 1+n&127)
				p := runningPod(fmt.Sprintf("%s-7d9f8c6b5-%05d", name, e), ip)
				p.Namespace, p.APIVersion, p.Kind, p.UID = namespace, "v1", "Pod", types.UID(fmt.Sprintf("%08x-0000-4000-8000-%012x", i, e))
				p.Spec.NodeName, p.Spec.ServiceAccountName = fmt.Sprint("node-", n%50), name
				p.Labels = map[string]string{"app": name, "version": "v1", "pod-template-hash": "7d9f8c6b5", ProxyLabel: "sidecar"}
				c.pods.Add(decoded(p))
				end := at(p.Name, ip, "ready serving")
				end.TargetRef.UID, end.NodeName, end.Zone = p.UID, &p.Spec.NodeName, &namespace
				endpoints = append(endpoints, end)
			}
			l := slice(name+"-x1", name, 8080, endpoints...)
			l.Namespace, l.APIVersion, l.Kind, l.AddressType = namespace, "discovery.k8s.io/v1", "EndpointSlice", discoveryv1.AddressTypeIPv4
			c.slices.Add(decoded(l))
		}
		level, ok := c.level()
		if !ok || len(level.Workloads) != 2500 {
			b.Fatalf("%d workloads", len(level.Workloads))
		}
		b.ReportMetric(liveHeap()-before, "MiB")
		runtime.KeepAlive(c)
		runtime.KeepAlive(&level)
	}
}
