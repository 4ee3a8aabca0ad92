// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// scheduler binds pending pods to the kubelet's nodes, one after the other.
// It respects nodeSelector and required node affinity, nothing else.
type scheduler struct {
	k *Kubelet

	mu    sync.Mutex
	turn  int
	tried map[types.UID]bool // being bound, or refused
}

// observe binds a pod that has no node yet.
func (s *scheduler) observe(ctx context.Context, pod *corev1.Pod) {
	if pod.Spec.NodeName != "" || pod.DeletionTimestamp != nil || len(pod.Spec.SchedulingGates) > 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tried == nil {
		s.tried = map[types.UID]bool{}
	}
	if s.tried[pod.UID] {
		return
	}
	s.tried[pod.UID] = true
	name, ok := s.pickLocked(pod)
	s.k.all.Go(func() {
		if ok {
			s.bind(ctx, pod, name)
		} else {
			s.explain(ctx, pod)
		}
	})
}

// forget drops what is known about a pod that is gone.
func (s *scheduler) forget(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tried, uid)
}

// pickLocked chooses the next node in turn that the pod accepts. The caller holds s.mu.
func (s *scheduler) pickLocked(pod *corev1.Pod) (string, bool) {
	for i := range s.k.nodes {
		at := (s.turn + i) % len(s.k.nodes)
		if n := s.k.nodes[at]; accepts(pod, n.Name, n.object().Labels) {
			s.turn = at + 1
			return n.Name, true
		}
	}
	return "", false
}

// bind tells the API where the pod goes.
func (s *scheduler) bind(ctx context.Context, pod *corev1.Pod, name string) {
	binding := &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		Target:     corev1.ObjectReference{Kind: "Node", Name: name},
	}
	for ctx.Err() == nil {
		err := s.k.Client.CoreV1().Pods(pod.Namespace).Bind(ctx, binding, metav1.CreateOptions{})
		if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return
		}
		s.k.Log.Debug("pod is not bound yet", "pod", pod.Namespace+"/"+pod.Name, "error", err)
		sleep(ctx, 200*time.Millisecond)
	}
}

// explain writes into the pod why no node takes it.
func (s *scheduler) explain(ctx context.Context, pod *corev1.Pod) {
	pod = pod.DeepCopy()
	pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{
		Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable,
		Message:            fmt.Sprintf("none of %d nodes matches the pod's node selector or affinity", len(s.k.nodes)),
		LastTransitionTime: metav1.Now(),
	})
	if _, err := s.k.Client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		s.k.Log.Debug("unschedulable pod is not marked", "pod", pod.Namespace+"/"+pod.Name, "error", err)
	}
}

// accepts reports whether a pod's node selector and required affinity match a node.
func accepts(pod *corev1.Pod, name string, labels map[string]string) bool {
	for key, value := range pod.Spec.NodeSelector {
		if labels[key] != value {
			return false
		}
	}
	affinity := pod.Spec.Affinity
	if affinity == nil || affinity.NodeAffinity == nil || affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return true
	}
	fields := map[string]string{"metadata.name": name}
	terms := affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	return slices.ContainsFunc(terms, func(term corev1.NodeSelectorTerm) bool {
		return matchAll(term.MatchExpressions, labels) && matchAll(term.MatchFields, fields)
	})
}

func matchAll(wanted []corev1.NodeSelectorRequirement, values map[string]string) bool {
	return !slices.ContainsFunc(wanted, func(want corev1.NodeSelectorRequirement) bool {
		value, has := values[want.Key]
		switch want.Operator {
		case corev1.NodeSelectorOpIn:
			return !has || !slices.Contains(want.Values, value)
		case corev1.NodeSelectorOpNotIn:
			return has && slices.Contains(want.Values, value)
		case corev1.NodeSelectorOpExists:
			return !has
		case corev1.NodeSelectorOpDoesNotExist:
			return has
		}
		return true // Gt, Lt: not supported, matches nothing
	})
}
