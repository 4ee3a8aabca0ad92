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
	"bytes"
	"context"
	"fmt"
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
			t.print(os.Stdout)
			fmt.Println("interrupted: the rest did not run")
			return 1
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
	err = t.goTest(ctx, append([]string{"-p=1", "-timeout=40m"}, packages...)...)
	if stories := t.again(); err != nil && ctx.Err() == nil && len(stories) > 0 {
		return runAgain(ctx, t, stories)
	}
	return err
}

func packages(ctx context.Context, keep func(string) bool) ([]string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "./...").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	all := strings.Fields(string(out))
	return slices.DeleteFunc(all, func(p string) bool { return !keep(p) }), nil
}
