// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// metrics count what the store costs etcd.
type metrics struct {
	transactions prometheus.Counter
	operations   prometheus.Counter
	bytes        prometheus.Counter
	failures     prometheus.Counter
	events       prometheus.Counter
}

func newMetrics() metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "isthmus", Subsystem: "store", Name: name, Help: help})
	}
	return metrics{
		transactions: counter("transactions_total", "Transactions committed to etcd."),
		operations:   counter("operations_total", "Operations of these transactions."),
		bytes:        counter("written_bytes_total", "Keys and values written by these transactions."),
		failures:     counter("transaction_failures_total", "Attempts of transactions that etcd did not answer."),
		events:       counter("watch_events_total", "Changes received from etcd."),
	}
}

func (m *metrics) count(ops []clientv3.Op, succeeded bool) {
	if !succeeded {
		return
	}
	m.transactions.Inc()
	m.operations.Add(float64(len(ops)))
	m.bytes.Add(float64(opsSize(ops)))
}

func opsSize(ops []clientv3.Op) int {
	size := 0
	for _, op := range ops {
		size += len(op.KeyBytes()) + len(op.ValueBytes())
	}
	return size
}

var (
	quarantinedDesc = prometheus.NewDesc("isthmus_store_quarantined", "Values that could not be understood.", nil, nil)
	degradedDesc    = prometheus.NewDesc("isthmus_store_degraded", "1 while etcd does not answer.", nil, nil)
	readOnlyDesc    = prometheus.NewDesc("isthmus_store_read_only", "1 while nothing is written, because a newer meshd has.", nil, nil)
	sizeDesc        = prometheus.NewDesc("isthmus_store_size_bytes", "Size of the database.", nil, nil)
	inUseDesc       = prometheus.NewDesc("isthmus_store_used_bytes", "How much of the database is in use.", nil, nil)
	quotaDesc       = prometheus.NewDesc("isthmus_store_quota_bytes", "What the database may grow to.", nil, nil)
	revisionDesc    = prometheus.NewDesc("isthmus_store_revision", "Revision of etcd that this replica has seen.", nil, nil)
)

// Describe implements prometheus.Collector.
func (s *Store) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(s, ch) }

// Collect implements prometheus.Collector.
func (s *Store) Collect(ch chan<- prometheus.Metric) {
	for _, c := range []prometheus.Counter{s.metrics.transactions, s.metrics.operations, s.metrics.bytes, s.metrics.failures, s.metrics.events} {
		c.Collect(ch)
	}
	h := s.Health()
	for desc, value := range map[*prometheus.Desc]float64{
		quarantinedDesc: float64(len(h.Quarantined)), degradedDesc: truth(h.Degraded), readOnlyDesc: truth(h.ReadOnly != ""),
		sizeDesc: float64(h.Size), inUseDesc: float64(h.InUse), quotaDesc: float64(h.Quota), revisionDesc: float64(h.Revision),
	} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
