// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// ErrNotRunning is what signals to a process that has ended return.
var ErrNotRunning = errors.New("process is not running")

// A Command says what to start in a namespace.
type Command struct {
	// Name is what logs and errors call it and what its log file is named
	// after; empty means the program's file name.
	Name string
	// Path is the program, looked up in PATH unless it has a slash, and Args
	// are its arguments, without the program's name.
	Path string
	Args []string
	// Env is added to the namespace's environment, which is not the machine's:
	// PATH, HOME, TMPDIR, and what Setenv set.
	Env []string
	// Dir is the current folder; empty means the namespace's home.
	Dir string
	// Stdin, Stdout and Stderr are as in os/exec. Where Stdout is nil, Start
	// sends both outputs to the log file, and Run returns them.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// SysProcAttr may ask for more of the kernel (credentials, further
	// namespaces); nil asks for nothing. A process group of its own is set
	// in any case.
	SysProcAttr *syscall.SysProcAttr
	// ExtraFiles are inherited as descriptors 3 and up.
	ExtraFiles []*os.File
}

// A Process is a command that was started in a namespace. It can be started
// again after it has ended, by itself or because it was told to.
type Process struct {
	command Command
	in      *Namespace
	log     string

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{}
	err  error
	told bool // it was told to end
}

// Start starts the command in the namespace, in a process group of its own.
func (n *Namespace) Start(c Command) (*Process, error) {
	if c.Name == "" {
		c.Name = filepath.Base(c.Path)
	}
	p := &Process{command: c, in: n, log: n.world.logFile(n.name, c.Name)}
	if err := p.Start(); err != nil {
		return nil, err
	}
	return p, nil
}

// Run starts the command in the namespace, waits for it and returns what it
// printed, on both outputs unless Stdout is set. When ctx ends first, its whole
// process group is killed. A failure holds the end of what it printed.
func (n *Namespace) Run(ctx context.Context, c Command) ([]byte, error) {
	var output bytes.Buffer
	if c.Stdout == nil {
		c.Stdout = &output
	}
	if c.Stderr == nil {
		c.Stderr = c.Stdout
	}
	p, err := n.Start(c)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Kill()
		return output.Bytes(), fmt.Errorf("%s in %s: %w: %s", p.command.Name, n.name, context.Cause(ctx), lastLines(output.Bytes()))
	}
	if err := p.Err(); err != nil {
		return output.Bytes(), fmt.Errorf("%s in %s: %w: %s", p.command.Name, n.name, err, lastLines(output.Bytes()))
	}
	return output.Bytes(), nil
}

// Shell runs a POSIX shell script in the namespace, as Run does. It stops at
// the first command that fails.
func (n *Namespace) Shell(ctx context.Context, script string) ([]byte, error) {
	return n.Run(ctx, Command{Name: "sh", Path: "/bin/sh", Args: []string{"-euc", script}})
}

// Start starts the process again. It must not be running.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.runningLocked() {
		return fmt.Errorf("start %s in %s: it is running already", p.command.Name, p.in.name)
	}
	cmd, logged, err := p.prepare()
	if err != nil {
		return fmt.Errorf("start %s in %s: %w", p.command.Name, p.in.name, err)
	}
	err = p.in.fork(cmd)
	if logged != nil {
		logged.Close() // the child has its own
	}
	if err != nil {
		return fmt.Errorf("start %s in %s: %w", p.command.Name, p.in.name, err)
	}
	p.cmd, p.done, p.err, p.told = cmd, make(chan struct{}), nil, false
	p.in.world.started(p)
	go p.wait(cmd, p.done)
	return nil
}

// prepare makes the command for one run.
func (p *Process) prepare() (*exec.Cmd, *os.File, error) {
	c := p.command
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = append(p.in.environment(), c.Env...)
	cmd.Dir = c.Dir
	if cmd.Dir == "" {
		cmd.Dir = homeOf(cmd.Env)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = c.Stdin, c.Stdout, c.Stderr, c.ExtraFiles
	var attributes syscall.SysProcAttr
	if c.SysProcAttr != nil {
		attributes = *c.SysProcAttr
	}
	if !attributes.Setsid {
		attributes.Setpgid = true
	}
	cmd.SysProcAttr = &attributes
	cmd.WaitDelay = time.Second // daemons that keep the output open are not waited for
	if c.Stdout != nil {
		return cmd, nil, nil
	}
	logged, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, nil, err
	}
	cmd.Stdout, cmd.Stderr = logged, logged
	return cmd, logged, nil
}

// wait collects the process and, when nobody told it to end, says so.
func (p *Process) wait(cmd *exec.Cmd, done chan struct{}) {
	err := cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	p.mu.Lock()
	p.err = err
	told := p.told
	p.mu.Unlock()
	close(done)
	p.in.world.ended(p)
	if err != nil && !told && p.command.Stdout == nil {
		p.in.world.logger.Warn("process ended by itself", "process", p.command.Name, "namespace", p.in.name, "error", err, "log", p.log)
	}
}

// Name returns the command's name.
func (p *Process) Name() string { return p.command.Name }

// Namespace returns the namespace the process runs in.
func (p *Process) Namespace() *Namespace { return p.in }

// LogFile returns the path of the file with the process's output, of all its
// runs.
func (p *Process) LogFile() string { return p.log }

// Log returns the process's output, of all its runs; nothing when it cannot be
// read or goes elsewhere.
func (p *Process) Log() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return ""
	}
	return string(text)
}

// Pid returns the process's number as this process sees it.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// Done returns a channel that is closed when the present run has ended.
func (p *Process) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// Err returns how the last run ended: nil when it succeeded or goes on.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Running reports whether the process has not ended yet. A paused one runs.
func (p *Process) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.runningLocked()
}

func (p *Process) runningLocked() bool {
	if p.done == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the process's group. A process that has ended
// returns ErrNotRunning.
func (p *Process) Signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.runningLocked() {
		return fmt.Errorf("signal %s in %s: %w", p.command.Name, p.in.name, ErrNotRunning)
	}
	if s == syscall.SIGKILL || s == syscall.SIGTERM {
		p.told = true
	}
	err := syscall.Kill(-p.cmd.Process.Pid, s)
	if errors.Is(err, syscall.ESRCH) {
		return nil // it has ended, and is about to be collected
	}
	return err
}

// Kill ends the process's group at once (SIGKILL) and waits until the process
// is gone. One that has ended already is no error.
func (p *Process) Kill() error {
	if err := p.Signal(syscall.SIGKILL); err != nil {
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		return err
	}
	<-p.Done()
	return nil
}

// Stop asks the process to end (SIGTERM), and kills its group when it has not
// within the grace period. One that has ended already is no error.
func (p *Process) Stop(grace time.Duration) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		return err
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-p.Done():
		return nil
	case <-timer.C:
		return p.Kill()
	}
}

// Pause stops the process's group where it stands (SIGSTOP): its connections
// stay open and nothing answers on them.
func (p *Process) Pause() error { return p.Signal(syscall.SIGSTOP) }

// Resume lets a paused process go on (SIGCONT).
func (p *Process) Resume() error { return p.Signal(syscall.SIGCONT) }

// Restart kills the process if it runs, and starts it again.
func (p *Process) Restart() error {
	return errors.Join(p.Kill(), p.Start())
}

// environment returns what programs of the namespace find in theirs.
func (n *Namespace) environment() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.env...)
}

// homeOf returns the last HOME of an environment.
func homeOf(environ []string) string {
	home := "/"
	for _, v := range environ {
		if value, ok := strings.CutPrefix(v, "HOME="); ok {
			home = value
		}
	}
	return home
}

// lastLines returns the end of an output for an error.
func lastLines(output []byte) string {
	const most = 2000
	output = bytes.TrimSpace(output)
	if len(output) > most {
		output = output[len(output)-most:]
	}
	return string(output)
}
