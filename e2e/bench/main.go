// SPDX-License-Identifier: Apache-2.0

// Command bench measures the figures of docs/performance.md on this machine: real meshd,
// real API servers and etcd, real Envoys. It prints one line of JSON a figure, and on
// standard error what it does and what machine this is.
//
//	bench [FIGURE ...]
//
// It judges nothing: what a figure should be stands beside it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/kubelet"
	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// scene is a mesh on which some figures are measured.
type scene struct {
	name    string
	figures []figure
	atMost  time.Duration
	play    func(ctx context.Context, b *bench) error
	bare    bool // needs no test bed
}

// figure is one number of the table.
type figure struct {
	name, unit string
	target     float64 // at most; 0 if it is only reported, none if it should be 0
}

// none is the target of what should not be at all.
const none = -1

func scenes() []scene {
	return []scene{
		{"fleet", []figure{
			{"memory-1000x10-mib", "MiB", 150}, {"etcd-bytes-per-change", "bytes", 8192},
			{"etcd-txn-per-change", "transactions", 1}, {"ready-members-dead-s", "s", 3},
		}, 4 * time.Minute, playFleet, false},
		{"clusters", []figure{{"memory-per-cluster-mib", "MiB", 10}}, 4 * time.Minute, playClusters, false},
		{"flat", []figure{{"propagation-p50-ms", "ms", 30}, {"propagation-p99-ms", "ms", 100}}, 3 * time.Minute, playFlat, false},
		{"gateway", []figure{{"gateway-hop-p99-ms", "ms", 0}}, 4 * time.Minute, playGateway, false},
		{"engine", []figure{
			{"flap-vs-grpc", "ratio", 1.25}, {"flap-vs-floor", "ratio", 2.6}, {"allocs-per-push", "allocations", none},
			{"unconcerned-us", "µs", 150}, {"cold-cpu-ms-per-proxy", "ms", 3}, {"memory-kb-per-proxy", "KiB", 64},
		}, 10 * time.Minute, playEngine, true},
		{"reconnect", []figure{{"reconnect-cpu-ms-per-proxy", "ms", 1.5}, {"reconnect-last-s", "s", 30}}, 2 * time.Minute, playReconnect, true},
		{"growth", []figure{{"flap-growth-services", "ratio", 1.1}}, 3 * time.Minute, playGrowth, true},
		{"linear", []figure{{"flap-vs-linearcache-100", "ratio", .25}, {"flap-vs-linearcache-500", "ratio", .067}}, 2 * time.Minute, playLinear, true},
		{"slow", []figure{{"slow-readers-p99-ratio", "ratio", 1.2}}, 2 * time.Minute, playSlow, true},
		{"churn", []figure{{"churn-cpu-s", "s", 2.5}, {"churn-p99-ms", "ms", 250}}, 2 * time.Minute, playChurn, true},
		{"authority", []figure{
			{"issue-vs-bare", "ratio", 1.33}, {"issue-grpc-vs-bare", "ratio", 1.8}, {"issue-connect-vs-sum", "ratio", 1.35},
			{"etcd-writes-per-leaf", "writes", none},
		}, 4 * time.Minute, playAuthority, true},
	}
}

func main() {
	if role := os.Getenv(subjectRole); role != "" {
		if err := serveSubject(role); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", role, err)
			os.Exit(1)
		}
		return
	}
	kubelet.Shim()
	if dir := os.Getenv(authoritySwitch); dir != "" {
		if err := authorityProcess(dir); err != nil {
			fmt.Fprintln(os.Stderr, "bench: authority:", err)
			os.Exit(1)
		}
		return
	}
	flag.Usage = usage
	keep := flag.String("keep-logs", "", "folder for the logs of all processes")
	proxies := flag.Int("proxies", 2000, "how many proxies the engine's figures are measured with")
	flag.Parse()
	b := &bench{wanted: flag.Args(), keepLogs: *keep, proxies: *proxies}
	if unknown := b.unknown(); unknown != "" {
		fmt.Fprintf(os.Stderr, "bench: there is no figure %q\n", unknown)
		usage()
		os.Exit(2)
	}
	if b.bare() {
		os.Exit(b.Run())
	}
	remove, err := stage.BuildPrograms(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	code := bed.Inside(b).Run()
	remove()
	os.Exit(code)
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: bench [-keep-logs DIR] [-proxies N] [FIGURE ...]\n\nfigures:")
	for _, s := range scenes() {
		for _, f := range s.figures {
			fmt.Fprintf(os.Stderr, "  %s (%s)\n", f.name, f.unit)
		}
	}
}

// bench plays the scenes of the figures that are wanted.
type bench struct {
	wanted   []string // empty means all
	keepLogs string
	proxies  int
	start    time.Time
}

// bare tells that nothing that is wanted needs a test bed.
func (b *bench) bare() bool {
	return len(b.wanted) > 0 && !slices.ContainsFunc(scenes(), func(s scene) bool { return !s.bare && slices.ContainsFunc(b.wanted, s.has) })
}

func (b *bench) unknown() string {
	for _, name := range b.wanted {
		if !slices.ContainsFunc(scenes(), func(s scene) bool { return s.has(name) }) {
			return name
		}
	}
	return ""
}

func (s scene) has(name string) bool {
	return slices.ContainsFunc(s.figures, func(f figure) bool { return f.name == name })
}

// Run is what is done inside the bed; it returns the exit code.
func (b *bench) Run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b.start = time.Now()
	b.say("machine: %s", machine())
	code := 0
	for _, s := range scenes() {
		if len(b.wanted) > 0 && !slices.ContainsFunc(b.wanted, s.has) || ctx.Err() != nil {
			continue
		}
		b.say("%s: at most %v; load average %.1f", s.name, s.atMost, loadAverage())
		if loadAverage() > float64(runtime.NumCPU()) {
			b.say("something else keeps this machine busy: times will be longer than they need be")
		}
		limited, cancel := context.WithTimeout(ctx, s.atMost)
		if err := s.play(limited, b); err != nil {
			b.say("%s: %v", s.name, err)
			code = 1
		}
		cancel()
	}
	return code
}

// stage sets up an empty stage, and plays on it.
func (b *bench) stage(play func(*stage.Stage) error) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	s, err := stage.New(stage.Config{Log: log, KeepLogs: b.keepLogs})
	if err != nil {
		return err
	}
	err = play(s)
	if left := s.Close(); left != nil {
		b.say("left on the stage: %v", left)
	}
	return err
}

// say tells what happens.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%7.1fs  %s\n", time.Since(b.start).Seconds(), fmt.Sprintf(format, args...))
}

// report prints a figure, if it is wanted.
func (b *bench) report(name string, value float64, note string, args ...any) {
	if len(b.wanted) > 0 && !slices.Contains(b.wanted, name) {
		return
	}
	for _, s := range scenes() {
		for _, f := range s.figures {
			if f.name != name {
				continue
			}
			line := struct {
				Bench  string   `json:"bench"`
				Value  float64  `json:"value"`
				Unit   string   `json:"unit"`
				Target *float64 `json:"target"`
				Note   string   `json:"note"`
			}{Bench: name, Value: round(value), Unit: f.unit, Note: fmt.Sprintf(note, args...)}
			if f.target == none {
				f.target, line.Target = 0, &f.target
			} else if f.target > 0 {
				line.Target = &f.target
			}
			if err := json.NewEncoder(os.Stdout).Encode(line); err != nil {
				b.say("%s: %v", name, err)
			}
		}
	}
}

// round keeps three digits, and whole numbers as they are.
func round(v float64) float64 {
	scale := 1.0
	for math.Abs(v)*scale < 100 && scale < 1000 {
		scale *= 10
	}
	return math.Round(v*scale) / scale
}

// machine describes what the figures were measured on.
func machine() string {
	read := func(path, key string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			return "?"
		}
		for line := range strings.Lines(string(text)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
				return strings.TrimSpace(v)
			}
		}
		return "?"
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%s, %s, %s of memory, Linux %s", processors(), read("/proc/cpuinfo", "model name"),
		read("/proc/meminfo", "MemTotal"), strings.TrimSpace(string(kernel)))
}

// loadAverage of the last minute; 0 if unknown.
func loadAverage() float64 {
	var load float64
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Sscan(string(text), &load)
	}
	return load
}
