// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/agent/health"
	"github.com/isthmus-mesh/isthmus/agent/redirect"
)

var (
	errNotConfigured = errors.New("envoy has no configuration from meshd yet")
	errNotConnected  = errors.New("no discovery stream to meshd yet")
	errNoNames       = errors.New("no name table from meshd yet")
)

// newStatus puts together what readiness means: traffic sent here now would be
// served. A meshd that went away later does not make a proxy unready.
func (a *Agent) newStatus(probes map[string]health.Probe) *health.Server {
	conditions := []health.Condition{
		{Name: "certificate", Check: func(context.Context) error { _, err := a.keeper.Current(); return err }},
		{Name: "configuration", Check: a.configured},
		{Name: "envoy", Check: a.process.Ready},
	}
	if a.names != nil {
		conditions = append(conditions, health.Condition{Name: "names", Check: func(context.Context) error {
			if _, received := a.names.Names(); !received {
				return errNoNames
			}
			return nil
		}})
	}
	failures := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "isthmus_agent_scrape_failures_total",
		Help: "Scrapes for the merged metrics that failed, by what was scraped.",
	}, []string{"of"})
	a.metrics.MustRegister(failures)
	return &health.Server{
		Conditions: conditions,
		Probes:     probes,
		Prober:     a.prober(),
		Stats: &health.Stats{
			Envoy:    "http://" + a.config.adminAddress() + "/stats/prometheus?usedonly",
			Workload: a.config.WorkloadMetrics,
			Client:   &http.Client{Transport: &http.Transport{DialContext: inside, MaxIdleConns: 2, IdleConnTimeout: time.Minute}},
			Agent:    a.metrics,
			Failures: failures,
			Log:      a.log,
		},
	}
}

func (a *Agent) configured(context.Context) error {
	switch {
	case a.relay.Configured():
		return nil
	case a.relay.Connected():
		return errNotConfigured
	}
	return errNotConnected
}

// prober asks the workload itself, as Envoy's inbound side does.
func (a *Agent) prober() *health.Prober {
	return &health.Prober{Address: a.config.Addresses[0], Dial: inside}
}

// inside dials the workload from the address that redirection lets through to
// it. IPv6 has none and needs none.
func inside(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := redirect.Dialer(dialTimeout)
	if host, _, err := net.SplitHostPort(address); err == nil {
		if a, err := netip.ParseAddr(host); err == nil && a.Unmap().Is4() {
			dialer.LocalAddr = &net.TCPAddr{IP: redirect.Inside.AsSlice()}
		}
	}
	return dialer.DialContext(ctx, network, address)
}

// register adds the agent's own metrics.
func (a *Agent) register() {
	gauge := func(name, help string, value func() float64) {
		a.metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("isthmus_agent_certificate_expiry_timestamp_seconds", "When the workload certificate expires; 0 while there is none.", func() float64 {
		cert, err := a.keeper.Current()
		if err != nil {
			return 0
		}
		return float64(cert.Leaf.NotAfter.Unix())
	})
	gauge("isthmus_agent_connected", "1 while the discovery stream to meshd is open.", func() float64 {
		if a.relay.Connected() {
			return 1
		}
		return 0
	})
	gauge("isthmus_agent_configuration_remembered", "1 while Envoy has the configuration of an earlier run, because no meshd answers.", func() float64 {
		if a.relay.FromMemory() {
			return 1
		}
		return 0
	})
	a.metrics.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "isthmus_agent_envoy_restarts_total",
		Help: "Times that Envoy died by itself and was started again.",
	}, func() float64 { return float64(a.process.Restarts()) }))
	if a.names != nil {
		gauge("isthmus_agent_dns_names", "Hosts in the name table.", func() float64 {
			n, _ := a.names.Names()
			return float64(n)
		})
	}
}
