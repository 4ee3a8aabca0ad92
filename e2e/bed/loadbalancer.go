// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
)

// The ports that Kubernetes gives Services of type NodePort.
const nodePorts = "30000-32767"

// balancer is the cloud's part of one cluster: it gives Services of type
// LoadBalancer an address on the transit network, writes it into their status
// and has the network's router spread connections over their ready endpoints.
// Node ports are answered as well, on the nodes' address.
type balancer struct {
	cluster  *Cluster
	services corelisters.ServiceLister
	slices   discoverylisters.EndpointSliceLister
	given    map[types.UID]netip.Addr // addresses of Services, kept while these exist
	held     map[Frontend]bool        // what the router was told
}

// exposeNodes sends what arrives at the node ports of the cluster's host,
// which is the address of its nodes, to an address of the router's of their
// own.
func (c *Cluster) exposeNodes() (err error) {
	if c.nodeFront, err = c.network.NewFrontend(); err != nil {
		return err
	}
	if err := c.host.sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return c.host.nft(fmt.Sprintf(`table ip nodes {
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		meta l4proto { tcp, udp } th dport %s ip daddr %s dnat to %s
	}
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ct status dnat masquerade
	}
}
`, nodePorts, c.Addr(), c.nodeFront))
}

// balanceServices plays the cloud until ctx ends. Events only wake it; it acts
// on what the caches hold.
func (c *Cluster) balanceServices(ctx context.Context) {
	factory := informers.NewSharedInformerFactory(c.client, 0)
	b := &balancer{
		cluster: c, services: factory.Core().V1().Services().Lister(), slices: factory.Discovery().V1().EndpointSlices().Lister(),
		given: make(map[types.UID]netip.Addr), held: make(map[Frontend]bool),
	}
	wake := make(chan struct{}, 1)
	poke := func(any) {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	handler := cache.ResourceEventHandlerFuncs{AddFunc: poke, DeleteFunc: poke, UpdateFunc: func(_, now any) { poke(now) }}
	for _, informer := range []cache.SharedIndexInformer{factory.Core().V1().Services().Informer(), factory.Discovery().V1().EndpointSlices().Informer()} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			c.world.logger.Error("watch services", "cluster", c.name, "error", err)
			return
		}
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	defer factory.Shutdown()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
			if err := b.reconcile(ctx); err != nil && ctx.Err() == nil {
				c.world.logger.Warn("balance services", "cluster", c.name, "error", err)
			}
		}
	}
}

// reconcile makes the router and the status of all Services what the caches
// ask for.
func (b *balancer) reconcile(ctx context.Context) error {
	services, err := b.services.List(labels.Everything())
	if err != nil {
		return err
	}
	var errs []error
	wanted, alive := make(map[Frontend]bool), make(map[types.UID]bool)
	for _, s := range services {
		alive[s.UID] = true
		for frontend, backends := range b.frontends(s, &errs) {
			wanted[frontend] = true
			b.held[frontend] = true
			errs = append(errs, b.cluster.network.Balance(frontend, backends))
		}
		errs = append(errs, b.publish(ctx, s))
	}
	for frontend := range b.held {
		if !wanted[frontend] {
			errs = append(errs, b.cluster.network.Unbalance(frontend))
			delete(b.held, frontend)
		}
	}
	for uid := range b.given {
		if !alive[uid] {
			delete(b.given, uid)
		}
	}
	return errors.Join(errs...)
}

// frontends returns the addresses and ports that the Service is reached at
// from outside of its network, with its ready endpoints.
func (b *balancer) frontends(s *corev1.Service, errs *[]error) map[Frontend][]netip.AddrPort {
	result := make(map[Frontend][]netip.AddrPort)
	if s.DeletionTimestamp != nil || (s.Spec.Type != corev1.ServiceTypeLoadBalancer && s.Spec.Type != corev1.ServiceTypeNodePort) {
		return result
	}
	endpoints, err := b.slices.EndpointSlices(s.Namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: s.Name}))
	if err != nil {
		*errs = append(*errs, err)
		return result
	}
	address, err := b.address(s)
	if err != nil {
		*errs = append(*errs, err)
	}
	for _, port := range s.Spec.Ports {
		protocol := strings.ToLower(string(port.Protocol))
		if protocol != "tcp" && protocol != "udp" {
			continue
		}
		backends := ready(endpoints, port.Name)
		if address.IsValid() {
			result[Frontend{netip.AddrPortFrom(address, uint16(port.Port)), protocol}] = backends
		}
		if port.NodePort != 0 {
			result[Frontend{netip.AddrPortFrom(b.cluster.nodeFront, uint16(port.NodePort)), protocol}] = backends
		}
	}
	return result
}

// address returns the Service's address on the transit network: the one it
// has, else the one it asks for, else a new one. A Service that is not a
// LoadBalancer, or somebody else's, has none.
func (b *balancer) address(s *corev1.Service) (netip.Addr, error) {
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer || s.Spec.LoadBalancerClass != nil {
		return netip.Addr{}, nil
	}
	if addr, ok := b.given[s.UID]; ok {
		return addr, nil
	}
	addr, err := netip.Addr{}, error(nil)
	if asked := s.Spec.LoadBalancerIP; asked != "" {
		addr, err = netip.ParseAddr(asked)
		if err == nil && !b.cluster.network.block.Contains(addr) {
			err = fmt.Errorf("want one in %s", b.cluster.network.block)
		}
		if err != nil {
			return netip.Addr{}, fmt.Errorf("service %s/%s: spec.loadBalancerIP is %q: %w", s.Namespace, s.Name, asked, err)
		}
	} else if addr, err = b.cluster.network.NewFrontend(); err != nil {
		return netip.Addr{}, err
	}
	b.given[s.UID] = addr
	return addr, nil
}

// publish writes the Service's address into its status.
func (b *balancer) publish(ctx context.Context, s *corev1.Service) error {
	addr, ok := b.given[s.UID]
	if !ok || s.DeletionTimestamp != nil {
		return nil
	}
	mode := corev1.LoadBalancerIPModeVIP
	status := corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: addr.String(), IPMode: &mode}}}
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		delete(b.given, s.UID)
		status = corev1.LoadBalancerStatus{}
	}
	if equality.Semantic.DeepEqual(s.Status.LoadBalancer, status) {
		return nil
	}
	updated := s.DeepCopy()
	updated.Status.LoadBalancer = status
	_, err := b.cluster.client.CoreV1().Services(s.Namespace).UpdateStatus(ctx, updated, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil // the event of the newer object wakes us
	}
	return err
}

// ready returns the endpoints that answer a Service's port of the name. As in
// a real cluster, those that are about to end and still serve are used when no
// other is left.
func ready(endpoints []*discoveryv1.EndpointSlice, port string) []netip.AddrPort {
	var ready, ending []netip.AddrPort
	for _, slice := range endpoints {
		number := portNumber(slice, port)
		if number == 0 || slice.AddressType != discoveryv1.AddressTypeIPv4 {
			continue
		}
		for _, endpoint := range slice.Endpoints {
			for _, text := range endpoint.Addresses {
				addr, err := netip.ParseAddr(text)
				if err != nil {
					continue
				}
				at := netip.AddrPortFrom(addr, number)
				switch c := endpoint.Conditions; {
				case c.Ready == nil || *c.Ready:
					ready = append(ready, at)
				case c.Serving != nil && *c.Serving:
					ending = append(ending, at)
				}
			}
		}
	}
	if len(ready) == 0 {
		ready = ending
	}
	slices.SortFunc(ready, netip.AddrPort.Compare)
	return slices.Compact(ready)
}

// portNumber returns the number of the slice's port with the name, 0 when it
// has none.
func portNumber(slice *discoveryv1.EndpointSlice, name string) uint16 {
	for _, port := range slice.Ports {
		if (port.Name == nil && name == "") || (port.Name != nil && *port.Name == name) {
			if port.Port != nil {
				return uint16(*port.Port)
			}
		}
	}
	return 0
}
