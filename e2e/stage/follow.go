// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Follow is what some pods log, from their beginning to their end.
type Follow struct {
	workload string
	done     sync.WaitGroup

	mu    sync.Mutex
	lines []string
	open  map[string]bool // pods that have not ended
}

// Follow starts to follow the logs of the pods that a workload has at this moment, until
// they end. It returns when every one of them is followed: none is too new, none is gone.
func (s *Stage) Follow(ctx context.Context, cluster, workload string) (*Follow, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return nil, err
	}
	pods, err := s.Pods(ctx, cluster, workload)
	if err != nil {
		return nil, err
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("%s in %s has no pods to follow", workload, cluster)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.World.OnClose(func() error { cancel(); return nil })
	f := &Follow{workload: workload, open: map[string]bool{}}
	for _, pod := range pods {
		f.open[pod.Name] = true
	}
	for _, pod := range pods {
		stream, err := c.Client().CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Follow: true}).Stream(ctx)
		if err != nil {
			cancel()
			return nil, fmt.Errorf("follow %s: %w", pod.Name, err)
		}
		f.done.Go(func() {
			defer stream.Close()
			lines := bufio.NewScanner(stream)
			for lines.Scan() {
				f.add(pod.Name, lines.Text())
			}
			f.end(pod.Name, lines.Err())
		})
	}
	return f, nil
}

func (f *Follow) add(pod, line string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines = append(f.lines, pod+" "+line)
}

func (f *Follow) end(pod string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.open, pod)
	if err != nil {
		f.lines = append(f.lines, fmt.Sprintf("%s is followed no further: %v", pod, err))
	}
}

// Ended waits until the pods have ended, and returns what they logged.
func (f *Follow) Ended(patience time.Duration) (string, error) {
	ended := make(chan struct{})
	go func() { f.done.Wait(); close(ended) }()
	var late error
	select {
	case <-ended:
	case <-time.After(patience):
		late = errors.New("have not all ended")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	text := strings.Join(f.lines, "\n") + "\n"
	if late != nil {
		var open []string
		for pod := range f.open {
			open = append(open, pod)
		}
		late = fmt.Errorf("the pods of %s that are followed %w: %s\n%s", f.workload, late, strings.Join(open, ", "), text)
	}
	return text, late
}
