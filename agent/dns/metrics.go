// SPDX-License-Identifier: Apache-2.0

package dns

import "github.com/prometheus/client_golang/prometheus"

// Metrics count queries by who answered.
type Metrics struct {
	queries *prometheus.CounterVec
}

// NewMetrics registers the set.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{queries: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "isthmus_agent_dns_queries_total",
		Help: "DNS queries by result: mesh, forwarded, failed, malformed, dropped.",
	}, []string{"result"})}
	r.MustRegister(m.queries)
	return m
}

func (m *Metrics) count(result string) {
	if m != nil {
		m.queries.WithLabelValues(result).Inc()
	}
}
