// SPDX-License-Identifier: Apache-2.0

package report

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// State is what a Checker found.
type State struct {
	// Healthy says whether the workload may receive connections.
	Healthy bool
	// Message says why not.
	Message string
	// Observed is when it was checked last.
	Observed time.Time
}

// Checker repeats one check. Check is required; the zero value of the rest
// works.
type Checker struct {
	// Check returns nil if the workload works.
	Check func(ctx context.Context) error
	// Interval between checks; 0 means 2 seconds.
	Interval time.Duration
	// Failures and Successes in a row that change the verdict; 0 means 2 and 1.
	Failures, Successes int
	// Log gets changes of the verdict; nil discards.
	Log *slog.Logger

	mu      sync.Mutex
	state   State
	known   bool // a first verdict exists
	ended   bool // Leave was called
	streak  int  // results in a row that contradict the verdict
	changed chan struct{}
}

// Run checks until ctx ends. The first result is the first verdict.
func (c *Checker) Run(ctx context.Context) error {
	interval := c.Interval
	if interval == 0 {
		interval = 2 * time.Second
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		c.note(c.Check(ctx))
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// State returns the verdict. Before the first check it is unhealthy.
func (c *Checker) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.known {
		return State{Message: "not checked yet", Observed: time.Now()}
	}
	return c.state
}

// Changed returns a channel that is closed when the verdict changes.
func (c *Checker) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.changed
}

// Leave makes the verdict unhealthy at once and for good.
func (c *Checker) Leave(message string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known, c.ended = true, true
	c.state = State{Message: message, Observed: time.Now()}
	c.wakeLocked()
}

func (c *Checker) note(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	healthy := err == nil
	c.state.Observed = time.Now()
	if !healthy && !c.state.Healthy {
		c.state.Message = err.Error() // the verdict stays, its reason may change
	}
	if c.known && healthy == c.state.Healthy {
		c.streak = 0
		return
	}
	c.streak++
	if c.known && c.streak < c.needed(healthy) {
		return
	}
	c.known, c.streak = true, 0
	c.state.Healthy, c.state.Message = healthy, ""
	if err != nil {
		c.state.Message = err.Error()
	}
	if c.Log != nil {
		c.Log.Info("workload health changed", "healthy", healthy, "message", c.state.Message)
	}
	c.wakeLocked()
}

func (c *Checker) wakeLocked() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

func (c *Checker) needed(healthy bool) int {
	n, standard := c.Failures, 2
	if healthy {
		n, standard = c.Successes, 1
	}
	if n <= 0 {
		return standard
	}
	return n
}
