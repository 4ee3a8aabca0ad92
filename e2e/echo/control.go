// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// control is how a server is told to misbehave, and how it tells what it did:
//
//	POST /control/unready, /control/ready     readiness on /ready, while it still answers
//	POST /control/delay?ms=100                before every answer
//	POST /control/fail?n=5  or  ?share=0.1    answer 503: the next n, or a share
//	GET  /count                               requests and connections by protocol
//	POST /control/recount                     count from zero
//	GET  /status/418, /delay?ms=50            for one request
type control struct {
	unready  atomic.Bool
	delay    atomic.Int64 // ms
	failNext atomic.Int64

	mu     sync.Mutex
	share  float64
	counts map[string]int
}

func (c *control) count(protocol string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = map[string]int{}
	}
	c.counts[protocol]++
}

// failing decides about one request.
func (c *control) failing() bool {
	if c.failNext.Load() > 0 && c.failNext.Add(-1) >= 0 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.share > 0 && rand.Float64() < c.share
}

// pause waits as long as requests are told to.
func (c *control) pause(r *http.Request) {
	d := time.Duration(c.delay.Load()) * time.Millisecond
	if ms, err := strconv.Atoi(r.URL.Query().Get("ms")); err == nil && r.URL.Path == "/delay" {
		d += time.Duration(ms) * time.Millisecond
	}
	if d > 0 {
		select {
		case <-time.After(d):
		case <-r.Context().Done():
		}
	}
}

// handle adds the control's own paths.
func (c *control) handle(mux *http.ServeMux) {
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if c.unready.Load() {
			http.Error(w, "told to be unready", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("POST /control/unready", func(http.ResponseWriter, *http.Request) { c.unready.Store(true) })
	mux.HandleFunc("POST /control/ready", func(http.ResponseWriter, *http.Request) { c.unready.Store(false) })
	mux.HandleFunc("POST /control/delay", func(w http.ResponseWriter, r *http.Request) {
		ms, err := strconv.ParseInt(r.URL.Query().Get("ms"), 10, 64)
		if err != nil || ms < 0 {
			http.Error(w, "ms: want a number of milliseconds", http.StatusBadRequest)
			return
		}
		c.delay.Store(ms)
	})
	mux.HandleFunc("POST /control/fail", c.setFailing)
	mux.HandleFunc("POST /control/recount", func(http.ResponseWriter, *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		clear(c.counts)
	})
	mux.HandleFunc("GET /count", func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, protocol := range []string{"http", "grpc", "ws", "tcp", "first", "tls"} {
			fmt.Fprintf(w, "%s %d\n", protocol, c.counts[protocol])
		}
	})
}

func (c *control) setFailing(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if n, err := strconv.ParseInt(q.Get("n"), 10, 64); err == nil {
		c.failNext.Store(n)
		return
	}
	share, err := strconv.ParseFloat(q.Get("share"), 64)
	if err != nil || share < 0 || share > 1 {
		http.Error(w, "want n=COUNT, or share=0..1", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.share = share
}
