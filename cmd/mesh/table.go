// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"strings"
	"unicode/utf8"
)

// column of a table. Wide columns are shown with -o wide only.
type column struct {
	head  string
	right bool // numbers
	wide  bool
	spare int // on a terminal too narrow for the table, the highest are left out first; 0: never
}

// cell of a table; empty text is shown as "-".
type cell struct {
	text string
	tone tone
}

// text makes plain cells.
func text(values ...string) []cell {
	cells := make([]cell, len(values))
	for i, v := range values {
		cells[i] = cell{text: v}
	}
	return cells
}

// table has one row for each object.
type table struct {
	columns []column
	rows    [][]cell
}

// fit leaves out spare columns until the table is no wider than columns, where that can be
// done, and names them.
func (t *table) fit(columns int) []string {
	if columns <= 0 {
		return nil
	}
	head := make([]cell, len(t.columns))
	for i, c := range t.columns {
		head[i] = cell{text: c.head}
	}
	widths := t.widths(append([][]cell{head}, t.rows...))
	var out []string
	for {
		total, most := -2, -1
		for i, c := range t.columns {
			if c.wide {
				continue
			}
			total += widths[i] + 2
			if c.spare > 0 && (most < 0 || c.spare > t.columns[most].spare) {
				most = i
			}
		}
		if total <= columns || most < 0 {
			return out
		}
		t.columns[most].wide = true
		out = append(out, t.columns[most].head)
	}
}

// write prints the table with two spaces between columns and none at the ends
// of lines.
func (t *table) write(w io.Writer, st style, wide, headers bool) error {
	var lines [][]cell
	if headers {
		head := make([]cell, len(t.columns))
		for i, c := range t.columns {
			head[i] = cell{text: c.head}
		}
		lines = append(lines, head)
	}
	lines = append(lines, t.rows...)
	widths := t.widths(lines)

	var b strings.Builder
	for _, line := range lines {
		gap, first := 0, true
		for i, c := range t.columns {
			if c.wide && !wide {
				continue
			}
			v := shown(line[i])
			pad := widths[i] - utf8.RuneCountInString(v)
			if !first {
				gap += 2
			}
			first = false
			if c.right {
				gap += pad
				pad = 0
			}
			b.WriteString(strings.Repeat(" ", gap))
			b.WriteString(st.paint(line[i].tone, v))
			gap = pad
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (t *table) widths(lines [][]cell) []int {
	widths := make([]int, len(t.columns))
	for _, line := range lines {
		for i := range t.columns {
			widths[i] = max(widths[i], utf8.RuneCountInString(shown(line[i])))
		}
	}
	return widths
}

// shown is what a terminal gets to see of a cell: names come from clusters, so
// control characters are taken out.
func shown(c cell) string {
	if c.text == "" {
		return "-"
	}
	return printable(c.text)
}

// printable replaces what could move a cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return '?'
		}
		return r
	}, s)
}
