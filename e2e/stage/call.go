// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Report is what a series of calls came to, as `echo call` prints it.
type Report struct {
	Text string
	Err  error // calls failed, or were answered by somebody else
}

// Call runs `echo call` in the app container of a workload's first pod. It does not need
// the cluster's API server once the pods are known.
func (s *Stage) Call(ctx context.Context, cluster, workload string, args ...string) (Report, error) {
	c, pod, err := s.callerPod(ctx, cluster, workload)
	if err != nil {
		return Report{}, err
	}
	var out, errs bytes.Buffer
	err = c.nodes.exec(ctx, pod, "app", append([]string{"echo", "call"}, args...), nil, &out, &errs)
	if err != nil {
		err = fmt.Errorf("%s: call %s: %w\n%s%s", workload, strings.Join(args, " "), err, &errs, &out)
	}
	return Report{Text: out.String(), Err: err}, nil
}

// Load is a series of calls in the background.
type Load struct {
	stdin io.Closer // its end is the order to stop
	done  chan struct{}

	mu     sync.Mutex
	report Report
}

// Load starts `echo call` in the background, until Stop.
func (s *Stage) Load(ctx context.Context, cluster, workload string, args ...string) (*Load, error) {
	c, pod, err := s.callerPod(ctx, cluster, workload)
	if err != nil {
		return nil, err
	}
	stdin, order := io.Pipe()
	l := &Load{stdin: order, done: make(chan struct{})}
	s.mu.Lock()
	s.loads = append(s.loads, l)
	s.mu.Unlock()
	// The duration only bounds calls that were forgotten.
	args = append([]string{"echo", "call", "--until-eof", "--count", "0", "--duration", "10m"}, args...)
	ctx = context.WithoutCancel(ctx)
	go func() {
		defer close(l.done)
		var out, errs bytes.Buffer
		err := c.nodes.exec(ctx, pod, "app", args, stdin, &out, &errs)
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, &errs)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.report = Report{Text: out.String(), Err: err}
	}()
	return l, nil
}

// Stop lets the calls under way finish and returns what all came to.
func (l *Load) Stop() (Report, error) {
	l.stdin.Close()
	select {
	case <-l.done:
	case <-time.After(Patience):
		return Report{}, fmt.Errorf("calls did not end within %v", Patience)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.report, nil
}

// Ended waits until the calls end by themselves and returns what all came to.
func (l *Load) Ended() (Report, error) {
	select {
	case <-l.done:
	case <-time.After(Patience):
		return Report{}, fmt.Errorf("calls have not ended after %v", Patience)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.report, nil
}

// callerPod finds the first pod of a workload, and remembers it for when the API server
// cannot be asked.
func (s *Stage) callerPod(ctx context.Context, cluster, workload string) (*Cluster, string, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return nil, "", err
	}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	pods, err := s.Pods(short, cluster, workload)
	if err == nil {
		s.remember(cluster, workload, pods)
	}
	pod, ok := c.nodes.remembered(workload)
	if !ok {
		return nil, "", fmt.Errorf("no pod of %s in %s: %w", workload, cluster, err)
	}
	return c, pod, nil
}

// remember keeps the first pod of a workload for when the API server cannot be asked.
func (s *Stage) remember(cluster, workload string, pods []corev1.Pod) {
	if c, err := s.cluster(cluster); err == nil && len(pods) > 0 {
		c.nodes.remember(workload, pods[0].Namespace+"/"+pods[0].Name)
	}
}
