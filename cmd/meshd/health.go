// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// health is a list of things that must be well, asked one by one. Members are never among
// them: a control service whose members are all away is ready.
type health struct {
	mu     sync.Mutex
	checks []check
}

type check struct {
	name string
	ask  func() error
}

var errStarting = errors.New("starting")

// add puts a check at the end of the list; it may run from any goroutine.
func (h *health) add(name string, ask func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.checks = append(h.checks, check{name, ask})
}

func (h *health) list() []check {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.checks)
}

// ServeHTTP answers as a Kubernetes API server does: 200 "ok" or 500 with what fails;
// "?verbose" lists all, and a path below the handler's asks one check alone.
func (h *health) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	checks := h.list()
	_, one, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	verbose := r.URL.Query().Has("verbose")
	failed, found := false, one == ""
	var body strings.Builder
	for _, c := range checks {
		if one != "" && c.name != one {
			continue
		}
		found = true
		if err := c.ask(); err != nil {
			failed = true
			fmt.Fprintf(&body, "[-] %s failed: %v\n", c.name, err)
		} else if verbose {
			fmt.Fprintf(&body, "[+] %s ok\n", c.name)
		}
	}
	switch {
	case !found:
		http.NotFound(w, r)
		return
	case failed:
		w.WriteHeader(http.StatusInternalServerError)
	case !verbose:
		body.WriteString("ok\n")
	}
	fmt.Fprint(w, body.String())
}

// diagnostics is the plain handler: metrics, health, profiles.
func diagnostics(live, ready *health, metrics *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{Registry: metrics}))
	mux.Handle("GET /livez", live)
	mux.Handle("GET /livez/", live)
	mux.Handle("GET /readyz", ready)
	mux.Handle("GET /readyz/", ready)
	mux.Handle("GET /healthz", ready)
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}
