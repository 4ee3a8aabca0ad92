// SPDX-License-Identifier: Apache-2.0

// Command suite runs everything that must be green, phase by phase, and ends with how
// many tests ran, passed, failed and were skipped, and why.
//
//	go run ./e2e/suite          all phases
//	go run ./e2e/suite unit     only the phases named
//
// A phase that fails does not keep the later ones from running; the exit code is 1 if any
// did. The phases: format, vet, staticcheck, unit (with the race detector), e2e.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// phase is one thing that must be green.
type phase struct {
	name  string
	run   func(ctx context.Context, t *tally) error
	about string
}

var phases = []phase{
	{"format", format, "gofmt finds nothing to change"},
	{"vet", command("go", "vet", "./..."), "go vet"},
	{"staticcheck", command("go", "tool", "staticcheck", "./..."), "staticcheck"},
	{"unit", unit, "every room's own tests and the house rules, with the race detector"},
	{"e2e", endToEnd, "the test bed and the scripts, on real Kubernetes, etcd and Envoy"},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, only []string) int {
	var failed []string
	t := &tally{}
	for _, p := range phases {
		if len(only) > 0 && !slices.Contains(only, p.name) {
			continue
		}
		fmt.Printf("== %s: %s\n", p.name, p.about)
		start := time.Now()
		err := p.run(ctx, t)
		verdict := "ok"
		if err != nil {
			verdict = "FAILED: " + err.Error()
			failed = append(failed, p.name)
		}
		fmt.Printf("== %s: %s (%s)\n\n", p.name, verdict, time.Since(start).Round(time.Second))
		if ctx.Err() != nil {
			break
		}
	}
	t.print(os.Stdout)
	if len(failed) > 0 {
		fmt.Printf("phases that failed: %s\n", strings.Join(failed, ", "))
		return 1
	}
	return 0
}

func command(name string, args ...string) func(context.Context, *tally) error {
	return func(ctx context.Context, _ *tally) error {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	}
}

func format(ctx context.Context, _ *tally) error {
	out, err := exec.CommandContext(ctx, "gofmt", "-l", ".").Output()
	if err == nil && len(bytes.TrimSpace(out)) > 0 {
		err = fmt.Errorf("run make fmt; not formatted:\n%s", out)
	}
	return err
}

func unit(ctx context.Context, t *tally) error {
	packages, err := packages(ctx, func(p string) bool { return !strings.Contains(p, "/e2e") })
	if err != nil {
		return err
	}
	return t.goTest(ctx, append([]string{"-race", "-timeout=15m"}, packages...)...)
}

func endToEnd(ctx context.Context, t *tally) error {
	packages, err := packages(ctx, func(p string) bool { return strings.Contains(p, "/e2e") })
	if err != nil {
		return err
	}
	// One package at a time: two worlds of clusters fill this size of machine.
	return t.goTest(ctx, append([]string{"-p=1", "-timeout=40m"}, packages...)...)
}

func packages(ctx context.Context, keep func(string) bool) ([]string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "./...").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	all := strings.Fields(string(out))
	return slices.DeleteFunc(all, func(p string) bool { return !keep(p) }), nil
}

// tally counts tests over all phases. Only leaves count: a test that has subtests is the
// sum of them.
type tally struct {
	passed, failed int
	failures       []string
	skipped        []string // "package test: reason"
}

// event is a line of "go test -json" (go doc test2json).
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

func (t *tally) goTest(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute // tests remove what they made
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	t.read(out)
	return cmd.Wait()
}

func (t *tally) read(r io.Reader) {
	output := map[string][]string{} // of tests still running, by package and test
	parents := map[string]bool{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Println(lines.Text()) // a build error, say
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "run":
			if i := strings.LastIndex(e.Test, "/"); i >= 0 {
				parents[e.Package+" "+e.Test[:i]] = true
			}
		case "output", "build-output":
			if e.Action == "build-output" {
				fmt.Print(e.Output)
			}
			output[key] = append(output[key], e.Output)
		case "pass", "fail", "skip":
			t.end(e, output[key], parents[key])
			delete(output, key)
		}
	}
}

func (t *tally) end(e event, output []string, parent bool) {
	name := strings.TrimPrefix(e.Package, "github.com/isthmus-mesh/isthmus/")
	if e.Test == "" {
		if e.Action != "skip" { // a package without tests
			fmt.Printf("%-5s %s (%.1fs)\n", e.Action, name, e.Elapsed)
		}
		if e.Action == "fail" {
			fmt.Print(strings.Join(output, ""))
		}
		return
	}
	switch {
	case e.Action == "fail":
		fmt.Printf("--- FAIL %s %s\n%s", name, e.Test, strings.Join(output, ""))
		if !parent {
			t.failed++
			t.failures = append(t.failures, name+" "+e.Test)
		}
	case parent:
	case e.Action == "skip":
		t.skipped = append(t.skipped, name+" "+e.Test+": "+reason(output))
	default:
		t.passed++
	}
}

// reason is what a skipped test said last before its verdict.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "---") && !strings.HasPrefix(line, "===") {
			return line
		}
	}
	return "no reason given"
}

func (t *tally) print(w io.Writer) {
	for _, s := range t.skipped {
		fmt.Fprintln(w, "skipped:", s)
	}
	for _, f := range t.failures {
		fmt.Fprintln(w, "failed:", f)
	}
	fmt.Fprintf(w, "%d tests ran\n", t.passed+t.failed+len(t.skipped))
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", t.passed, t.failed, len(t.skipped))
}
