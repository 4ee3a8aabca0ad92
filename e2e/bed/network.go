// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
)

// The ranges that every network and cluster has unless it is told otherwise:
// the same ones everywhere, as in a real fleet.
var (
	DefaultPods     = netip.MustParsePrefix("10.244.0.0/16")
	DefaultServices = netip.MustParsePrefix("10.96.0.0/12")
)

// Interfaces of a router.
const (
	podBridge   = "pods"
	transitLink = "transit"
)

// NetworkConfig says which addresses a network has.
type NetworkConfig struct {
	// Pods is the range of pods and VMs, a /16; zero means DefaultPods.
	Pods netip.Prefix
	// Services is the range of ClusterIPs of the clusters on this network;
	// zero means DefaultServices. Nothing routes it.
	Services netip.Prefix
}

// A Network is a set of addresses that reach each other directly: a bridge in
// the namespace of its router. The router translates connections that leave
// for the transit network, balances addresses on the transit network over
// pods, and forwards nothing else.
type Network struct {
	name     string
	world    *World
	pods     netip.Prefix
	services netip.Prefix
	block    netip.Prefix // of the transit network: what the router answers for
	router   *Namespace

	mu        sync.Mutex
	nodes     int // node ranges handed out
	last      netip.Addr
	lastFront netip.Addr
	routes    []*Network
	fronts    map[string]front
}

// Network makes a network with its router.
func (w *World) Network(name string, config NetworkConfig) (*Network, error) {
	if !config.Pods.IsValid() {
		config.Pods = DefaultPods
	}
	if !config.Services.IsValid() {
		config.Services = DefaultServices
	}
	if config.Pods.Bits() != 16 || !config.Pods.Addr().Is4() {
		return nil, fmt.Errorf("network %s: pod range %s: want an IPv4 /16, of which each node gets a /24", name, config.Pods)
	}
	w.mu.Lock()
	index := len(w.networks) + 1
	block := transitRange.Addr().As4()
	block[2] = byte(index)
	n := &Network{
		name: name, world: w, pods: config.Pods.Masked(), services: config.Services,
		block: netip.PrefixFrom(netip.AddrFrom4(block), 24), fronts: make(map[string]front),
	}
	w.networks = append(w.networks, n)
	w.mu.Unlock()
	if index > 250 {
		return nil, fmt.Errorf("network %s: a world has room for 250 networks", name)
	}
	n.last = netip.AddrFrom4([4]byte{n.pods.Addr().As4()[0], n.pods.Addr().As4()[1], 255, 0})
	n.lastFront = netip.AddrFrom4([4]byte{block[0], block[1], block[2], 9})
	if err := n.build(); err != nil {
		return nil, fmt.Errorf("network %s: %w", name, err)
	}
	return n, nil
}

// build makes the router.
func (n *Network) build() (err error) {
	if n.router, err = n.world.Namespace("router-" + n.name); err != nil {
		return err
	}
	if err := n.router.bridge(podBridge); err != nil {
		return err
	}
	if err := n.router.assign(podBridge, netip.PrefixFrom(n.Gateway(), n.pods.Bits())); err != nil {
		return err
	}
	address1 := n.block.Addr().Next()
	if err := n.router.plug(transitLink, netip.PrefixFrom(address1, transitRange.Bits()), n.world.transit, transitBridge); err != nil {
		return err
	}
	n.router.hold(address{n.block, nil})
	if err := n.router.sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.programLocked()
}

// Name returns the network's name.
func (n *Network) Name() string { return n.name }

// Pods returns the range of pods and VMs.
func (n *Network) Pods() netip.Prefix { return n.pods }

// Services returns the range of ClusterIPs.
func (n *Network) Services() netip.Prefix { return n.services }

// Gateway returns the router's address on the network: the default route of
// everybody on it.
func (n *Network) Gateway() netip.Addr { return n.pods.Addr().Next() }

// Router returns the namespace of the network's router.
func (n *Network) Router() *Namespace { return n.router }

// NodeRange returns the next unused /24 of the pod range, for the pods of one
// node.
func (n *Network) NodeRange() (netip.Prefix, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.nodes >= 254 {
		return netip.Prefix{}, fmt.Errorf("network %s: no range left for another node in %s", n.name, n.pods)
	}
	n.nodes++
	start := n.pods.Addr().As4()
	start[2] = byte(n.nodes)
	return netip.PrefixFrom(netip.AddrFrom4(start), 24), nil
}

// Address returns an unused address that belongs to no node, for a VM.
func (n *Network) Address() (netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last = n.last.Next()
	if n.last.As4()[3] == 255 {
		return netip.Addr{}, fmt.Errorf("network %s: no address left for another VM", n.name)
	}
	return n.last, nil
}

// Attach connects a namespace to the network as eth0 with the address, and
// makes the router its way out. The caller chooses addresses so that no two
// are the same, unless that is the point.
func (n *Network) Attach(namespace *Namespace, addr netip.Addr) error {
	if !n.pods.Contains(addr) {
		return fmt.Errorf("network %s: address %s of %s: want one in %s", n.name, addr, namespace.name, n.pods)
	}
	if err := namespace.plug("eth0", netip.PrefixFrom(addr, n.pods.Bits()), n.router, podBridge); err != nil {
		return err
	}
	namespace.hold(address{netip.PrefixFrom(addr, addr.BitLen()), n})
	return namespace.route(netip.Prefix{}, n.Gateway())
}

// Route makes the pods of the two networks reach each other directly, which
// their ranges must allow. The bed's own test needs it, to show that nothing
// but the missing route keeps networks apart.
func (n *Network) Route(other *Network) error {
	if n.pods.Overlaps(other.pods) {
		return fmt.Errorf("route between networks %s and %s: their pod ranges %s and %s overlap", n.name, other.name, n.pods, other.pods)
	}
	return errors.Join(n.routeTo(other), other.routeTo(n))
}

func (n *Network) routeTo(other *Network) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Contains(n.routes, other) {
		return nil
	}
	if err := n.router.route(other.pods, other.block.Addr().Next()); err != nil {
		return err
	}
	n.routes = append(n.routes, other)
	return n.programLocked()
}

// Unroute undoes Route.
func (n *Network) Unroute(other *Network) error {
	return errors.Join(n.unrouteTo(other), other.unrouteTo(n))
}

func (n *Network) unrouteTo(other *Network) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	at := slices.Index(n.routes, other)
	if at < 0 {
		return nil
	}
	n.routes = slices.Delete(n.routes, at, at+1)
	return errors.Join(n.router.unroute(other.pods, other.block.Addr().Next()), n.programLocked())
}
