// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// A progress tells a person what is being done and how long it took. Phases
// may overlap.
type progress struct {
	out   io.Writer
	start time.Time

	mu     sync.Mutex
	phases int
}

// phase announces a piece of work and returns the function that reports its
// end. Long pieces say every half minute that they are still at it.
func (p *progress) phase(what string) (done func(error)) {
	p.mu.Lock()
	p.phases++
	p.mu.Unlock()
	p.say("%s ...", what)
	began := time.Now()
	stop := make(chan struct{})
	go func() {
		ticker := time.NewTicker(30 * time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				p.say("%s: still working after %s", what, round(time.Since(began)))
			}
		}
	}()
	return func(err error) {
		close(stop)
		outcome := "done"
		if err != nil {
			outcome = "failed"
		}
		p.say("%s: %s in %s", what, outcome, round(time.Since(began)))
	}
}

// did reports whether there was anything to do at all.
func (p *progress) did() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.phases > 0
}

func (p *progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, "prepare %6s  %s\n", round(time.Since(p.start)), fmt.Sprintf(format, args...))
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Second)
}
