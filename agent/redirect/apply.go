// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoNFT means that the nft program is not installed.
var ErrNoNFT = errors.New("nft not found: install the package nftables")

// Apply makes the kernel do what the rules say, replacing what an earlier
// Apply did. It needs CAP_NET_ADMIN in the present network namespace.
func Apply(ctx context.Context, r Rules) error {
	if err := nft(ctx, r.Text()); err != nil {
		return err
	}
	return r.routeVirtual()
}

// Undo removes everything that Apply made. Undoing what was never applied is
// no error.
func Undo(ctx context.Context) error {
	err := nft(ctx, fmt.Sprintf("add table inet %s\ndelete table inet %s\n", Table, Table))
	return errors.Join(err, unrouteVirtual())
}

// Applied tells whether the table is there.
func Applied(ctx context.Context) bool {
	return exec.CommandContext(ctx, "nft", "list", "table", "inet", Table).Run() == nil
}

func nft(ctx context.Context, text string) error {
	path, err := exec.LookPath("nft")
	if err != nil {
		return ErrNoNFT
	}
	command := exec.CommandContext(ctx, path, "-f", "-")
	command.Stdin = strings.NewReader(text)
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// routeProtocol marks the routes that are ours (an unused number of rtnetlink).
const routeProtocol = 153

// routeVirtual leads captured ranges to loopback where no route leads anywhere:
// the kernel looks for a route before it asks nftables, and would refuse the
// connection.
func (r Rules) routeVirtual() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	for _, p := range r.OutboundTo {
		if r.NoOutbound || routed(p) {
			continue
		}
		err := netlink.RouteReplace(virtualRoute(lo, p))
		if err != nil && p.Addr().Is4() { // IPv6 may be switched off
			return fmt.Errorf("route %s to loopback: %w", p, err)
		}
	}
	return nil
}

func routed(p netip.Prefix) bool {
	routes, err := netlink.RouteGet(net.IP(p.Masked().Addr().Next().AsSlice()))
	return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_UNICAST
}

func virtualRoute(lo netlink.Link, p netip.Prefix) *netlink.Route {
	p = p.Masked()
	return &netlink.Route{
		LinkIndex: lo.Attrs().Index,
		Dst:       &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Scope:     unix.RT_SCOPE_LINK,
		Protocol:  routeProtocol,
	}
}

func unrouteVirtual() error {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	var all error
	for _, route := range routes {
		all = errors.Join(all, netlink.RouteDel(&route))
	}
	return all
}
