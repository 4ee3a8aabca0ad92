// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Interrupt runs mesh and presses Ctrl-C as soon as what it prints contains text. The
// result's Stdout is all that it printed.
func (s *Stage) Interrupt(ctx context.Context, text string, args ...string) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	w := &watched{text: text, seen: make(chan struct{})}
	p, err := s.Laptop.Start(bed.Command{Name: "laptop", Path: s.programs.Path("mesh"), Args: args, Stdout: w, Stderr: w})
	if err != nil {
		return Result{}, err
	}
	select {
	case <-w.seen:
		err = p.Signal(syscall.SIGINT)
	case <-p.Done():
		err = fmt.Errorf("it ended without printing %q", text)
	case <-ctx.Done():
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		err = errors.Join(fmt.Errorf("it neither printed %q nor ended: %w", text, ctx.Err()), p.Kill())
	}
	r := Result{Stdout: w.String()}
	if exit := new(exec.ExitError); errors.As(p.Err(), &exit) {
		r.Code = exit.ExitCode()
	}
	if err != nil {
		err = fmt.Errorf("mesh %s: %w\n%s", strings.Join(args, " "), err, r.Stdout)
	}
	return r, err
}

// watched is an output that tells when a text has appeared in it.
type watched struct {
	text string
	seen chan struct{} // closed

	mu  sync.Mutex
	out bytes.Buffer
}

func (w *watched) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := bytes.Contains(w.out.Bytes(), []byte(w.text))
	n, err := w.out.Write(b)
	if !before && bytes.Contains(w.out.Bytes(), []byte(w.text)) {
		close(w.seen)
	}
	return n, err
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.String()
}
