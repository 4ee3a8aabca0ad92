// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type pipelineMetrics struct {
	builds   prometheus.Counter
	duration prometheus.Histogram
	woken    prometheus.Counter
	waits    prometheus.Histogram
	overdue  prometheus.Counter
	classes  *prometheus.Desc
}

func newPipelineMetrics() *pipelineMetrics {
	name := func(s string) prometheus.Opts {
		return prometheus.Opts{Namespace: "isthmus", Subsystem: "xds", Name: s}
	}
	builds, woken, overdue := name("class_builds_total"), name("streams_woken_total"), name("doors_overdue_total")
	builds.Help, woken.Help = "Computations of a proxy class.", "Streams that were woken because their resources changed."
	overdue.Help = "Services that callers or gateways were told of before the other side had acknowledged, because it did not within 2 s."
	return &pipelineMetrics{
		overdue: prometheus.NewCounter(prometheus.CounterOpts(overdue)),
		waits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "door_wait_seconds",
			Help:    "How long callers were not told of a service's first endpoints in a network, until its gateways had acknowledged them.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2},
		}),
		builds: prometheus.NewCounter(prometheus.CounterOpts(builds)),
		woken:  prometheus.NewCounter(prometheus.CounterOpts(woken)),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "xds", Name: "computation_seconds",
			Help:    "From a snapshot to the resources of all connected classes.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5},
		}),
		classes: prometheus.NewDesc("isthmus_xds_proxy_classes", "Proxy classes that are connected.", nil, nil),
	}
}

func (m *pipelineMetrics) computed(took time.Duration, woken int) {
	m.duration.Observe(took.Seconds())
	m.woken.Add(float64(woken))
}

func (m *pipelineMetrics) waited(waits []time.Duration, overdue int) {
	for _, w := range waits {
		m.waits.Observe(w.Seconds())
	}
	m.overdue.Add(float64(overdue))
}

// Describe implements prometheus.Collector.
func (p *Pipeline) Describe(ch chan<- *prometheus.Desc) {
	p.metrics.waits.Describe(ch)
	p.metrics.overdue.Describe(ch)
	p.metrics.builds.Describe(ch)
	p.metrics.woken.Describe(ch)
	p.metrics.duration.Describe(ch)
	ch <- p.metrics.classes
}

// Collect implements prometheus.Collector.
func (p *Pipeline) Collect(ch chan<- prometheus.Metric) {
	p.metrics.waits.Collect(ch)
	p.metrics.overdue.Collect(ch)
	p.metrics.builds.Collect(ch)
	p.metrics.woken.Collect(ch)
	p.metrics.duration.Collect(ch)
	n := 0
	p.mu.Lock()
	for _, s := range p.scopes {
		for _, r := range s.roles {
			n += len(r.classes)
		}
	}
	p.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(p.metrics.classes, prometheus.GaugeValue, float64(n))
}
