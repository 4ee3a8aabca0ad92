// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// large is a level of so many services with ten endpoints each, every one a workload.
func large(source federation.SourceID, services int) *registry.Level {
	level := &registry.Level{Records: map[federation.ServiceName]*federation.Record{}, Workloads: map[string]*federation.Workload{}}
	for i := range services {
		r := registrytest.Record(source, fmt.Sprintf("ns-%d", i%50), fmt.Sprintf("service-%d", i), 10)
		level.Records[r.Name] = r
		for e := range r.Endpoints {
			p := &r.Endpoints[e]
			p.UID = fmt.Sprintf("%08d-0000-4000-8000-%012d", i, e)
			level.Workloads[p.UID] = &federation.Workload{Source: source, Namespace: r.Name.Namespace, Name: p.Workload, UID: p.UID, Role: federation.Sidecar,
				ServiceAccount: p.ServiceAccount, Network: p.Network, Locality: p.Locality, Addresses: p.Addresses, Labels: p.Labels}
		}
	}
	return level
}

func heap() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

// BenchmarkStore1000x10 measures what 1,000 services of ten endpoints cost: memory in this
// process with the embedded etcd, the first write, one endpoint's change until it is in a
// snapshot, and loading after a restart.
func BenchmarkStore1000x10(b *testing.B) {
	dir := b.TempDir()
	db, err := etcd.Open(b.Context(), etcd.DatabaseConfig{DataDir: dir})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	store := newStore(b, etcd.StoreConfig{Client: db.Client(), Sole: true})
	m := registrytest.Member(b, "uid-1", "east")
	if _, err := store.Join(b.Context(), m, registrytest.Token("t"), false); err != nil {
		b.Fatal(err)
	}
	empty := heap()
	session, err := store.Begin(b.Context(), m.Source())
	if err != nil {
		b.Fatal(err)
	}
	level := large(m.Source(), 1000)
	began := time.Now()
	written, err := session.Apply(b.Context(), level)
	if err != nil {
		b.Fatal(err)
	}
	first := time.Since(began)
	registrytest.Eventually(b, store, "all is there", func(s *federation.Snapshot) bool { return len(s.Records) == 1000 && len(s.Workloads) == 10000 })
	full := heap()
	began = time.Now()
	newStore(b, etcd.StoreConfig{Client: db.Client()})
	load := time.Since(began)

	name := federation.ServiceName{Namespace: "ns-7", Name: "service-7"}
	b.ResetTimer()
	for i := range b.N {
		changed := registrytest.Change(level.Records[name], 3, func(e *federation.Endpoint) { e.Hostname = fmt.Sprint("h", i) })
		level.Records[name] = changed
		if written, err = session.Apply(b.Context(), level); err != nil {
			b.Fatal(err)
		}
		registrytest.Eventually(b, store, "it is seen", func(s *federation.Snapshot) bool {
			return s.Records[name][0].Endpoints[3].Hostname == fmt.Sprint("h", i)
		})
	}
	b.ReportMetric(full-empty, "MiB")
	b.ReportMetric(float64(first.Milliseconds()), "first-ms")
	b.ReportMetric(float64(load.Milliseconds()), "load-ms")
	b.ReportMetric(float64(written.Bytes), "bytes/change")
	b.ReportMetric(float64(written.Transactions), "txn/change")
}
