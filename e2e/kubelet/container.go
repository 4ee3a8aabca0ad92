// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// role is what a container is for its pod.
type role int

const (
	roleMain    role = iota
	roleInit         // runs to its end before the next one starts
	roleSidecar      // an init container that goes on running beside the main ones
)

// container runs one container of a pod, again and again as the restart policy wants.
type container struct {
	role   role
	policy corev1.RestartPolicy // of this container: Always, OnFailure, Never
	spec   *corev1.Container
	grace  time.Duration // of the pod
	engine engine
	log    *slog.Logger

	life     context.Context // ends when the container must not be started again
	end      context.CancelFunc
	up       chan struct{} // closed when it has started for the first time (startup probe included)
	finished chan struct{} // closed when it will never run again

	mu       sync.Mutex
	attempt  int32
	state    corev1.ContainerState
	last     corev1.ContainerState
	started  bool
	ready    bool
	proc     *process // while it runs
	running  shimSpec // what proc was started with
	output   *containerLog
	ran      bool // output is of a run, not of a start that failed
	previous *containerLog
}

// engine is what a container needs from its pod's worker.
type engine interface {
	// prepare computes what to run now.
	prepare(ctx context.Context, c *corev1.Container) (shimSpec, error)
	// start runs it, see startProcess.
	start(spec shimSpec, output *containerLog) (*process, error)
	// target is what the container's probes and hooks act upon.
	target(c *container) target
	// changed says that the container's state is another one.
	changed()
	// logDir is where the container's logs go.
	logDir(c *corev1.Container) (string, error)
	backoff() Backoff
}

func newContainer(ctx context.Context, r role, pod *corev1.Pod, spec *corev1.Container, e engine, log *slog.Logger) *container {
	c := &container{
		role: r, spec: spec, policy: pod.Spec.RestartPolicy, grace: 30 * time.Second, engine: e,
		log: log.With("container", spec.Name), up: make(chan struct{}), finished: make(chan struct{}),
	}
	if r == roleSidecar {
		c.policy = corev1.RestartPolicyAlways
	}
	if r == roleInit && c.policy == corev1.RestartPolicyAlways {
		c.policy = corev1.RestartPolicyOnFailure
	}
	if seconds := pod.Spec.TerminationGracePeriodSeconds; seconds != nil {
		c.grace = time.Duration(*seconds) * time.Second
	}
	c.life, c.end = context.WithCancel(ctx)
	c.state = waiting("PodInitializing", "")
	return c
}

func waiting(reason, message string) corev1.ContainerState {
	return corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}
}

// run runs the container until it has ended for good.
func (c *container) run() {
	defer close(c.finished)
	var wait time.Duration
	for c.life.Err() == nil {
		began := time.Now()
		exit, err := c.runOnce()
		if err == nil && !c.wantsRestart(exit) {
			return
		}
		wait = c.engine.backoff().next(wait, time.Since(began))
		if err == nil {
			c.setWaiting("CrashLoopBackOff", fmt.Sprintf("back-off %s restarting container %s", wait, c.spec.Name))
		} else if c.life.Err() == nil {
			c.log.Warn("container does not start", "error", err)
			c.setWaiting("CreateContainerError", err.Error())
		}
		if !sleep(c.life, wait) {
			return
		}
	}
}

func (c *container) wantsRestart(exit exitState) bool {
	if c.life.Err() != nil {
		return false
	}
	return c.policy == corev1.RestartPolicyAlways || c.policy == corev1.RestartPolicyOnFailure && exit.Code != 0
}

// runOnce starts the program and waits for its end. An error means that it never ran.
func (c *container) runOnce() (exitState, error) {
	spec, err := c.engine.prepare(c.life, c.spec)
	if err != nil {
		return exitState{}, err
	}
	output, err := c.openLog()
	if err != nil {
		return exitState{}, err
	}
	defer output.Close()
	p, err := c.engine.start(spec, output)
	if err != nil {
		return exitState{}, err
	}
	if !c.setRunning(p, spec) {
		p.stop(c.life, 0)
	}
	c.log.Debug("container runs", "pid", p.pid)
	probing, stopProbing := context.WithCancel(context.Background())
	var probes sync.WaitGroup
	probes.Go(func() { c.attend(probing, p) })
	<-p.done
	stopProbing()
	probes.Wait()
	output.Close()
	c.setTerminated(p)
	return p.exit, nil
}

// openLog begins the log of the next run.
func (c *container) openLog() (*containerLog, error) {
	dir, err := c.engine.logDir(c.spec)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	output, err := createLog(filepath.Join(dir, fmt.Sprintf("%d.log", c.attempt)), time.Now)
	if err != nil {
		return nil, err
	}
	if c.ran {
		if c.previous != nil {
			_ = os.Remove(c.previous.path)
		}
		c.previous, c.ran = c.output, false
	}
	c.output = output
	return output, nil
}

// attend runs the hook after the start, then the probes, until ctx ends.
func (c *container) attend(ctx context.Context, p *process) {
	if hooks := c.spec.Lifecycle; hooks != nil && hooks.PostStart != nil {
		if err := c.engine.target(c).hook(ctx, hooks.PostStart); err != nil && ctx.Err() == nil {
			c.kill(p, "postStart hook failed", err, c.grace)
			return
		}
	}
	if c.spec.StartupProbe != nil && !c.awaitStartup(ctx, p) {
		return
	}
	c.setStarted()
	var all sync.WaitGroup
	if probe := c.spec.ReadinessProbe; probe == nil {
		c.setReady(true, nil)
	} else {
		all.Go(func() { c.prober(probe, true, func(err error) { c.setReady(err == nil, err) }).run(ctx) })
	}
	if probe := c.spec.LivenessProbe; probe != nil {
		all.Go(func() {
			c.prober(probe, false, func(err error) {
				if err != nil {
					c.kill(p, "liveness probe failed", err, c.probeGrace(probe))
				}
			}).run(ctx)
		})
	}
	all.Wait()
}

// awaitStartup reports whether the startup probe succeeded; a container that fails it is killed.
func (c *container) awaitStartup(ctx context.Context, p *process) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	passed := false
	c.prober(c.spec.StartupProbe, true, func(err error) {
		passed = err == nil
		cancel()
		if err != nil {
			c.kill(p, "startup probe failed", err, c.probeGrace(c.spec.StartupProbe))
		}
	}).run(ctx)
	return passed
}

func (c *container) prober(spec *corev1.Probe, eager bool, report func(error)) *prober {
	target := c.engine.target(c)
	return &prober{spec: spec, eager: eager, report: report, check: func(ctx context.Context) error {
		return target.probe(ctx, spec.ProbeHandler)
	}}
}

func (c *container) probeGrace(probe *corev1.Probe) time.Duration {
	if own := probe.TerminationGracePeriodSeconds; own != nil {
		return time.Duration(*own) * time.Second
	}
	return c.grace
}

// kill ends a run because of a probe or hook; the restart policy decides what follows.
func (c *container) kill(p *process, why string, err error, grace time.Duration) {
	select {
	case <-p.done:
		return
	default:
	}
	c.log.Info("container is killed", "why", why, "error", err)
	c.setReady(false, err)
	deadline := time.Now().Add(grace)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	c.preStop(ctx)
	cancel()
	p.stop(context.Background(), max(time.Until(deadline), minGrace(deadline)))
}

// stop ends the container for good: the preStop hook, then, once turn is closed
// (nil: at once), SIGTERM, and SIGKILL at the deadline or when hurry ends.
// It returns when all its processes have ended.
func (c *container) stop(hurry context.Context, deadline time.Time, turn <-chan struct{}) {
	c.mu.Lock()
	c.end()
	p := c.proc
	c.mu.Unlock()
	if p != nil {
		ctx, cancel := context.WithDeadline(hurry, deadline)
		c.preStop(ctx)
		if turn != nil {
			select {
			case <-turn:
			case <-ctx.Done():
			case <-p.done:
			}
		}
		cancel()
		p.stop(hurry, max(time.Until(deadline), minGrace(deadline)))
	}
	<-c.finished
}

// minGrace is what a process gets when its hooks or turn took all the time.
func minGrace(deadline time.Time) time.Duration {
	if deadline.IsZero() {
		return 0
	}
	return 2 * time.Second
}

// preStop runs the container's preStop hook, if there is time for it.
func (c *container) preStop(ctx context.Context) {
	if hooks := c.spec.Lifecycle; hooks != nil && hooks.PreStop != nil && ctx.Err() == nil {
		if err := c.engine.target(c).hook(ctx, hooks.PreStop); err != nil {
			c.log.Warn("preStop hook failed", "error", err)
		}
	}
}

// setRunning notes a new process; false means that the container was stopped meanwhile.
func (c *container) setRunning(p *process, spec shimSpec) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.proc, c.running, c.ran = p, spec, true
	c.state = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(p.started)}}
	c.engine.changed()
	return c.life.Err() == nil
}

func (c *container) setTerminated(p *process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reason := "Completed"
	if p.exit.Code != 0 {
		reason = "Error"
	}
	c.state = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
		ExitCode: int32(p.exit.Code), Signal: int32(p.exit.Signal), Reason: reason,
		StartedAt: metav1.NewTime(p.started), FinishedAt: metav1.NewTime(p.exit.Finished),
	}}
	c.proc, c.started, c.ready = nil, false, false
	c.engine.changed()
}

// setWaiting notes why the container does not run, and keeps how it ended before.
func (c *container) setWaiting(reason, message string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Terminated != nil {
		c.last = c.state
		c.attempt++
	}
	c.state = waiting(reason, message)
	c.engine.changed()
}

func (c *container) setStarted() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.proc == nil {
		return
	}
	c.started = true
	select {
	case <-c.up:
	default:
		close(c.up)
	}
	c.engine.changed()
}

func (c *container) setReady(ready bool, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ready == ready || c.proc == nil {
		return
	}
	c.ready = ready
	c.log.Debug("readiness changed", "ready", ready, "error", why)
	c.engine.changed()
}

// errNotRunning says that a command or probe came while the container does not run.
var errNotRunning = errors.New("container is not running")

// exec runs a further command inside the running container.
func (c *container) exec(ctx context.Context, e execution) error {
	c.mu.Lock()
	p, spec := c.proc, c.running
	c.mu.Unlock()
	if p == nil {
		return fmt.Errorf("container %s: %w", c.spec.Name, errNotRunning)
	}
	e.Env, e.Dir, e.Identity = spec.Env, spec.WorkingDir, spec.Identity
	if e.Terminal != nil {
		e.Env = append([]string{"TERM=xterm"}, e.Env...)
	}
	return execIn(ctx, p, e)
}

// status is what the pod's status says about the container.
func (c *container) status() corev1.ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	started := c.started
	status := corev1.ContainerStatus{
		Name: c.spec.Name, Image: c.spec.Image, ImageID: c.spec.Image, State: c.state,
		LastTerminationState: c.last, Ready: c.ready, RestartCount: c.attempt, Started: &started,
	}
	if c.role == roleInit {
		status.Ready = c.state.Terminated != nil && c.state.Terminated.ExitCode == 0
	}
	if c.output != nil {
		status.ContainerID = fmt.Sprintf("isthmus://%s-%d", c.spec.Name, c.attempt)
	}
	return status
}

// exitCode tells how the container ended; false means it has not.
func (c *container) exitCode() (int32, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Terminated == nil {
		return 0, false
	}
	return c.state.Terminated.ExitCode, true
}

// logOf gives the log of the current or the previous run.
func (c *container) logOf(previous bool) (*containerLog, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case previous && c.ran && c.state.Waiting != nil:
		return c.output, nil // it has not started again yet: its last log is the previous one
	case previous && c.previous != nil:
		return c.previous, nil
	case previous:
		return nil, fmt.Errorf("previous terminated container %q not found", c.spec.Name)
	case c.output == nil:
		return nil, fmt.Errorf("container %q is waiting to start", c.spec.Name)
	}
	return c.output, nil
}
