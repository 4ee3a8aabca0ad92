// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Cluster is a control plane with nodes and DNS.
type Cluster struct {
	*bed.Cluster

	name    string
	network string
	nodes   *nodes

	mu     sync.Mutex
	member string // see KnownAs
}

// KnownAs tells that the cluster joined under another name than it has on the stage.
func (c *Cluster) KnownAs(member string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.member = member
}

// inMesh is the cluster's name in the mesh.
func (c *Cluster) inMesh() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmp.Or(c.member, c.name)
}

// ClusterConfig says how a cluster is made. Zero values: a network of its own, one node,
// the same ranges as every other network.
type ClusterConfig struct {
	Network  string
	Pods     netip.Prefix
	Services netip.Prefix
	Nodes    int
	Region   string
	Zone     string
	// KeyOf names a cluster that signs service account tokens with the same key.
	KeyOf string
}

// Cluster makes a cluster and waits until pods can run in it.
func (s *Stage) Cluster(ctx context.Context, name string, config ClusterConfig) (*Cluster, error) {
	if config.Network == "" {
		config.Network = name + "-net"
		if s.config.Flat {
			config.Network = "flat"
		}
	}
	network, err := s.Network(config.Network, bed.NetworkConfig{Pods: config.Pods})
	if err != nil {
		return nil, err
	}
	made := bed.ClusterConfig{Network: network, Services: config.Services}
	if config.KeyOf != "" {
		other, err := s.cluster(config.KeyOf)
		if err != nil {
			return nil, err
		}
		made.SigningKeyOf = other.Cluster
	}
	control, err := s.World.Cluster(name, made)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Cluster: control, name: name, network: config.Network}
	if c.nodes, err = s.startNodes(ctx, control, config); err != nil {
		return nil, fmt.Errorf("cluster %s: %w", name, err)
	}
	s.mu.Lock()
	s.clusters[name] = c
	s.mu.Unlock()
	return c, nil
}

// Deploy applies a workload, with its proxy unless it says otherwise, and waits until
// all its pods are ready and, where it has a Service, the cluster's controllers have made
// them its endpoints: what the mesh knows of it follows from those.
func (s *Stage) Deploy(ctx context.Context, cluster string, w Workload) error {
	manifests, err := w.Manifest()
	if err != nil {
		return err
	}
	if err := s.Apply(ctx, cluster, manifests, w.Inject); err != nil {
		return err
	}
	if w.Gated {
		if _, err := Until(ctx, Patience, func() error { return s.Gate(ctx, cluster, w.Namespace+"/"+w.Name, true) }); err != nil {
			return err
		}
	}
	if err := s.WaitPods(ctx, cluster, w.Namespace+"/"+w.Name, max(1, w.Replicas)); err != nil || len(w.Ports) == 0 {
		return err
	}
	return s.waitEndpoints(ctx, cluster, w.Namespace, w.Name, max(1, w.Replicas))
}

// waitEndpoints waits until the EndpointSlices of a Service have that many ready pods.
func (s *Stage) waitEndpoints(ctx context.Context, cluster, namespace, service string, n int) error {
	c, err := s.cluster(cluster)
	if err != nil {
		return err
	}
	_, err = Until(ctx, Patience, func() error {
		list, err := c.Client().DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{
			LabelSelector: labels.Set{discoveryv1.LabelServiceName: service}.String(),
		})
		if err != nil {
			return err
		}
		ready := map[string]bool{}
		for _, slice := range list.Items {
			for _, e := range slice.Endpoints {
				if e.TargetRef != nil && isReady(e) {
					ready[e.TargetRef.Name] = true
				}
			}
		}
		if len(ready) != n {
			return fmt.Errorf("service %s/%s in %s has %d ready endpoints, want %d", namespace, service, cluster, len(ready), n)
		}
		return nil
	})
	return err
}

// isReady reads the condition as clients of EndpointSlices must: absent means ready.
func isReady(e discoveryv1.Endpoint) bool {
	return e.Conditions.Ready == nil || *e.Conditions.Ready
}

// WaitPods waits until that many pods of a workload ("namespace/app") are ready.
func (s *Stage) WaitPods(ctx context.Context, cluster, workload string, n int) error {
	_, err := Until(ctx, Patience, func() error {
		pods, err := s.Pods(ctx, cluster, workload)
		if err != nil {
			return err
		}
		var waiting []string
		ready := 0
		for i := range pods {
			if podReady(&pods[i]) {
				ready++
			} else {
				waiting = append(waiting, podState(&pods[i]))
			}
		}
		if ready != n || len(waiting) > 0 {
			return fmt.Errorf("%s in %s: %d of %d pods are ready; waiting: %s", workload, cluster, ready, n, strings.Join(waiting, "; "))
		}
		s.remember(cluster, workload, pods)
		return nil
	})
	return err
}

// Pods lists the pods of a workload ("namespace/app"), by name, without those that are
// being deleted.
func (s *Stage) Pods(ctx context.Context, cluster, workload string) ([]corev1.Pod, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return nil, err
	}
	namespace, app, ok := strings.Cut(workload, "/")
	if !ok {
		return nil, fmt.Errorf("workload %q: want NAMESPACE/APP", workload)
	}
	selector := labels.Set{"app": app}.String()
	list, err := c.Client().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, err
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods, nil
}

func podReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// podState says in a few words what a pod waits for.
func podState(p *corev1.Pod) string {
	said := []string{p.Name, string(p.Status.Phase)}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		switch {
		case c.State.Waiting != nil:
			said = append(said, c.Name+" "+c.State.Waiting.Reason+" "+c.State.Waiting.Message)
		case c.State.Terminated != nil && c.State.Terminated.ExitCode != 0:
			said = append(said, fmt.Sprintf("%s exited with %d", c.Name, c.State.Terminated.ExitCode))
		case c.State.Running != nil && !c.Ready:
			said = append(said, c.Name+" not ready")
		}
	}
	return strings.Join(said, ", ")
}
