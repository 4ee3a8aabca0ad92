// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// teller tells what happens: a title for each act, below it the commands as a person would
// type them with what they printed, and the time it took.
type teller struct {
	out   io.Writer
	color bool
	start time.Time
	acts  int
}

func newTeller(out *os.File) *teller {
	return &teller{out: out, color: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(out.Fd())), start: time.Now()}
}

func (t *teller) paint(code, text string) string {
	if !t.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// act plays one act under its title.
func (t *teller) act(title string, play func() error) error {
	t.acts++
	fmt.Fprintf(t.out, "\n%s\n", t.paint("1", fmt.Sprintf("%d. %s", t.acts, title)))
	start := time.Now()
	if err := play(); err != nil {
		fmt.Fprintln(t.out, t.paint("31", "   failed"))
		return fmt.Errorf("%s: %w", title, err)
	}
	fmt.Fprintln(t.out, t.paint("2", fmt.Sprintf("   %.1fs (at %.0fs)", time.Since(start).Seconds(), time.Since(t.start).Seconds())))
	return nil
}

// command shows a command and what it printed.
func (t *teller) command(line, output string) {
	fmt.Fprintf(t.out, "   %s %s\n", t.paint("2", "$"), line)
	for text := range strings.Lines(output) {
		fmt.Fprint(t.out, "   ", text)
	}
}

func (t *teller) say(text string) { fmt.Fprintln(t.out, text) }

func (t *teller) note(format string, args ...any) { fmt.Fprintf(t.out, "   "+format+"\n", args...) }
