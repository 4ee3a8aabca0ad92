// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// ingestMetrics are shared by all ingests of a runner.
type ingestMetrics struct {
	offers       prometheus.Counter
	transactions prometheus.Counter
	bytes        prometheus.Counter
	failures     prometheus.Counter
	seconds      prometheus.Histogram
}

func newIngestMetrics() *ingestMetrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "isthmus", Subsystem: "ingest", Name: name, Help: help})
	}
	return &ingestMetrics{
		offers:       counter("offers_total", "Levels that sources have offered."),
		transactions: counter("transactions_total", "Transactions it took to store them."),
		bytes:        counter("written_bytes_total", "Keys and values it took to store them."),
		failures:     counter("failures_total", "Levels that could not be stored at the first attempt."),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "ingest", Name: "apply_seconds",
			Help:    "Time to compare a level with what is stored, and to store the difference.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9),
		}),
	}
}

func (m *ingestMetrics) count(w Written) {
	m.transactions.Add(float64(w.Transactions))
	m.bytes.Add(float64(w.Bytes))
}

func (m *ingestMetrics) collect(ch chan<- prometheus.Metric) {
	for _, c := range []prometheus.Collector{m.offers, m.transactions, m.bytes, m.failures, m.seconds} {
		c.Collect(ch)
	}
}

var (
	holdingDesc = prometheus.NewDesc("isthmus_source_syncing", "1 where this replica syncs the source.", []string{"source"}, nil)
	exposedDesc = prometheus.NewDesc("isthmus_source_from_memory", "1 where what the source says is shown without being stored, because the store does not take it.", []string{"source"}, nil)
	beaconDesc  = prometheus.NewDesc("isthmus_source_beacon_age_seconds", "Age of the youngest timestamp that came back from the source.", []string{"source"}, nil)
	lagDesc     = prometheus.NewDesc("isthmus_source_lag_seconds", "How long the last beacon travelled.", []string{"source"}, nil)
	findingDesc = prometheus.NewDesc("isthmus_source_findings", "Findings about the source's objects.", []string{"source"}, nil)
)

// Describe implements prometheus.Collector.
func (r *Runner) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(r, ch) }

// Collect implements prometheus.Collector.
func (r *Runner) Collect(ch chan<- prometheus.Metric) {
	r.metrics.collect(ch)
	for _, s := range r.Sources() {
		gauge := func(desc *prometheus.Desc, value float64) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, string(s.Source))
		}
		gauge(holdingDesc, truth(s.Holding))
		gauge(exposedDesc, truth(!s.Exposed.IsZero()))
		if !s.Watching {
			continue
		}
		gauge(findingDesc, float64(len(s.Findings)))
		if !s.Status.Beacon.IsZero() {
			gauge(beaconDesc, time.Since(s.Status.Beacon).Seconds())
			gauge(lagDesc, s.Status.Lag.Seconds())
		}
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
