// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"strings"
	"unicode/utf8"
)

// tone is what a piece of output means, by which it is coloured.
type tone string

const (
	plain  tone = ""
	green  tone = "32"
	yellow tone = "33"
	red    tone = "31"
	faint  tone = "2"
)

// style says what a stream can show.
type style struct {
	color bool
	ascii bool
}

// style of the stream w, which is stdout or stderr.
func (s *session) style(w io.Writer) style {
	terminal := (w == s.stdout && s.outTerminal) || (w == s.stderr && s.errTerminal)
	return style{color: s.wantsColor(terminal), ascii: s.ascii || !utf8Locale(s.env)}
}

func (s *session) wantsColor(terminal bool) bool {
	switch {
	case s.color == "always":
		return true
	case s.color == "never", s.env("NO_COLOR") != "":
		return false
	case s.env("CLICOLOR_FORCE") != "" && s.env("CLICOLOR_FORCE") != "0":
		return true
	}
	return terminal && s.env("TERM") != "dumb"
}

// utf8Locale tells whether the locale shows more than ASCII; unset means yes,
// as minimal containers leave it unset and show UTF-8 all the same.
func utf8Locale(env func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := env(name); v != "" {
			v = strings.ToUpper(v)
			return strings.Contains(v, "UTF-8") || strings.Contains(v, "UTF8")
		}
	}
	return true
}

func (st style) paint(t tone, text string) string {
	if !st.color || t == plain || text == "" {
		return text
	}
	return "\x1b[" + string(t) + "m" + text + "\x1b[0m"
}

// mark is the symbol of a state of a step or of the severity of a finding.
func (st style) mark(state string) string {
	m := marks[state]
	if st.ascii {
		return st.paint(m.tone, m.ascii)
	}
	return st.paint(m.tone, m.symbol)
}

// markWidth is how many columns that takes.
func (st style) markWidth(state string) int {
	if st.ascii {
		return len(marks[state].ascii)
	}
	return utf8.RuneCountInString(marks[state].symbol)
}

// arrow points from one name to another.
func (st style) arrow() string {
	if st.ascii {
		return "->"
	}
	return "→"
}

var marks = map[string]struct {
	symbol, ascii string
	tone          tone
}{
	"done":      {"✓", "ok", green},
	"ok":        {"✓", "ok", green},
	"unchanged": {"✓", "ok", green},
	"warning":   {"!", "warn", yellow},
	"failed":    {"✗", "FAIL", red},
	"error":     {"✗", "FAIL", red},
	"info":      {"·", "-", faint},
	"running":   {"…", "...", faint},
}

// fold breaks text for a terminal of that width, 0 for none. It stands indent columns
// from the left, and so do its further lines.
func fold(text string, width, indent int) string {
	if width <= indent || utf8.RuneCountInString(text)+indent <= width {
		return text
	}
	return strings.ReplaceAll(wrap(text, width-indent), "\n", "\n"+strings.Repeat(" ", indent))
}

// behind adds a word to text that was folded, on a line of its own where it does not fit.
func behind(text, word string, width, indent int, paint func(string) string) string {
	if word == "" {
		return text
	}
	last := text[strings.LastIndexByte(text, '\n')+1:]
	column := utf8.RuneCountInString(last)
	if len(last) == len(text) {
		column += indent
	}
	if width > indent && column+2+len(word) > width {
		return text + "\n" + strings.Repeat(" ", indent) + paint(word)
	}
	return text + "  " + paint(word)
}

// columns is the width of the terminal that w is; 0 if it is none.
func (s *session) columns(w io.Writer) int {
	if (w == s.stdout && s.outTerminal) || (w == s.stderr && s.errTerminal) {
		return s.width
	}
	return 0
}

// wrap breaks text at spaces so that no line is longer than width, where words
// allow.
func wrap(text string, width int) string {
	var b strings.Builder
	column := 0
	for word := range strings.FieldsSeq(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case column == 0:
		case column+1+n > width:
			b.WriteByte('\n')
			column = 0
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += n
	}
	return b.String()
}
