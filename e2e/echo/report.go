// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// report is what a series of calls came to.
type report struct {
	print, changes bool
	out            io.Writer

	mu        sync.Mutex
	answered  int
	failed    int
	clusters  map[string]int
	pods      map[string]int
	errors    map[string]int
	first     time.Time // when the first call failed
	last      time.Time
	latencies []time.Duration
	answerer  string // of the last call
}

func (r *report) add(a Answer, err error, start time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.clusters == nil {
		r.clusters, r.pods, r.errors = map[string]int{}, map[string]int{}, map[string]int{}
	}
	r.tellChange(a, err)
	if err != nil {
		r.failed++
		r.errors[err.Error()]++
		if r.first.IsZero() {
			r.first = start
		}
		r.last = time.Now()
		return
	}
	r.answered++
	r.clusters[a.Cluster]++
	r.pods[a.Cluster+"/"+a.Pod]++
	r.latencies = append(r.latencies, time.Since(start))
	if r.print {
		r.out.Write(a.line())
	}
}

// tellChange prints who answers from now on: cluster/pod, or nobody.
func (r *report) tellChange(a Answer, err error) {
	now := a.Cluster + "/" + a.Pod
	if err != nil {
		now = "nobody"
	}
	if r.changes && now != r.answerer {
		fmt.Fprintf(r.out, "%s %s\n", time.Now().Format(time.RFC3339Nano), now)
	}
	r.answerer = now
}

// summarise prints what a person wants to know, in lines that scripts can match.
func (r *report) summarise(out io.Writer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(out, "%d answers: %s\n", r.answered, tally(r.clusters))
	fmt.Fprintf(out, "pods: %s\n", tally(r.pods))
	fmt.Fprintf(out, "%d failed\n", r.failed)
	for _, text := range slices.Sorted(maps.Keys(r.errors)) {
		fmt.Fprintf(out, "  %d× %s\n", r.errors[text], text)
	}
	if r.failed > 0 {
		fmt.Fprintf(out, "  first at %s, last at %s\n", r.first.Format("15:04:05.000"), r.last.Format("15:04:05.000"))
	}
	if len(r.latencies) > 0 {
		slices.Sort(r.latencies)
		at := func(q float64) time.Duration {
			return r.latencies[int(q*float64(len(r.latencies)-1))].Round(10 * time.Microsecond)
		}
		fmt.Fprintf(out, "p50 %v, p99 %v, max %v\n", at(.5), at(.99), at(1))
	}
}

func tally(counts map[string]int) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		shown := name
		if shown == "" {
			shown = "?"
		}
		parts = append(parts, fmt.Sprintf("%s %d", shown, counts[name]))
	}
	return strings.Join(parts, ", ")
}
