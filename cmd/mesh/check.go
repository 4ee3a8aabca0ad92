// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

// checkFlags are the flags of mesh check.
type checkFlags struct {
	clusters []string
	failOn   string
	wait     time.Duration
	short    bool
}

func (s *session) checkCommand() *cobra.Command {
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for findings in the whole mesh",
		Long: `Look for findings in the whole mesh.

The check runs inside meshd, not on this machine: what this machine can or cannot
reach says nothing about the mesh. The exit code is 3 if there is an error.`,
		Example: `  mesh check
  mesh check --cluster west --short
  mesh check --wait 2m --fail-on warning -o json`,
		Args: arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return s.check(cmd.Context(), f) },
	}
	cmd.Flags().StringVarP(&s.output, "output", "o", "table", "output: table, json or yaml")
	cmd.Flags().StringSliceVar(&f.clusters, "cluster", nil, "only these clusters")
	cmd.Flags().StringVar(&f.failOn, "fail-on", "error", "what makes the exit code 3: error or warning")
	cmd.Flags().DurationVar(&f.wait, "wait", 0, "repeat for so long until nothing is found")
	cmd.Flags().BoolVar(&f.short, "short", false, "only what is not right")
	must(cmd.RegisterFlagCompletionFunc("cluster", s.completeClusters))
	return cmd
}

func (s *session) check(ctx context.Context, f checkFlags) error {
	if err := oneOf("--fail-on", f.failOn, []string{"error", "warning"}); err != nil {
		return err
	}
	if err := oneOf("--output", s.output, []string{"table", "json", "yaml"}); err != nil {
		return err
	}
	deadline := s.now().Add(f.wait)
	var report *api.CheckReport
	for {
		err := s.call(ctx, "cannot run the check", func(ctx context.Context, c *connection) (err error) {
			report, err = c.Check(ctx, &api.CheckRequest{Clusters: f.clusters})
			return err
		})
		if err != nil {
			return err
		}
		if !f.fails(report) || !s.now().Before(deadline) {
			break
		}
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
	}
	if err := s.printReport(report, f.short); err != nil {
		return err
	}
	if f.fails(report) {
		return errFindings
	}
	return nil
}

func (f checkFlags) fails(r *api.CheckReport) bool {
	return r.GetErrors() > 0 || f.failOn == "warning" && r.GetWarnings() > 0
}

// pause waits for d, or for the end of ctx.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

func (s *session) printReport(r *api.CheckReport, short bool) error {
	switch s.output {
	case "json":
		return writeJSON(s.stdout, r)
	case "yaml":
		return writeYAML(s.stdout, r)
	}
	st := s.style(s.stdout)
	width := 0
	for _, g := range r.GetGroups() {
		width = max(width, len(g.GetName()))
	}
	for _, g := range r.GetGroups() {
		s.printGroup(s.stdout, st, g, width, short)
	}
	result := fmt.Sprintf("%s, %s", noun(int(r.GetErrors()), "error"), noun(int(r.GetWarnings()), "warning"))
	switch {
	case r.GetErrors() > 0:
		result = st.paint(red, result)
	case r.GetWarnings() > 0:
		result = st.paint(yellow, result)
	default:
		result = st.paint(green, "nothing found")
	}
	_, err := fmt.Fprintf(s.stdout, "Result: %s\n", result)
	return err
}

// printGroup prints what is right on as few lines as it takes, and a line or two
// for each finding.
func (s *session) printGroup(w io.Writer, st style, g *api.CheckGroup, width int, short bool) {
	indent := strings.Repeat(" ", width+2)
	head := fmt.Sprintf("%-*s", width+2, g.GetName())
	line := func(text string) {
		fmt.Fprintln(w, strings.TrimRight(head+text, " "))
		head = indent
	}
	var good []string
	column := 0
	for _, f := range g.GetFindings() {
		if f.GetSeverity() != "ok" || short {
			continue
		}
		item := st.mark("ok") + " " + printable(f.GetMessage())
		if n := len([]rune(f.GetMessage())) + 4; column > 0 && len(indent)+column+n > s.width {
			line(strings.Join(good, "  "))
			good, column = nil, 0
		}
		good = append(good, item)
		column += len([]rune(f.GetMessage())) + 4
	}
	if len(good) > 0 {
		line(strings.Join(good, "  "))
	}
	for _, f := range worstFirst(g.GetFindings()) {
		if f.GetSeverity() == "ok" {
			continue
		}
		text := f.GetMessage()
		if f.GetSubject() != "" {
			text = f.GetSubject() + ": " + text
		}
		if f.GetSince() != nil {
			text += " (since " + f.GetSince().AsTime().UTC().Format("15:04:05") + ")"
		}
		in, columns := len(indent)+1+st.markWidth(f.GetSeverity()), s.columns(w)
		text = behind(fold(printable(text), columns, in), f.GetCode(), columns, in, func(code string) string { return st.paint(faint, code) })
		line(st.mark(f.GetSeverity()) + " " + text)
		if f.GetTry() != "" {
			line("  " + st.paint(faint, "try: ") + printable(f.GetTry()))
		}
	}
}

// worstFirst orders findings by their severity.
func worstFirst(findings []*api.Finding) []*api.Finding {
	order := []string{"error", "warning"}
	rank := func(f *api.Finding) int {
		if i := slices.Index(order, f.GetSeverity()); i >= 0 {
			return i
		}
		return len(order)
	}
	return slices.SortedStableFunc(slices.Values(findings), func(a, b *api.Finding) int { return rank(a) - rank(b) })
}
