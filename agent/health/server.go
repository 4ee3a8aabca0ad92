// SPDX-License-Identifier: Apache-2.0

// Package health answers for the workload: whether its proxy is ready, whether
// the workload itself is (for the kubelet, which has no mesh identity and could
// not ask a workload that insists on one), and what all three measure.
package health

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// ReadyPath answers 200 while traffic may be sent here.
	ReadyPath = "/healthz/ready"
	// StatsPath has the metrics of Envoy, agent and workload in one.
	StatsPath = "/stats/prometheus"
	// ProbePrefix is what rewritten probes of the workload begin with.
	ProbePrefix = "/app-health/"
)

// errDraining is what readiness says once the end was asked for.
var errDraining = errors.New("draining: the workload is being stopped")

// Condition is one thing that must hold for readiness.
type Condition struct {
	// Name in the answer, for example "envoy".
	Name string
	// Check returns nil if it holds, else why not.
	Check func(ctx context.Context) error
}

// Server answers on the status ports. Fields must not change once it serves.
type Server struct {
	// Conditions are checked in order at each request.
	Conditions []Condition
	// Probes are the workload's own, by path below ProbePrefix, for example
	// "web/readyz".
	Probes map[string]Probe
	// Prober sends them; required if there are any.
	Prober *Prober
	// Stats merges metrics; nil answers 404.
	Stats *Stats

	draining atomic.Bool
}

// Drain makes readiness fail from now on.
func (s *Server) Drain() { s.draining.Store(true) }

// Handler serves everything.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+ReadyPath, s.ready)
	mux.HandleFunc("GET "+ProbePrefix, s.probe)
	if s.Stats != nil {
		mux.Handle("GET "+StatsPath, s.Stats)
	}
	return mux
}

// ReadyHandler serves readiness alone.
func (s *Server) ReadyHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+ReadyPath, s.ready)
	return mux
}

// Ready returns nil if all conditions hold, else all that do not.
func (s *Server) Ready(ctx context.Context) error {
	if s.draining.Load() {
		return errDraining
	}
	var failed []error
	for _, c := range s.Conditions {
		if err := c.Check(ctx); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", c.Name, err))
		}
	}
	return errors.Join(failed...)
}

func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
	defer cancel()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if err := s.Ready(ctx); err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, "not ready\n%s\n", err)
		return
	}
	fmt.Fprintln(w, "ready")
}

func (s *Server) probe(w http.ResponseWriter, r *http.Request) {
	probe, ok := s.Probes[strings.TrimPrefix(r.URL.Path, ProbePrefix)]
	if !ok {
		http.Error(w, "no such probe", http.StatusNotFound)
		return
	}
	s.answer(w, r, probe)
}
