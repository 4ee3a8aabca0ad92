// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	responses, resources, removals, bytes, nacks *prometheus.CounterVec
	refused                                      prometheus.Counter
	converged                                    prometheus.Histogram
	streams                                      *prometheus.Desc
	behind                                       *prometheus.Desc

	known sync.Map // type URL to its *typeCounters
}

// typeCounters are the counters of one type.
type typeCounters struct{ responses, resources, removals, bytes prometheus.Counter }

func (m *metrics) of(typeURL string) *typeCounters {
	if known, ok := m.known.Load(typeURL); ok {
		return known.(*typeCounters)
	}
	t := kind(typeURL)
	made, _ := m.known.LoadOrStore(typeURL, &typeCounters{
		m.responses.WithLabelValues(t), m.resources.WithLabelValues(t), m.removals.WithLabelValues(t), m.bytes.WithLabelValues(t),
	})
	return made.(*typeCounters)
}

func newMetrics() *metrics {
	byType := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "isthmus", Subsystem: "xds", Name: name, Help: help}, []string{"type"})
	}
	return &metrics{
		responses: byType("responses_total", "Responses sent to proxies."),
		resources: byType("resources_sent_total", "Resources sent to proxies."),
		removals:  byType("removals_sent_total", "Removals of resources sent to proxies."),
		bytes:     byType("resource_bytes_sent_total", "Bytes of resources sent to proxies."),
		nacks:     byType("refusals_total", "Responses that a proxy did not accept."),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "streams_refused_total",
			Help: "Streams refused for their credential, or because their workload is not known.",
		}),
		converged: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "convergence_seconds",
			Help:    "From the first response of a change to a proxy's last acknowledgement.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30},
		}),
		streams: prometheus.NewDesc("isthmus_xds_streams", "Connected proxies.", []string{"role", "variant"}, nil),
		behind:  prometheus.NewDesc("isthmus_xds_streams_behind", "Connected proxies that have not acknowledged all they were sent.", nil, nil),
	}
}

func (m *metrics) sent(r *response) {
	c := m.of(r.typeURL)
	c.responses.Inc()
	c.resources.Add(float64(len(r.resources)))
	c.removals.Add(float64(len(r.removed)))
	c.bytes.Add(float64(r.size))
}

// Describe implements prometheus.Collector.
func (s *Server) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range s.metrics.collectors() {
		c.Describe(ch)
	}
	ch <- s.metrics.streams
	ch <- s.metrics.behind
}

// Collect implements prometheus.Collector.
func (s *Server) Collect(ch chan<- prometheus.Metric) {
	for _, c := range s.metrics.collectors() {
		c.Collect(ch)
	}
	counts := map[[2]string]int{}
	behind := 0
	for _, st := range s.list() {
		variant := "delta"
		if st.wire.sotw() {
			variant = "sotw"
		}
		st.mu.Lock()
		counts[[2]string{string(st.frame.Proxy.Role), variant}]++
		if !st.behind.IsZero() {
			behind++
		}
		st.mu.Unlock()
	}
	for k, n := range counts {
		ch <- prometheus.MustNewConstMetric(s.metrics.streams, prometheus.GaugeValue, float64(n), k[0], k[1])
	}
	ch <- prometheus.MustNewConstMetric(s.metrics.behind, prometheus.GaugeValue, float64(behind))
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.responses, m.resources, m.removals, m.bytes, m.nacks, m.refused, m.converged}
}
