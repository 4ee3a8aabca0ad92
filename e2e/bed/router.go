// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
)

// A Frontend is an address on the transit network that a network's router
// answers for.
type Frontend struct {
	Address  netip.AddrPort
	Protocol string // "tcp" or "udp"
}

// A front is a frontend with who answers behind it.
type front struct {
	Frontend
	backends []netip.AddrPort
}

// NewFrontend returns an address of the network on the transit network that
// nobody has yet, for Balance.
func (n *Network) NewFrontend() (netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lastFront = n.lastFront.Next()
	if n.lastFront.As4()[3] == 255 {
		return netip.Addr{}, fmt.Errorf("network %s: no address left for another LoadBalancer in %s", n.name, n.block)
	}
	return n.lastFront, nil
}

// RouterAddress returns the router's own address on the transit network. It
// may be a frontend as well: that is how a NodePort looks from outside.
func (n *Network) RouterAddress() netip.Addr { return n.block.Addr().Next() }

// Balance spreads new connections to the frontend over the backends, which are
// addresses of pods on the network. Connections that exist stay where they
// are, whatever becomes of the backends. Without backends connections are
// refused; Unbalance takes the address away. Equal calls cost nothing.
func (n *Network) Balance(f Frontend, backends []netip.AddrPort) error {
	if !n.block.Contains(f.Address.Addr()) {
		return fmt.Errorf("network %s: frontend %s: want an address in %s", n.name, f.Address, n.block)
	}
	if f.Protocol != "tcp" && f.Protocol != "udp" {
		return fmt.Errorf("network %s: frontend %s: protocol is %q, want tcp or udp", n.name, f.Address, f.Protocol)
	}
	backends = slices.Clone(backends)
	slices.SortFunc(backends, netip.AddrPort.Compare)
	n.mu.Lock()
	defer n.mu.Unlock()
	key := f.key()
	if old, ok := n.fronts[key]; ok && slices.Equal(old.backends, backends) {
		return nil
	}
	if err := n.router.assign(transitLink, n.frontPrefix(f)); err != nil {
		return err
	}
	n.fronts[key] = front{f, backends}
	return n.programLocked()
}

// Unbalance forgets the frontend. Its address answers no more once its last
// port is gone.
func (n *Network) Unbalance(f Frontend) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.fronts[f.key()]; !ok {
		return nil
	}
	delete(n.fronts, f.key())
	err := n.programLocked()
	for _, other := range n.fronts {
		if other.Address.Addr() == f.Address.Addr() {
			return err
		}
	}
	if f.Address.Addr() == n.RouterAddress() {
		return err
	}
	return errors.Join(err, n.router.release(transitLink, n.frontPrefix(f)))
}

func (f Frontend) key() string { return f.Protocol + "/" + f.Address.String() }

// frontPrefix is how the frontend's address stands on the router's interface.
func (n *Network) frontPrefix(f Frontend) netip.Prefix {
	if f.Address.Addr() == n.RouterAddress() {
		return netip.PrefixFrom(f.Address.Addr(), transitRange.Bits())
	}
	return netip.PrefixFrom(f.Address.Addr(), 32)
}

// programLocked gives the router's kernel its rules, in one transaction.
func (n *Network) programLocked() error {
	routed := make([]netip.Prefix, 0, len(n.routes))
	for _, other := range n.routes {
		routed = append(routed, other.pods)
	}
	fronts := make([]front, 0, len(n.fronts))
	for _, key := range slices.Sorted(maps.Keys(n.fronts)) {
		fronts = append(fronts, n.fronts[key])
	}
	return n.router.nft(routerRules(n.pods, routed, fronts))
}

// routerRules writes the rules of a router: what is refused is refused by the
// policy of the forward chain.
func routerRules(pods netip.Prefix, routed []netip.Prefix, fronts []front) string {
	var b strings.Builder
	b.WriteString("add table ip router\ndelete table ip router\ntable ip router {\n")
	b.WriteString("\tchain prerouting {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n")
	for _, f := range fronts {
		if rule := f.rule(); rule != "" {
			fmt.Fprintf(&b, "\t\t%s\n", rule)
		}
	}
	b.WriteString("\t}\n\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n")
	for _, other := range routed {
		fmt.Fprintf(&b, "\t\tip saddr %s ip daddr %s return\n", pods, other)
	}
	fmt.Fprintf(&b, "\t\tip saddr %s oifname %s masquerade\n", pods, transitLink)
	// A pod that calls its own network's frontend must get the answer from it.
	fmt.Fprintf(&b, "\t\tip saddr %s oifname %s ct status dnat masquerade\n", pods, podBridge)
	b.WriteString("\t}\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n")
	b.WriteString("\t\tct state established,related accept\n")
	fmt.Fprintf(&b, "\t\tiifname %s oifname %s ct status dnat accept\n", transitLink, podBridge)
	fmt.Fprintf(&b, "\t\tiifname %s oifname %s accept\n", podBridge, podBridge)
	fmt.Fprintf(&b, "\t\tiifname %s oifname %s ip daddr %s accept\n", podBridge, transitLink, transitRange)
	for _, other := range routed {
		fmt.Fprintf(&b, "\t\tiifname %s oifname %s ip daddr %s accept\n", podBridge, transitLink, other)
		fmt.Fprintf(&b, "\t\tiifname %s oifname %s ip saddr %s accept\n", transitLink, podBridge, other)
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}

// rule is the rule of one frontend; a frontend without backends has none, and
// the router refuses by itself.
func (f front) rule() string {
	if len(f.backends) == 0 {
		return ""
	}
	match := fmt.Sprintf("ip daddr %s %s dport %d", f.Address.Addr(), f.Protocol, f.Address.Port())
	if len(f.backends) == 1 {
		return fmt.Sprintf("%s dnat to %s", match, f.backends[0])
	}
	elements := make([]string, len(f.backends))
	for i, backend := range f.backends {
		elements[i] = fmt.Sprintf("%d : %s . %d", i, backend.Addr(), backend.Port())
	}
	return fmt.Sprintf("%s dnat ip to numgen inc mod %d map { %s }", match, len(elements), strings.Join(elements, ", "))
}

// nft gives the namespace's kernel a set of rules.
func (n *Namespace) nft(rules string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := n.Run(ctx, Command{Path: "nft", Args: []string{"-f", "-"}, Stdin: strings.NewReader(rules)})
	if err != nil {
		return fmt.Errorf("%w\nrules:\n%s", err, rules)
	}
	return nil
}

// sysctl sets a kernel parameter of the namespace.
func (n *Namespace) sysctl(key, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0o644); err != nil {
			return fmt.Errorf("namespace %s: set %s: %w", n.name, key, err)
		}
		return nil
	})
}
