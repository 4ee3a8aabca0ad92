// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// worker brings one pod to life and to its end.
type worker struct {
	k    *Kubelet
	node *node
	log  *slog.Logger
	dir  string // state of the pod: volumes, logs, /etc/hosts

	dirty   chan struct{} // the status may be another one
	refresh chan struct{} // volumes may be others
	deleted chan struct{} // closed when the pod has a deletion timestamp, or is gone
	gone    context.Context
	isGone  context.CancelFunc // the object is gone from the API: no time to lose
	hurry   context.Context    // ends with gone, and when the kubelet itself ends
	done    chan struct{}      // closed when nothing of the pod is left

	namespace Namespace
	volumes   *volumes

	mu          sync.Mutex
	pod         *corev1.Pod // the newest version
	addrs       []netip.Addr
	inits       []*container // those launched so far, in order
	mains       []*container
	initialized bool
	failure     error // why the pod is not set up yet
	final       corev1.PodPhase
}

func newWorker(k *Kubelet, n *node, pod *corev1.Pod) *worker {
	w := &worker{
		k: k, node: n, pod: pod,
		log:     k.Log.With("pod", pod.Namespace+"/"+pod.Name),
		dir:     filepath.Join(k.Dir, string(pod.UID)),
		dirty:   make(chan struct{}, 1),
		refresh: make(chan struct{}, 1),
		deleted: make(chan struct{}),
		done:    make(chan struct{}),
	}
	w.gone, w.isGone = context.WithCancel(context.Background())
	w.update(pod)
	return w
}

// newest gives the newest version of the pod; it must not be changed.
func (w *worker) newest() *corev1.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pod
}

// update takes a newer version of the pod.
func (w *worker) update(pod *corev1.Pod) {
	w.mu.Lock()
	w.pod = pod
	w.mu.Unlock()
	if pod.DeletionTimestamp != nil {
		w.beginDeletion()
	}
	poke(w.refresh)
	poke(w.dirty) // readiness gates are conditions that others write
}

// vanish says that the pod is gone from the API.
func (w *worker) vanish() {
	w.isGone()
	w.beginDeletion()
}

func (w *worker) beginDeletion() {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.deleted:
	default:
		close(w.deleted)
	}
}

// poke wakes the receiver of a channel of capacity one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run lives as long as the pod. When ctx ends, all is killed and nothing is written to the API.
func (w *worker) run(ctx context.Context) {
	defer close(w.done)
	hurry, rush := context.WithCancel(w.gone)
	defer rush()
	defer context.AfterFunc(ctx, rush)()
	w.hurry = hurry
	live, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-w.deleted:
		case <-live.Done():
		}
		cancel()
	}()
	writing, stopWriting := context.WithCancel(ctx)
	var writer sync.WaitGroup
	writer.Go(func() { w.writeStatus(writing) })
	if phase := w.newest().Status.Phase; phase != corev1.PodSucceeded && phase != corev1.PodFailed {
		w.play(live)
	}
	<-live.Done()
	w.shutDown(ctx)
	stopWriting()
	writer.Wait()
	if err := w.tearDown(); err != nil {
		w.log.Error("pod leaves something behind", "error", err)
	}
	w.finish(ctx)
}

// play sets the pod up and runs its containers until they have ended for good or live ends.
func (w *worker) play(live context.Context) {
	if !w.setUp(live) {
		return
	}
	go w.keepVolumes(live)
	if !w.runInits(live) {
		return
	}
	w.mu.Lock()
	w.initialized = true
	pod := w.pod
	for i := range pod.Spec.Containers {
		w.mains = append(w.mains, w.launch(live, roleMain, pod, &pod.Spec.Containers[i]))
	}
	mains := w.mains
	w.mu.Unlock()
	w.changed()
	for _, c := range mains {
		select {
		case <-c.finished:
		case <-live.Done():
			return
		}
	}
	if live.Err() == nil {
		w.log.Debug("all main containers have ended")
		w.stopAll(time.Now().Add(w.grace()))
	}
}

// launch starts a container. The caller holds w.mu. The container outlives live:
// its end is for shutDown to arrange.
func (w *worker) launch(live context.Context, r role, pod *corev1.Pod, spec *corev1.Container) *container {
	c := newContainer(context.WithoutCancel(live), r, pod, spec, w, w.log)
	go c.run()
	return c
}

// runInits runs the init containers in order; false means that the main ones must not run.
func (w *worker) runInits(live context.Context) bool {
	pod := w.newest()
	for i := range pod.Spec.InitContainers {
		spec := &pod.Spec.InitContainers[i]
		r := roleInit
		if spec.RestartPolicy != nil && *spec.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			r = roleSidecar
		}
		if live.Err() != nil {
			return false
		}
		w.mu.Lock()
		c := w.launch(live, r, pod, spec)
		w.inits = append(w.inits, c)
		w.mu.Unlock()
		up := c.finished
		if r == roleSidecar {
			up = c.up
		}
		select {
		case <-up:
		case <-live.Done():
			return false
		}
		if code, ended := c.exitCode(); r == roleInit && (!ended || code != 0) {
			w.log.Info("init container failed for good", "container", spec.Name)
			w.stopAll(time.Now().Add(w.grace()))
			w.setFinal(corev1.PodFailed)
			return false
		}
	}
	return true
}

// setUp makes network and volumes, however often it takes; false means that live ended.
func (w *worker) setUp(live context.Context) bool {
	for pause := 20 * time.Millisecond; live.Err() == nil; pause = min(2*pause, time.Second) {
		err := w.trySetUp(live)
		w.mu.Lock()
		w.failure = err
		w.mu.Unlock()
		w.changed()
		if err == nil {
			return true
		}
		if !isMissing(err) {
			w.log.Warn("pod is not set up yet", "error", err)
		}
		if !sleep(live, pause) {
			return false
		}
	}
	return false
}

// trySetUp does what is not done yet.
func (w *worker) trySetUp(live context.Context) error {
	pod := w.newest()
	if err := refuse(pod); err != nil {
		return err
	}
	if err := os.MkdirAll(w.dir, 0o755); err != nil {
		return err
	}
	if w.namespace == nil {
		if err := w.connect(live, pod); err != nil {
			return err
		}
	}
	if w.volumes == nil {
		if err := w.writeEtc(pod); err != nil {
			return err
		}
		w.volumes = &volumes{
			dir: filepath.Join(w.dir, "volumes"), pod: w.newest, known: w.facts(),
			objects: w.k, tokens: newTokens(w.k.issueToken, time.Now),
		}
	}
	return w.volumes.setUp(live)
}

// refuse names what a pod asks for and the test bed does not have.
func refuse(pod *corev1.Pod) error {
	switch {
	case pod.Spec.HostNetwork:
		return errors.New("spec.hostNetwork is not supported by the test bed")
	case pod.Spec.HostPID || pod.Spec.HostIPC:
		return errors.New("spec.hostPID and hostIPC are not supported by the test bed")
	case pod.Spec.ShareProcessNamespace != nil && *pod.Spec.ShareProcessNamespace:
		return errors.New("spec.shareProcessNamespace is not supported by the test bed")
	}
	return nil
}

// connect makes the pod's network namespace.
func (w *worker) connect(live context.Context, pod *corev1.Pod) error {
	addrs, err := w.node.address(pod)
	if err != nil {
		return err
	}
	ns, err := w.k.Network.Attach(live, pod.Name+"-"+string(pod.UID)[:min(8, len(pod.UID))], addrs)
	if err != nil {
		w.node.release(addrs)
		return fmt.Errorf("network: %w", err)
	}
	w.namespace = ns
	w.mu.Lock()
	w.addrs = addrs
	w.mu.Unlock()
	sysctls := map[string]string{"net/ipv4/ip_unprivileged_port_start": "0"}
	if s := pod.Spec.SecurityContext; s != nil {
		for _, c := range s.Sysctls {
			sysctls[sysctlPath(c.Name)] = c.Value
		}
	}
	return setSysctls(ns.Path(), sysctls)
}

// keepVolumes renders the volumes again when something they show changed or a token ages.
func (w *worker) keepVolumes(live context.Context) {
	for {
		next, err := w.volumes.refresh(live)
		if err != nil && live.Err() == nil {
			w.log.Warn("volumes are not up to date", "error", err)
		}
		wake, stop := alarm(next, err != nil)
		select {
		case <-w.refresh:
		case <-wake:
		case <-live.Done():
			stop()
			return
		}
		stop()
	}
}

// alarm fires at a time (zero: never), and soon after a failure.
func alarm(at time.Time, failed bool) (<-chan time.Time, func() bool) {
	if at.IsZero() && !failed {
		return nil, func() bool { return true }
	}
	wait := time.Until(at)
	if failed {
		wait = time.Second
	}
	timer := time.NewTimer(wait)
	return timer.C, timer.Stop
}

// grace is how long the pod may take to end.
func (w *worker) grace() time.Duration {
	pod := w.newest()
	seconds := int64(30)
	if own := pod.Spec.TerminationGracePeriodSeconds; own != nil {
		seconds = *own
	}
	if asked := pod.DeletionGracePeriodSeconds; asked != nil {
		seconds = *asked
	}
	return time.Duration(seconds) * time.Second
}

// shutDown ends all containers: the main ones together, then the sidecars, last one first.
// All at once and by force if the kubelet itself ends or the pod is gone from the API.
func (w *worker) shutDown(ctx context.Context) {
	if ctx.Err() != nil {
		w.stopAll(time.Time{})
		return
	}
	w.stopAll(time.Now().Add(w.grace()))
	w.setFinal("")
}

// stopAll returns when all containers have ended. Hooks run at once; a sidecar's
// SIGTERM waits until the main containers and the sidecars after it have ended.
func (w *worker) stopAll(deadline time.Time) {
	w.mu.Lock()
	inits, mains := w.inits, w.mains
	w.mu.Unlock()
	var first sync.WaitGroup
	for _, c := range mains {
		first.Go(func() { c.stop(w.hurry, deadline, nil) })
	}
	turn := make(chan struct{})
	go func(turn chan struct{}) {
		first.Wait()
		close(turn)
	}(turn)
	var all sync.WaitGroup
	for i := len(inits) - 1; i >= 0; i-- {
		c, mine, next := inits[i], turn, make(chan struct{})
		all.Go(func() {
			c.stop(w.hurry, deadline, mine)
			<-mine
			close(next)
		})
		turn = next
	}
	all.Wait()
	<-turn
}

// setFinal fixes the phase of a pod that will not run again; "" derives it from the exit codes.
func (w *worker) setFinal(phase corev1.PodPhase) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.final != "" {
		return
	}
	if phase == "" {
		phase = corev1.PodSucceeded
		for _, c := range w.mains {
			if code, _ := c.exitCode(); code != 0 {
				phase = corev1.PodFailed
			}
		}
		if len(w.mains) == 0 {
			phase = corev1.PodFailed
		}
	}
	w.final = phase
}

// tearDown removes what setUp made.
func (w *worker) tearDown() error {
	var all error
	if w.volumes != nil {
		all = errors.Join(all, w.volumes.tearDown())
	}
	if w.namespace != nil {
		all = errors.Join(all, w.namespace.Close())
	}
	w.mu.Lock()
	addrs := w.addrs
	w.mu.Unlock()
	w.node.release(addrs)
	return errors.Join(all, os.RemoveAll(w.dir))
}

// facts are what the environment and volumes tell about the pod.
func (w *worker) facts() facts {
	w.mu.Lock()
	defer w.mu.Unlock()
	return facts{PodIPs: w.addrs, HostIPs: []netip.Addr{w.node.Address}}
}

// changed implements engine.
func (w *worker) changed() { poke(w.dirty) }

// backoff implements engine.
func (w *worker) backoff() Backoff { return w.k.Backoff }

// logDir implements engine.
func (w *worker) logDir(c *corev1.Container) (string, error) {
	dir := filepath.Join(w.dir, "logs", c.Name)
	return dir, os.MkdirAll(dir, 0o755)
}

// target implements engine.
func (w *worker) target(c *container) target {
	from := w.namespace
	if w.k.ProbeFrom != nil {
		from = w.k.ProbeFrom
	}
	return target{
		podIP: joinAddrs(w.facts().PodIPs[:1]), ports: c.spec.Ports,
		dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return dialIn(ctx, from.Path(), network, address)
		},
		exec: func(ctx context.Context, command []string) error {
			return c.exec(ctx, execution{Args: command})
		},
	}
}

// find gives a container by name; "" means the first main one.
func (w *worker) find(name string) (*container, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range append(append([]*container(nil), w.mains...), w.inits...) {
		if name == "" || c.spec.Name == name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("container %q is not running", name)
}
