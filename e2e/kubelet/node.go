// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AddressAnnotation on a pod asks for given addresses, separated by commas,
// instead of the next free ones of its node's ranges.
const AddressAnnotation = "e2e.isthmus-mesh.io/address"

// Node is one node of the cluster.
type Node struct {
	// Name of the Node object.
	Name string
	// Labels besides those that every node has; for example topology.kubernetes.io/region and zone.
	Labels map[string]string
	// Address is the node's InternalIP, at which the API server reaches Listener.
	Address netip.Addr
	// Pods are the ranges that pods of this node get their addresses from, one
	// for each family; the first one's address is the pod's primary one.
	Pods []netip.Prefix
	// Listener takes the API server's calls (exec, logs, port-forward). The
	// kubelet closes it. Nil means that these calls are not served.
	Listener net.Listener
}

// node is a Node and what it hands out.
type node struct {
	Node
	ranges []*addresses
}

func newNode(spec Node) (*node, error) {
	n := &node{Node: spec}
	if spec.Name == "" || !spec.Address.IsValid() || len(spec.Pods) == 0 {
		return nil, fmt.Errorf("node %q: needs a name, an address and a range for pods", spec.Name)
	}
	for _, pods := range spec.Pods {
		n.ranges = append(n.ranges, newAddresses(pods))
	}
	return n, nil
}

// address picks a pod's addresses.
func (n *node) address(pod *corev1.Pod) ([]netip.Addr, error) {
	if fixed := pod.Annotations[AddressAnnotation]; fixed != "" {
		return n.fixed(fixed)
	}
	var addrs []netip.Addr
	for _, r := range n.ranges {
		addr, err := r.take()
		if err != nil {
			n.release(addrs)
			return nil, fmt.Errorf("node %s: %w", n.Name, err)
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// fixed takes the addresses that an annotation asks for.
func (n *node) fixed(list string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, word := range strings.Split(list, ",") {
		addr, err := netip.ParseAddr(strings.TrimSpace(word))
		if err != nil {
			n.release(addrs)
			return nil, fmt.Errorf("annotation %s: %w", AddressAnnotation, err)
		}
		if err := n.rangeOf(addr).takeFixed(addr); err != nil {
			n.release(addrs)
			return nil, fmt.Errorf("annotation %s: %w", AddressAnnotation, err)
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// rangeOf gives the range that accounts for an address; an address outside all ranges counts in the first.
func (n *node) rangeOf(addr netip.Addr) *addresses {
	for _, r := range n.ranges {
		if r.pods.Contains(addr) {
			return r
		}
	}
	return n.ranges[0]
}

func (n *node) release(addrs []netip.Addr) {
	for _, addr := range addrs {
		n.rangeOf(addr).give(addr)
	}
}

// object is the Node object.
func (n *node) object() *corev1.Node {
	labels := map[string]string{
		corev1.LabelHostname: n.Name, corev1.LabelOSStable: runtime.GOOS, corev1.LabelArchStable: runtime.GOARCH,
	}
	maps.Copy(labels, n.Labels)
	object := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: labels}}
	for _, pods := range n.Pods {
		object.Spec.PodCIDRs = append(object.Spec.PodCIDRs, pods.Masked().String())
	}
	object.Spec.PodCIDR = object.Spec.PodCIDRs[0]
	return object
}

// status is what the Node object says about the node: ready, and how to reach it.
func (n *node) status() corev1.NodeStatus {
	now := metav1.Now()
	capacity := corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI),
		corev1.ResourceMemory: resource.MustParse("64Gi"),
		corev1.ResourcePods:   resource.MustParse("1000"),
	}
	status := corev1.NodeStatus{
		Capacity: capacity, Allocatable: capacity,
		Conditions: []corev1.NodeCondition{{
			Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady",
			LastHeartbeatTime: now, LastTransitionTime: now,
		}},
		Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: n.Address.String()}, {Type: corev1.NodeHostName, Address: n.Name},
		},
		NodeInfo: corev1.NodeSystemInfo{
			KubeletVersion: "v1.36.3", OperatingSystem: runtime.GOOS, Architecture: runtime.GOARCH,
			ContainerRuntimeVersion: "namespaces://1",
		},
	}
	if n.Listener != nil {
		if addr, ok := n.Listener.Addr().(*net.TCPAddr); ok {
			status.DaemonEndpoints.KubeletEndpoint.Port = int32(addr.Port)
		}
	}
	return status
}

// register makes or updates the Node object, again and again until it succeeds or ctx ends.
func (k *Kubelet) register(ctx context.Context, n *node) error {
	for {
		err := k.tryRegister(ctx, n)
		if err == nil {
			return nil
		}
		k.Log.Debug("node is not registered yet", "node", n.Name, "error", err)
		if !sleep(ctx, 200*time.Millisecond) {
			return fmt.Errorf("register node %s: %w", n.Name, errors.Join(ctx.Err(), err))
		}
	}
}

func (k *Kubelet) tryRegister(ctx context.Context, n *node) error {
	nodes := k.Client.CoreV1().Nodes()
	want := n.object()
	have, err := nodes.Create(ctx, want, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		have, err = nodes.Get(ctx, n.Name, metav1.GetOptions{})
	}
	if err != nil {
		return err
	}
	// The server taints a new node as not ready, and no controller of the bed would remove that.
	have.Spec.Taints = nil
	if have.Labels == nil {
		have.Labels = map[string]string{}
	}
	maps.Copy(have.Labels, want.Labels)
	if have, err = nodes.Update(ctx, have, metav1.UpdateOptions{}); err != nil {
		return err
	}
	have.Status = n.status()
	_, err = nodes.UpdateStatus(ctx, have, metav1.UpdateOptions{})
	return err
}
