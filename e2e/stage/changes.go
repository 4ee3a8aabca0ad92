// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// Answerer is who answers a service, from a moment on.
type Answerer struct {
	Since time.Time
	Name  string // "cluster/pod", or "nobody"
}

// Observer calls a service without pause and tells when somebody else answers.
type Observer struct {
	// Changes end when the observer does.
	Changes <-chan Answerer

	stdin io.Closer
	done  chan error
}

// Observe starts calling, rate times a second, from the first pod of a workload.
func (s *Stage) Observe(ctx context.Context, cluster, workload, url string, rate int) (*Observer, error) {
	c, pod, err := s.callerPod(ctx, cluster, workload)
	if err != nil {
		return nil, err
	}
	stdin, order := io.Pipe()
	lines, stdout := io.Pipe()
	changes := make(chan Answerer, 100)
	o := &Observer{Changes: changes, stdin: order, done: make(chan error, 1)}
	command := []string{"echo", "call", url, "--changes", "--until-eof", "--count", "0", "--duration", "10m", "--rate", fmt.Sprint(rate)}
	ctx = context.WithoutCancel(ctx)
	go func() {
		var errs bytes.Buffer
		err := c.nodes.exec(ctx, pod, "app", command, stdin, stdout, &errs)
		stdout.Close()
		o.done <- err
	}()
	go func() {
		defer close(changes)
		for text := bufio.NewScanner(lines); text.Scan(); {
			at, name, _ := strings.Cut(text.Text(), " ")
			if since, err := time.Parse(time.RFC3339Nano, at); err == nil {
				changes <- Answerer{since, name}
			}
		}
		_, _ = io.Copy(io.Discard, lines)
	}()
	return o, nil
}

// Until waits for an answerer whose name has a prefix.
func (o *Observer) Until(ctx context.Context, prefix string) (Answerer, error) {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	last := "nobody yet"
	for {
		select {
		case a, open := <-o.Changes:
			if !open {
				return a, fmt.Errorf("the calls ended; the last answer came from %s", last)
			}
			if strings.HasPrefix(a.Name, prefix) {
				return a, nil
			}
			last = a.Name
		case <-ctx.Done():
			return Answerer{}, fmt.Errorf("want an answer from %s within %v; the last came from %s", prefix, Patience, last)
		}
	}
}

// Close ends the calls.
func (o *Observer) Close() {
	o.stdin.Close()
	for range o.Changes {
	}
	<-o.done // failed calls are what an observer is for
}

// Delay is how long one change of an endpoint took.
type Delay struct {
	// Mesh is from the moment at which the cluster's own EndpointSlice had the change to the
	// first call that went the new way; All is from the request that caused it.
	Mesh, All time.Duration
}

// Gate opens or closes the readiness gates of a workload's pods; they go on answering.
func (s *Stage) Gate(ctx context.Context, cluster, workload string, open bool) error {
	c, err := s.cluster(cluster)
	if err != nil {
		return err
	}
	pods, err := s.Pods(ctx, cluster, workload)
	if err != nil || len(pods) == 0 {
		return fmt.Errorf("%s in %s has %d pods: %w", workload, cluster, len(pods), err)
	}
	status := map[bool]string{true: "True", false: "False"}[open]
	patch := fmt.Sprintf(`{"status":{"conditions":[{"type":"isthmus-mesh.io/gate","status":%q}]}}`, status)
	for _, pod := range pods {
		_, err := c.Client().CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
		if err != nil {
			return err
		}
	}
	return nil
}

// MeasureChanges makes the one pod of a workload unready and ready again, n times together,
// by its readiness gate; the kubelet and the cluster's controllers do the rest. It returns
// the delays of coming and of going.
func (s *Stage) MeasureChanges(ctx context.Context, o *Observer, cluster, workload string, n int) (come, gone []Delay, err error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return nil, nil, err
	}
	namespace, name, _ := strings.Cut(workload, "/")
	endpoints, err := watchEndpoints(ctx, c, namespace, name)
	if err != nil {
		return nil, nil, err
	}
	defer endpoints.stop()
	return measure(ctx, o, endpoints, cluster+"/", n, func(in bool) error { return s.Gate(ctx, cluster, workload, in) })
}

// MeasureArrivals is MeasureChanges for an endpoint that appears ready, and disappears: a
// slice that is written by hand for a service without a selector. It leads to the one pod
// of a workload in the same namespace, on a port of the service's number.
func (s *Stage) MeasureArrivals(ctx context.Context, o *Observer, cluster, service, workload string, n int) (come, gone []Delay, err error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return nil, nil, err
	}
	namespace, name, _ := strings.Cut(service, "/")
	slice, err := s.slice(ctx, c, service, workload)
	if err != nil {
		return nil, nil, err
	}
	endpoints, err := watchEndpoints(ctx, c, namespace, name)
	if err != nil {
		return nil, nil, err
	}
	defer endpoints.stop()
	client := c.Client().DiscoveryV1().EndpointSlices(namespace)
	if _, err := client.Create(ctx, slice, metav1.CreateOptions{}); err != nil {
		return nil, nil, err
	}
	if _, err := endpoints.until(ctx, true); err != nil {
		return nil, nil, err
	}
	if _, err := o.Until(ctx, cluster+"/"); err != nil {
		return nil, nil, err
	}
	return measure(ctx, o, endpoints, cluster+"/", n, func(in bool) error {
		if !in {
			return client.Delete(ctx, slice.Name, metav1.DeleteOptions{})
		}
		_, err := client.Create(ctx, slice, metav1.CreateOptions{})
		return err
	})
}

// slice leads from a service's ports to the pod of a workload.
func (s *Stage) slice(ctx context.Context, c *Cluster, service, workload string) (*discoveryv1.EndpointSlice, error) {
	namespace, name, _ := strings.Cut(service, "/")
	pods, err := s.Pods(ctx, c.Name(), workload)
	if err != nil || len(pods) == 0 {
		return nil, fmt.Errorf("%s in %s has %d pods: %w", workload, c.Name(), len(pods), err)
	}
	svc, err := c.Client().CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	pod := &pods[0]
	out := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name + "-by-hand", Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints: []discoveryv1.Endpoint{{
			Addresses: []string{pod.Status.PodIP}, NodeName: &pod.Spec.NodeName,
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		}},
	}
	for _, p := range svc.Spec.Ports {
		out.Ports = append(out.Ports, discoveryv1.EndpointPort{Name: &p.Name, Port: &p.TargetPort.IntVal})
	}
	return out, nil
}

// measure makes n changes, beginning with an endpoint's going, and times each.
func measure(ctx context.Context, o *Observer, endpoints endpointWatch, who string, n int, change func(in bool) error) (come, gone []Delay, err error) {
	for i := range n {
		in := i%2 == 1 // it is there at first
		wait := "nobody"
		if in {
			wait = who
		}
		began := time.Now()
		if err := change(in); err != nil {
			return come, gone, err
		}
		written, err := endpoints.until(ctx, in)
		if err != nil {
			return come, gone, err
		}
		a, err := o.Until(ctx, wait)
		if err != nil {
			return come, gone, fmt.Errorf("change %d: %w", i+1, err)
		}
		d := Delay{Mesh: a.Since.Sub(written), All: a.Since.Sub(began)}
		if in {
			come = append(come, d)
		} else {
			gone = append(gone, d)
		}
	}
	return come, gone, nil
}

// endpointWatch tells when a service has endpoints and when not.
type endpointWatch struct {
	events <-chan presence
	stop   context.CancelFunc
}

type presence struct {
	at  time.Time
	any bool
}

func watchEndpoints(ctx context.Context, c *Cluster, namespace, service string) (endpointWatch, error) {
	ctx, cancel := context.WithCancel(ctx)
	w, err := c.Client().DiscoveryV1().EndpointSlices(namespace).Watch(ctx, metav1.ListOptions{
		LabelSelector: discoveryv1.LabelServiceName + "=" + service,
	})
	if err != nil {
		cancel()
		return endpointWatch{}, err
	}
	events := make(chan presence, 100)
	go func() {
		defer close(events)
		defer w.Stop()
		for e := range w.ResultChan() {
			slice, ok := e.Object.(*discoveryv1.EndpointSlice)
			if !ok {
				continue
			}
			ready := e.Type != watch.Deleted && slices.ContainsFunc(slice.Endpoints, func(e discoveryv1.Endpoint) bool {
				return e.Conditions.Ready == nil || *e.Conditions.Ready
			})
			select {
			case events <- presence{time.Now(), ready}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return endpointWatch{events, cancel}, nil
}

func (w endpointWatch) until(ctx context.Context, any bool) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	for {
		select {
		case p, open := <-w.events:
			if !open {
				return time.Time{}, fmt.Errorf("the watch of EndpointSlices ended")
			}
			if p.any == any {
				return p.at, nil
			}
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("the EndpointSlice did not follow within %v", Patience)
		}
	}
}
