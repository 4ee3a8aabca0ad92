// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

// writeStatus keeps the pod's status in the API equal to what is. While the API
// server is away it tries on, and then writes only the newest.
func (w *worker) writeStatus(ctx context.Context) {
	base := w.newest().Status
	pause := 50 * time.Millisecond
	for {
		select {
		case <-w.dirty:
		case <-ctx.Done():
			return
		}
		written, err := w.patchStatus(ctx, base)
		switch {
		case err == nil:
			base, pause = written, 50*time.Millisecond
		case apierrors.IsNotFound(err) || apierrors.IsConflict(err):
			return // the pod is gone; another one may have its name
		case ctx.Err() != nil:
			return
		default:
			w.log.Debug("status is not written yet", "error", err)
			if !sleep(ctx, pause) {
				return
			}
			pause = min(2*pause, 2*time.Second)
			poke(w.dirty)
		}
	}
}

// patchStatus writes the difference between base and the present status, if any.
func (w *worker) patchStatus(ctx context.Context, base corev1.PodStatus) (corev1.PodStatus, error) {
	pod := w.newest()
	status := w.status(base)
	if equality.Semantic.DeepEqual(base, status) {
		return base, nil
	}
	before, err := json.Marshal(corev1.Pod{Status: base})
	if err != nil {
		return base, err
	}
	after, err := json.Marshal(corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: pod.UID}, Status: status})
	if err != nil {
		return base, err
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(before, after, corev1.Pod{})
	if err != nil {
		return base, err
	}
	asked, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	written, err := w.k.Client.CoreV1().Pods(pod.Namespace).Patch(asked, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return base, err
	}
	return written.Status, nil
}

// finish writes the last status and removes the pod from the API, if that asked for it.
func (w *worker) finish(ctx context.Context) {
	pod := w.newest()
	for pause := 50 * time.Millisecond; ctx.Err() == nil && w.gone.Err() == nil; pause = min(2*pause, 2*time.Second) {
		err := w.tryFinish(ctx, pod)
		if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return
		}
		w.log.Debug("pod is not removed yet", "error", err)
		sleep(ctx, pause)
	}
}

func (w *worker) tryFinish(ctx context.Context, pod *corev1.Pod) error {
	now, err := w.k.Client.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if now.UID != pod.UID {
		return nil
	}
	if _, err := w.patchStatus(ctx, now.Status); err != nil {
		return err
	}
	none := int64(0)
	return w.k.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &none, Preconditions: &metav1.Preconditions{UID: &pod.UID},
	})
}

// status computes the pod's status; what others own in it is taken from before.
func (w *worker) status(before corev1.PodStatus) corev1.PodStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	status := *before.DeepCopy()
	if status.Phase == corev1.PodSucceeded || status.Phase == corev1.PodFailed {
		return status // a finished pod stays as it is
	}
	status.ObservedGeneration = w.pod.Generation
	status.HostIP = w.node.Address.String()
	status.HostIPs = []corev1.HostIP{{IP: status.HostIP}}
	if status.StartTime == nil {
		now := metav1.NewTime(time.Now().Truncate(time.Second))
		status.StartTime = &now
	}
	status.PodIP, status.PodIPs = "", nil
	for _, addr := range w.addrs {
		status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: addr.String()})
	}
	if len(w.addrs) > 0 {
		status.PodIP = w.addrs[0].String()
	}
	status.InitContainerStatuses = containerStatuses(w.pod.Spec.InitContainers, w.inits, w.failure)
	status.ContainerStatuses = containerStatuses(w.pod.Spec.Containers, w.mains, w.failure)
	status.Phase = w.phaseLocked(status)
	w.conditionsLocked(&status)
	return status
}

// containerStatuses gives one status for each container of the pod, launched or not.
func containerStatuses(specs []corev1.Container, launched []*container, failure error) []corev1.ContainerStatus {
	var list []corev1.ContainerStatus
	for i, spec := range specs {
		if i < len(launched) {
			list = append(list, launched[i].status())
			continue
		}
		state, started := waiting("PodInitializing", ""), false
		if failure != nil {
			state = waiting("ContainerCreating", failure.Error())
		}
		list = append(list, corev1.ContainerStatus{Name: spec.Name, Image: spec.Image, State: state, Started: &started})
	}
	return list
}

// phaseLocked derives the phase as the kubelet does. The caller holds w.mu.
func (w *worker) phaseLocked(status corev1.PodStatus) corev1.PodPhase {
	if w.final != "" {
		return w.final
	}
	if !w.initialized {
		return corev1.PodPending
	}
	running, failed := 0, 0
	for i, c := range w.mains {
		state := status.ContainerStatuses[i]
		ended := false
		select {
		case <-c.finished:
			ended = true
		default:
		}
		switch {
		case ended && state.State.Terminated != nil:
			if state.State.Terminated.ExitCode != 0 {
				failed++
			}
		case state.State.Waiting != nil && state.LastTerminationState.Terminated == nil:
			return corev1.PodPending
		default:
			running++
		}
	}
	switch {
	case running > 0 || w.pod.Spec.RestartPolicy == corev1.RestartPolicyAlways:
		return corev1.PodRunning
	case failed > 0:
		return corev1.PodFailed
	}
	return corev1.PodSucceeded
}

// conditionsLocked sets the conditions that belong to the kubelet. The caller holds w.mu.
func (w *worker) conditionsLocked(status *corev1.PodStatus) {
	var unready []string
	for _, c := range append(append([]corev1.ContainerStatus(nil), status.InitContainerStatuses...), status.ContainerStatuses...) {
		if !c.Ready {
			unready = append(unready, c.Name)
		}
	}
	ready, reason, message := len(unready) == 0 && w.initialized, "", ""
	switch {
	case status.Phase == corev1.PodSucceeded || status.Phase == corev1.PodFailed:
		ready, reason = false, "PodCompleted"
	case !ready:
		reason, message = "ContainersNotReady", fmt.Sprintf("containers with unready status: [%s]", strings.Join(unready, " "))
	}
	w.setCondition(status, corev1.PodReadyToStartContainers, len(w.addrs) > 0, "", "")
	if w.initialized {
		w.setCondition(status, corev1.PodInitialized, true, "", "")
	} else {
		w.setCondition(status, corev1.PodInitialized, false, "ContainersNotInitialized", "")
	}
	w.setCondition(status, corev1.ContainersReady, ready, reason, message)
	for _, gate := range w.pod.Spec.ReadinessGates {
		if ready && !isTrue(w.pod.Status.Conditions, gate.ConditionType) {
			ready, reason, message = false, "ReadinessGatesNotReady", fmt.Sprintf("condition %s is not true", gate.ConditionType)
		}
	}
	w.setCondition(status, corev1.PodReady, ready, reason, message)
}

func isTrue(conditions []corev1.PodCondition, kind corev1.PodConditionType) bool {
	for _, c := range conditions {
		if c.Type == kind {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// setCondition sets one condition and keeps its time while its status stays the same.
func (w *worker) setCondition(status *corev1.PodStatus, kind corev1.PodConditionType, is bool, reason, message string) {
	value := corev1.ConditionFalse
	if is {
		value = corev1.ConditionTrue
	}
	fresh := corev1.PodCondition{
		Type: kind, Status: value, Reason: reason, Message: message,
		ObservedGeneration: w.pod.Generation, LastTransitionTime: metav1.NewTime(time.Now().Truncate(time.Second)),
	}
	for i := range status.Conditions {
		if old := &status.Conditions[i]; old.Type == kind {
			if old.Status == value {
				fresh.LastTransitionTime = old.LastTransitionTime
			}
			fresh.LastProbeTime = old.LastProbeTime
			*old = fresh
			return
		}
	}
	status.Conditions = append(status.Conditions, fresh)
}
