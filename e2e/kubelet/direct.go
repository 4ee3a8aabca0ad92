// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
)

// Exec runs a command in a running container and waits for it, without the API
// server. An empty container name means the first one. Nil streams are
// empty or discarded. A command that ran and failed gives an *exec.ExitError.
func (k *Kubelet) Exec(ctx context.Context, namespace, pod, container string, command []string, stdin io.Reader, stdout, stderr io.Writer) error {
	c, err := k.container(namespace, pod, container)
	if err != nil {
		return err
	}
	if err := c.exec(ctx, execution{Args: command, Stdin: stdin, Stdout: stdout, Stderr: stderr}); err != nil {
		return fmt.Errorf("exec in pod %s/%s: %w", namespace, pod, err)
	}
	return nil
}

// Signal sends a signal to a container as seen from outside, so that even
// process 1 gets SIGKILL. SIGSTOP and SIGCONT go to all its processes, other
// signals to process 1 alone; when that ends, the kernel kills the rest.
func (k *Kubelet) Signal(namespace, pod, container string, signal syscall.Signal) error {
	c, err := k.container(namespace, pod, container)
	if err != nil {
		return err
	}
	c.mu.Lock()
	p := c.proc
	c.mu.Unlock()
	if p == nil {
		return fmt.Errorf("pod %s/%s: container %s: %w", namespace, pod, c.spec.Name, errNotRunning)
	}
	if signal != syscall.SIGSTOP && signal != syscall.SIGCONT {
		p.signal(signal)
		return nil
	}
	pids, err := p.family()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		_ = syscall.Kill(pid, signal) // one that has ended meanwhile needs none
	}
	return nil
}

// Logs copies what the container's current (or previous) run wrote, without the API server.
func (k *Kubelet) Logs(ctx context.Context, w io.Writer, namespace, pod, container string, previous bool) error {
	c, err := k.container(namespace, pod, container)
	if err != nil {
		return err
	}
	log, err := c.logOf(previous)
	if err != nil {
		return err
	}
	return log.copyTo(ctx, w, logOptions{Tail: -1})
}

// NetNS gives the file of a pod's network namespace, for setns(2).
func (k *Kubelet) NetNS(namespace, pod string) (string, error) {
	w, err := k.worker(namespace, pod)
	if err != nil {
		return "", err
	}
	if len(w.facts().PodIPs) == 0 {
		return "", fmt.Errorf("pod %s/%s has no network yet", namespace, pod)
	}
	return w.namespace.Path(), nil
}

func (k *Kubelet) container(namespace, pod, name string) (*container, error) {
	w, err := k.worker(namespace, pod)
	if err != nil {
		return nil, err
	}
	return w.find(name)
}

// family lists the processes of a container: those in the PID namespace of its first one.
func (p *process) family() ([]int, error) {
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", p.pid))
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", p.pid, err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err == nil && space == own {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
