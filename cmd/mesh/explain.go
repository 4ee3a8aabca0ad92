// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) explainCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain [CODE]",
		Short: "Explain a finding code; without one, list them",
		Long: `Explain a finding code; without one, list them.

The explanations are part of this program: no connection is needed.`,
		Example: "  mesh explain MESH1015",
		Args:    arguments(0, 1, "code"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var out []string
			for _, e := range api.Explanations() {
				out = append(out, string(e.Code)+"\t"+e.Title)
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return s.listCodes()
			}
			return s.explainCode(args[0])
		},
	}
	return cmd
}

func (s *session) listCodes() error {
	t := table{columns: []column{{head: "CODE"}, {head: "MEANS"}}}
	for _, e := range api.Explanations() {
		t.rows = append(t.rows, text(string(e.Code), e.Title))
	}
	return t.write(s.stdout, s.style(s.stdout), false, true)
}

func (s *session) explainCode(arg string) error {
	code := api.Code(strings.ToUpper(arg))
	if !strings.HasPrefix(string(code), "MESH") {
		code = "MESH" + code
	}
	e, ok := api.Explain(code)
	if !ok {
		var all []string
		for _, e := range api.Explanations() {
			all = append(all, string(e.Code))
		}
		f := &failure{exit: exitUsage, what: "cannot explain " + printable(arg), why: "there is no such code", try: "mesh explain (lists all codes)"}
		if n := nearest(string(code), all); n != "" {
			f.try = "did you mean " + n + "?"
		}
		return f
	}
	_, err := fmt.Fprintf(s.stdout, "%s  %s\n\n%s\n\nWhat to do\n%s\n", e.Code, e.Title,
		wrap(e.Meaning, 78), wrap(e.Remedy, 78))
	return err
}

// nearest is the name most like given, or "" if none is like it.
func nearest(given string, names []string) string {
	best, distance := "", max(2, len(given)/3)+1
	for _, n := range names {
		if d := editDistance(given, n); d < distance {
			best, distance = n, d
		}
	}
	return best
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	x, y := []rune(a), []rune(b)
	row := make([]int, len(y)+1)
	for j := range row {
		row[j] = j
	}
	for i := range x {
		diagonal := row[0]
		row[0] = i + 1
		for j := range y {
			cost := diagonal
			if x[i] != y[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(y)]
}
