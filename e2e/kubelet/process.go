// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is one run of a container's program.
type process struct {
	pid     int // of the container's first process, as the kubelet sees it
	started time.Time
	done    chan struct{} // closed when all processes of the container have ended
	exit    exitState     // valid after done
}

// exitState is how a process ended.
type exitState struct {
	Code     int // 128 + signal if a signal ended it
	Signal   int
	Finished time.Time
}

// startProcess runs a container by re-executing shim, the path of a program
// that calls [Shim], and writes what it says to output. It returns when the
// container's own program runs, or with the reason why it does not.
func startProcess(shim string, spec shimSpec, output *containerLog) (*process, error) {
	stdout, stderr := output.stream("stdout"), output.stream("stderr")
	specIn, specOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	failIn, failOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, specIn.Close(), specOut.Close())
	}
	defer failIn.Close()
	cmd := &exec.Cmd{
		Path:       shim,
		Args:       []string{shimName},
		Env:        []string{},
		Dir:        "/",
		Stdout:     stdout,
		Stderr:     stderr,
		ExtraFiles: []*os.File{specIn, failOut},
		WaitDelay:  2 * time.Second,
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
			Setsid:     true,
		},
	}
	err = cmd.Start()
	specIn.Close()
	failOut.Close()
	if err != nil {
		specOut.Close()
		return nil, fmt.Errorf("start %s: %w", shim, err)
	}
	err = json.NewEncoder(specOut).Encode(spec)
	specOut.Close()
	failure, readErr := io.ReadAll(failIn)
	if err = errors.Join(err, readErr); err != nil || len(failure) > 0 {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if len(failure) > 0 {
			return nil, errors.New(string(failure))
		}
		return nil, fmt.Errorf("start container: %w", err)
	}
	p := &process{pid: cmd.Process.Pid, started: time.Now(), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		_ = cmd.Wait()
		stdout.flush()
		stderr.flush()
		p.exit = exitOf(cmd.ProcessState)
	}()
	return p, nil
}

// exitOf tells how a waited-for process ended.
func exitOf(state *os.ProcessState) exitState {
	exit := exitState{Code: -1, Finished: time.Now()}
	if state == nil {
		return exit
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case ok && status.Signaled():
		exit.Signal = int(status.Signal())
		exit.Code = 128 + exit.Signal
	default:
		exit.Code = state.ExitCode()
	}
	return exit
}

// signal sends sig to the first process; an ended one is left alone.
func (p *process) signal(sig syscall.Signal) {
	select {
	case <-p.done:
	default:
		_ = syscall.Kill(p.pid, sig)
	}
}

// stop sends SIGTERM, and SIGKILL after grace; it returns when the process has ended.
func (p *process) stop(ctx context.Context, grace time.Duration) {
	p.signal(syscall.SIGTERM)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-p.done:
		return
	case <-timer.C:
	case <-ctx.Done():
	}
	p.signal(syscall.SIGKILL)
	<-p.done
}

// execution describes a further process inside a running container.
type execution struct {
	Args     []string
	Env      []string
	Dir      string
	Identity identity
	Stdin    io.Reader
	Stdout   io.Writer
	Stderr   io.Writer
	Terminal *terminal // instead of the three streams
}

// execIn runs a command inside the container of p and waits for it. When ctx
// ends the command is killed. A command that ran and failed gives an *exec.ExitError.
func execIn(ctx context.Context, p *process, e execution) error {
	cmd, err := e.command()
	if err != nil {
		return err
	}
	err = inContainer(p.pid, func() error {
		program, err := lookProgram(e.Args[0], e.Env)
		if err != nil {
			return err
		}
		cmd.Path, cmd.Dir = program, e.Dir
		if err := e.Identity.limit(); err != nil {
			return err
		}
		return cmd.Start()
	})
	if e.Terminal != nil {
		e.Terminal.inside.Close()
	}
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	err = cmd.Wait()
	if ctx.Err() != nil {
		return fmt.Errorf("command %q: %w", e.Args[0], ctx.Err())
	}
	if errors.Is(err, exec.ErrWaitDelay) { // a child keeps the streams; the command itself succeeded
		return nil
	}
	return err
}

// command prepares the command, but for what must be looked up inside the container.
func (e execution) command() (*exec.Cmd, error) {
	cmd := &exec.Cmd{Args: e.Args, Env: e.Env, Stdout: e.Stdout, Stderr: e.Stderr, WaitDelay: time.Second}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	groups := make([]uint32, 0, len(e.Identity.Groups))
	for _, group := range e.Identity.Groups {
		groups = append(groups, uint32(group))
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(e.Identity.UID), Gid: uint32(e.Identity.GID), Groups: groups}
	if e.Terminal != nil {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = e.Terminal.inside, e.Terminal.inside, e.Terminal.inside
		cmd.SysProcAttr.Setctty = true
		return cmd, nil
	}
	if e.Stdin == nil {
		return cmd, nil
	}
	// Not cmd.Stdin: Wait would wait for a person who types nothing any more.
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	go func() {
		_, _ = io.Copy(pipe, e.Stdin)
		pipe.Close()
	}()
	return cmd, nil
}
