// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// tally counts tests over all phases. Only leaves count: a test that has subtests is the
// sum of them.
type tally struct {
	passed   int
	failures []failure
	skipped  []string // "package test: reason"
	flaky    []failure
}

// failure is a test that failed.
type failure struct {
	name     string // of the package below the module
	test     string
	panicked bool // what would have run after it did not
}

func (f failure) String() string { return f.name + " " + f.test }

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
			panicked := slices.ContainsFunc(output, func(line string) bool { return strings.HasPrefix(line, "panic: ") })
			t.failures = append(t.failures, failure{name, e.Test, panicked})
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
	for _, f := range t.flaky {
		fmt.Fprintf(w, "flaky: %v failed, and passed when it was run again; what it said first is above, and is a bug\n", f)
	}
	for _, f := range t.failures {
		fmt.Fprintln(w, "failed:", f)
	}
	fmt.Fprintf(w, "%d tests ran\n", t.passed+len(t.failures)+len(t.skipped))
	fmt.Fprintf(w, "%d passed (%d of them flaky), %d failed, %d skipped\n", t.passed, len(t.flaky), len(t.failures), len(t.skipped))
}
