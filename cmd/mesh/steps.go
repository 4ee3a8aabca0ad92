// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
)

// steps shows the progress of a verb that takes several steps: each finished
// step is one line on stdout. While a step runs, a terminal shows it with the
// time it takes so far; elsewhere a line on stderr every ten seconds tells that
// the command is alive and what it waits for. With --progress=json every change
// is one api.Progress a line on stdout, and nothing else is printed there.
type steps struct {
	out, talk  io.Writer
	style      style
	json, live bool
	width      int
	columns    int // of stdout; 0 if that is no terminal
	now        func() time.Time
	heartbeat  time.Duration

	mu sync.Mutex
}

// step is one of them, until it is finished.
type step struct {
	steps   *steps
	name    string
	message string
	begun   time.Time
	stop    chan struct{}
	stopped sync.WaitGroup
}

// heartbeatInterval is how often a waiting command says so without a terminal.
const heartbeatInterval = 10 * time.Second

// newSteps shows steps as --progress asks for.
func (s *session) newSteps() *steps {
	return &steps{
		out: s.stdout, talk: s.stderr, style: s.style(s.stdout),
		json: s.progress == "json",
		live: s.progress == "auto" && s.errTerminal && s.outTerminal && s.env("TERM") != "dumb",
		now:  s.now, heartbeat: heartbeatInterval, width: s.width, columns: s.columns(s.stdout),
	}
}

// say prints a line that belongs to no step.
func (p *steps) say(format string, args ...any) {
	if !p.json {
		fmt.Fprintln(p.out, fold(fmt.Sprintf(format, args...), p.columns, 0))
	}
}

// begin starts a step; name is for programs, message says what is being done.
func (p *steps) begin(name, message string) *step {
	st := &step{steps: p, name: name, message: message, begun: p.now(), stop: make(chan struct{})}
	p.event(st, "running", message, "")
	st.stopped.Go(st.pulse)
	return st
}

// pulse shows that the step runs.
func (st *step) pulse() {
	p := st.steps
	every := p.heartbeat
	if p.live {
		every = 100 * time.Millisecond
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-st.stop:
			return
		case <-t.C:
		}
		p.mu.Lock()
		elapsed := p.now().Sub(st.begun)
		switch {
		case p.json:
		case p.live:
			fmt.Fprintf(p.talk, "\r\x1b[K%s", clip(fmt.Sprintf("  %s %s  %s", p.style.mark("running"), st.message, short(elapsed)), p.width+12))
		default:
			fmt.Fprintf(p.talk, "  %s %s  %s\n", p.style.mark("running"), st.message, short(elapsed))
		}
		p.mu.Unlock()
	}
}

// clip shortens a line so that it does not wrap.
func clip(line string, width int) string {
	r := []rune(line)
	if len(r) <= width {
		return line
	}
	return string(r[:width-1]) + "…"
}

// waits says what the step is waiting for now.
func (st *step) waits(format string, args ...any) {
	message := printable(fmt.Sprintf(format, args...))
	st.steps.mu.Lock()
	changed := message != st.message
	st.message = message
	st.steps.mu.Unlock()
	if changed {
		st.steps.event(st, "running", message, "")
	}
}

// The ways a step ends.
func (st *step) done(format string, args ...any)      { st.finish("done", "", format, args...) }
func (st *step) unchanged(format string, args ...any) { st.finish("unchanged", "", format, args...) }
func (st *step) warn(code api.Code, format string, args ...any) {
	st.finish("warning", code, format, args...)
}
func (st *step) fail(code api.Code, format string, args ...any) {
	st.finish("failed", code, format, args...)
}

func (st *step) finish(state string, code api.Code, format string, args ...any) {
	close(st.stop)
	st.stopped.Wait()
	p := st.steps
	if p.live {
		fmt.Fprint(p.talk, "\r\x1b[K")
	}
	message := printable(fmt.Sprintf(format, args...))
	p.event(st, state, message, code)
	if p.json {
		return
	}
	indent := 3 + p.style.markWidth(state)
	text := fold(message, p.columns, indent)
	pale := func(s string) string { return p.style.paint(faint, s) }
	var notes []string
	if elapsed := p.now().Sub(st.begun); elapsed >= time.Second {
		notes = append(notes, short(elapsed))
	}
	if code != "" {
		notes = append(notes, string(code))
	}
	text = behind(text, strings.Join(notes, "  "), p.columns, indent, pale)
	fmt.Fprintf(p.out, "  %s %s\n", p.style.mark(state), text)
}

// note adds a finding below the last step.
func (p *steps) note(state string, code api.Code, message string) {
	st := &step{steps: p, name: "finding", begun: p.now(), stop: make(chan struct{})}
	st.finish(state, code, "%s", message)
}

// hint adds an indented line below the last step.
func (p *steps) hint(format string, args ...any) {
	if !p.json {
		fmt.Fprintf(p.out, "      %s\n", printable(fmt.Sprintf(format, args...)))
	}
}

func (p *steps) event(st *step, state, message string, code api.Code) {
	if !p.json {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// A failing stdout ends the command by SIGPIPE or at its next write.
	_ = writeJSONLine(p.out, &api.Progress{
		Step: st.name, State: state, Message: message, Code: string(code),
		Elapsed: durationpb.New(p.now().Sub(st.begun).Round(time.Millisecond)),
	})
}

// writeJSONLine prints m as one line of JSON.
func writeJSONLine(w io.Writer, m proto.Message) error {
	data, err := protojson.Marshal(m)
	if err != nil {
		return err
	}
	var v json.RawMessage = data
	compact, err := json.Marshal(v) // takes out protojson's random spaces
	if err != nil {
		return err
	}
	_, err = w.Write(append(compact, '\n'))
	return err
}
