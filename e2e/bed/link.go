// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bridge makes a bridge in the namespace and brings it up.
func (n *Namespace) bridge(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	snooping := false
	bridge := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := n.links.LinkAdd(bridge); err != nil {
		return fmt.Errorf("bridge %s in %s: %w", name, n.name, err)
	}
	return n.links.LinkSetUp(bridge)
}

// plug connects the namespace to the bridge of another one by a pair of
// interfaces. Inside, the interface has the name and the address; its hardware
// address follows from that, so that an address that moves to another
// namespace is found there at once.
func (n *Namespace) plug(name string, addr netip.Prefix, hub *Namespace, bridge string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = portName(n.name, name)
	pair := &netlink.Veth{
		LinkAttrs: attrs, PeerName: name,
		PeerHardwareAddr: hardware(addr.Addr()),
		PeerNamespace:    netlink.NsFd(n.file.Fd()),
	}
	if err := hub.links.LinkAdd(pair); err != nil {
		return fmt.Errorf("connect %s to %s of %s: %w", n.name, bridge, hub.name, err)
	}
	master, err := hub.links.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("bridge %s of %s: %w", bridge, hub.name, err)
	}
	port, err := hub.links.LinkByName(attrs.Name)
	if err != nil {
		return err
	}
	if err := hub.links.LinkSetMaster(port, master); err != nil {
		return fmt.Errorf("connect %s to %s of %s: %w", n.name, bridge, hub.name, err)
	}
	if err := hub.links.LinkSetUp(port); err != nil {
		return err
	}
	link, err := n.links.LinkByName(name)
	if err != nil {
		return err
	}
	if err := n.assign(name, addr); err != nil {
		return err
	}
	if err := n.links.LinkSetUp(link); err != nil {
		return err
	}
	return errors.Join(hub.carries(attrs.Name), hub.carries(bridge), n.carries(name))
}

// carries waits until the kernel has noticed, which it does in the background,
// that the interface is connected. Packets sent before that are lost, and the
// first one to be lost is a question for an address, repeated after a second.
func (n *Namespace) carries(name string) error {
	return until(n.world.ctx, 5*time.Second, time.Millisecond, func() error {
		link, err := n.links.LinkByName(name)
		if err != nil {
			return err
		}
		if state := link.Attrs().OperState; state != netlink.OperUp {
			return fmt.Errorf("interface %s of %s is %s", name, n.name, state)
		}
		return nil
	})
}

// assign gives an interface of the namespace a further address.
func (n *Namespace) assign(name string, addr netip.Prefix) error {
	link, err := n.links.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s of %s: %w", name, n.name, err)
	}
	parsed := &netlink.Addr{IPNet: ipNet(addr)}
	if addr.Addr().Is6() {
		parsed.Flags = unix.IFA_F_NODAD
	}
	if err := n.links.AddrReplace(link, parsed); err != nil {
		return fmt.Errorf("address %s on %s of %s: %w", addr, name, n.name, err)
	}
	return nil
}

// release takes an address from an interface of the namespace.
func (n *Namespace) release(name string, addr netip.Prefix) error {
	link, err := n.links.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s of %s: %w", name, n.name, err)
	}
	if err := n.links.AddrDel(link, &netlink.Addr{IPNet: ipNet(addr)}); err != nil {
		return fmt.Errorf("take address %s from %s of %s: %w", addr, name, n.name, err)
	}
	return nil
}

// route sends what is for the destination to the gateway; the zero prefix is
// everything.
func (n *Namespace) route(destination netip.Prefix, gateway netip.Addr) error {
	route := &netlink.Route{Gw: gateway.AsSlice()}
	if destination.IsValid() {
		route.Dst = ipNet(destination)
	}
	if err := n.links.RouteReplace(route); err != nil {
		return fmt.Errorf("route to %s by %s in %s: %w", destination, gateway, n.name, err)
	}
	return nil
}

// unroute undoes route.
func (n *Namespace) unroute(destination netip.Prefix, gateway netip.Addr) error {
	if err := n.links.RouteDel(&netlink.Route{Dst: ipNet(destination), Gw: gateway.AsSlice()}); err != nil {
		return fmt.Errorf("drop the route to %s by %s in %s: %w", destination, gateway, n.name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// hardware returns a locally administered hardware address made of the last
// four bytes of an IP address.
func hardware(addr netip.Addr) net.HardwareAddr {
	bytes := addr.AsSlice()
	return append(net.HardwareAddr{0x0a, 0x58}, bytes[len(bytes)-4:]...)
}

// portName returns a name for the bridge's end of an interface. The kernel
// allows 15 characters, so long names are cut and told apart by a hash.
func portName(namespace, name string) string {
	sum := fnv.New32a()
	fmt.Fprintf(sum, "%s/%s", namespace, name)
	return fmt.Sprintf("%.6s-%08x", namespace, sum.Sum32())
}
