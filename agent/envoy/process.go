// SPDX-License-Identifier: Apache-2.0

// Package envoy runs one Envoy: starts it, starts it again when it dies, and
// lets it drain before it is stopped.
//
// There is never more than one: what an earlier agent left behind is ended
// first, since its listeners would go on taking a share of the connections.
package envoy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// ErrNotFound means that there is no Envoy to run.
var ErrNotFound = errors.New("envoy not found")

// steady is how long an Envoy must run for a later crash to count as the first.
const steady = time.Minute

// Process is one supervised Envoy. Path, Bootstrap and Admin are required.
type Process struct {
	// Path of the program; a bare name is looked up in PATH.
	Path string
	// Bootstrap is the path of its configuration.
	Bootstrap string
	// Admin is host:port of its admin interface.
	Admin string
	// UID is the user and group to run as; 0 keeps those of the agent.
	UID int
	// PIDFile remembers the process across restarts of the agent; empty: none.
	PIDFile string
	// LogLevel in Envoy's spelling; empty means "warning".
	LogLevel string
	// Concurrency is the number of worker threads; 0 means one per processor.
	Concurrency int
	// Args are appended to the command line.
	Args []string
	// Drain is how long connections may finish after the end was asked for.
	Drain time.Duration
	// DrainAtLeast is how long to wait even if no connection is open, so that
	// callers learn that we are leaving; more than Drain means Drain.
	DrainAtLeast time.Duration
	// InboundOnly drains inbound listeners alone: the workload may still call
	// others while it finishes.
	InboundOnly bool
	// Output gets what Envoy writes; nil means standard error.
	Output io.Writer
	// Log gets starts, deaths and the drain; nil discards.
	Log *slog.Logger

	restarts atomic.Int64
	running  atomic.Bool
}

// Restarts counts the times that Envoy died by itself.
func (p *Process) Restarts() int64 { return p.restarts.Load() }

// Running tells whether the process exists.
func (p *Process) Running() bool { return p.running.Load() }

// Run keeps Envoy running until ctx ends, drains it, and returns nil once it
// is gone. It returns an error only if Envoy cannot be started at all.
func (p *Process) Run(ctx context.Context) error {
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	path, err := exec.LookPath(p.Path)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNotFound, p.Path, err)
	}
	if err := p.endFormer(); err != nil {
		return err
	}
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval = 200 * time.Millisecond
	wait.MaxInterval = 10 * time.Second
	for {
		began := time.Now()
		child, err := p.start(path)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			p.stop(child)
			return nil
		case <-child.done:
		}
		p.restarts.Add(1)
		if time.Since(began) > steady {
			wait.Reset()
		}
		pause := wait.NextBackOff()
		p.Log.Error("envoy died, starting it again", "state", child.state(), "ran", time.Since(began).Round(time.Millisecond), "in", pause.Round(time.Millisecond))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// child is one run of the program.
type child struct {
	cmd  *exec.Cmd
	done chan struct{} // closed once it is gone; then cmd.ProcessState is set
}

func (c *child) state() string {
	if c.cmd.ProcessState == nil {
		return "unknown"
	}
	return c.cmd.ProcessState.String()
}

func (p *Process) command(path string) *exec.Cmd {
	drain := int(max(p.Drain, time.Second).Round(time.Second) / time.Second)
	level := p.LogLevel
	if level == "" {
		level = "warning"
	}
	args := []string{
		"--config-path", p.Bootstrap,
		// One Envoy per agent, replaced by stopping it: hot restart and its
		// shared memory would only be a way to meet another one.
		"--disable-hot-restart",
		"--drain-time-s", strconv.Itoa(drain),
		"--parent-shutdown-time-s", strconv.Itoa(drain + 1),
		"--drain-strategy", "immediate",
		"--log-level", level,
		// Access logs appear when something happens, not ten seconds later.
		"--file-flush-interval-msec", "1000",
		"--log-format", "%Y-%m-%dT%T.%fZ\t%l\tenvoy %n %g:%#\t%v",
	}
	if p.Concurrency > 0 {
		args = append(args, "--concurrency", strconv.Itoa(p.Concurrency))
	}
	cmd := exec.Command(path, append(args, p.Args...)...)
	cmd.Stdout, cmd.Stderr = p.output(), p.output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if p.UID != 0 && os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(p.UID), Gid: uint32(p.UID)}
	}
	return cmd
}

func (p *Process) output() io.Writer {
	if p.Output != nil {
		return p.Output
	}
	return os.Stderr
}

// start runs the program on a thread of its own for as long as it lives: the
// kernel sends the death signal when the thread that forked ends, and Go ends
// threads as it likes unless they are locked.
func (p *Process) start(path string) (*child, error) {
	c := &child{cmd: p.command(path), done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := c.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = c.cmd.Wait() // how it ended is in ProcessState
		p.running.Store(false)
		close(c.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	p.running.Store(true)
	p.remember(c.cmd.Process.Pid)
	p.Log.Info("envoy started", "pid", c.cmd.Process.Pid, "path", path)
	return c, nil
}

// stop drains, asks, and after a grace period insists.
func (p *Process) stop(c *child) {
	p.drain(c)
	p.end(c, 5*time.Second)
	p.forget()
	p.Log.Info("envoy stopped", "state", c.state())
}

func (p *Process) end(c *child, grace time.Duration) {
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // gone already is as good
	select {
	case <-c.done:
		return
	case <-time.After(grace):
	}
	_ = c.cmd.Process.Kill()
	<-c.done
}
