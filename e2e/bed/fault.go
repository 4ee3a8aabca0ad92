// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// A Point is something a connection can be cut at: a *Namespace (a host, a
// pod), a *Network (at its router), a *Cluster (its control plane), a *VM.
type Point interface {
	// at returns the namespace whose packets are dropped.
	at() *Namespace
}

// A Fault is packets that do not arrive. They are dropped, not refused: who
// sends them hears nothing.
type Fault struct {
	// From is one end; Cut drops there what goes to To and what comes from
	// there, and likewise at To.
	From Point
	// To is the other end. Nil means everybody: of a network, everything
	// outside of it.
	To Point
	// OneWay drops only the packets that travel from From to To.
	OneWay bool
	// Port is a TCP or UDP port of To (of everybody, where To is nil): only
	// connections to it are cut. Zero means all.
	Port uint16
}

func (n *Namespace) at() *Namespace { return n }
func (n *Network) at() *Namespace   { return n.router }

// String says what is cut as the scripts do.
func (f Fault) String() string {
	name := func(p Point) string {
		if p == nil {
			return "everything"
		}
		return p.at().name
	}
	arrow := "↔"
	if f.OneWay {
		arrow = "→"
	}
	text := name(f.From) + arrow + name(f.To)
	if f.Port != 0 {
		text += fmt.Sprintf(":%d", f.Port)
	}
	return text
}

// Cut begins to drop the packets of a fault. Doing it twice is doing it once.
//
// An address is dropped only where it means the one that is meant: a pod's
// address on its own network, a router's, host's or control plane's anywhere.
func (w *World) Cut(f Fault) error { return w.fault(f, true) }

// Heal ends what Cut with the same fault began.
func (w *World) Heal(f Fault) error { return w.fault(f, false) }

// HealAll ends all faults of the world.
func (w *World) HealAll() error {
	w.mu.Lock()
	namespaces := slices.Clone(w.namespaces)
	w.mu.Unlock()
	var errs []error
	for _, n := range namespaces {
		n.mu.Lock()
		any := len(n.faults) > 0
		clear(n.faults)
		n.mu.Unlock()
		if any {
			errs = append(errs, n.programFaults())
		}
	}
	return errors.Join(errs...)
}

// fault changes the faults at both ends.
func (w *World) fault(f Fault, on bool) error {
	if f.From == nil {
		return errors.New("cut: a fault needs an end to be at; From is nil")
	}
	ends := []Point{f.From}
	if f.To != nil {
		ends = append(ends, f.To)
	}
	var errs []error
	for _, end := range ends {
		n := end.at()
		n.mu.Lock()
		if on {
			n.faults[f] = true
		} else {
			delete(n.faults, f)
		}
		n.mu.Unlock()
		errs = append(errs, n.programFaults())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("fault %s: %w", f, err)
	}
	return nil
}

// programFaults gives the namespace's kernel the rules of its faults.
func (n *Namespace) programFaults() error {
	n.mu.Lock()
	faults := make([]Fault, 0, len(n.faults))
	for f := range n.faults {
		faults = append(faults, f)
	}
	n.mu.Unlock()
	var in, out []string
	for _, f := range faults {
		i, o := f.rules(n)
		in, out = append(in, i...), append(out, o...)
	}
	slices.Sort(in)
	slices.Sort(out)
	return n.nft(faultRules(slices.Compact(in), slices.Compact(out)))
}

// faultRules writes the table of faults. It comes before every translation of
// addresses on the way in, and after it on the way out.
func faultRules(in, out []string) string {
	const remove = "add table inet faults\ndelete table inet faults\n"
	if len(in)+len(out) == 0 {
		return remove
	}
	chain := func(hook string, priority int, rules []string) string {
		text := fmt.Sprintf("\tchain %s {\n\t\ttype filter hook %s priority %d; policy accept;\n", hook, hook, priority)
		for _, rule := range rules {
			text += "\t\t" + rule + "\n"
		}
		return text + "\t}\n"
	}
	return remove + "table inet faults {\n" + chain("prerouting", -310, in) + chain("postrouting", 310, out) + "}\n"
}

// rules returns what the fault drops at the namespace, on the way in and out.
func (f Fault) rules(n *Namespace) (in, out []string) {
	atFrom := f.From.at() == n
	if f.To == nil {
		link := `!= "lo"`
		if _, router := f.From.(*Network); router {
			link = transitLink
		}
		out = append(out, "oifname "+link+f.ports("dport")+" drop")
		if !f.OneWay {
			in = append(in, "iifname "+link+f.ports("sport")+" drop")
		}
		return in, out
	}
	peer := f.To.at()
	toPeer, fromPeer := "dport", "sport"
	if !atFrom {
		peer = f.From.at()
		toPeer, fromPeer = "sport", "dport"
	}
	for _, prefix := range peer.seenFrom(n) {
		if atFrom || !f.OneWay {
			out = append(out, "ip daddr "+prefix.String()+f.ports(toPeer)+" drop")
		}
		if !atFrom || !f.OneWay {
			in = append(in, "ip saddr "+prefix.String()+f.ports(fromPeer)+" drop")
		}
	}
	return in, out
}

// ports limits a rule to the fault's port.
func (f Fault) ports(side string) string {
	if f.Port == 0 {
		return ""
	}
	return fmt.Sprintf(" meta l4proto { tcp, udp } th %s %d", side, f.Port)
}

// seenFrom returns the addresses of the namespace that mean this namespace
// where other is.
func (n *Namespace) seenFrom(other *Namespace) []netip.Prefix {
	var seen []netip.Prefix
	for _, a := range n.held() {
		near := slices.ContainsFunc(other.held(), func(o address) bool { return o.on == a.on })
		if a.on == nil || near || (a.on != nil && a.on.router == other) {
			seen = append(seen, a.prefix)
		}
	}
	return seen
}

// Faults lists the faults at the namespace, for a person.
func (n *Namespace) Faults() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	names := make([]string, 0, len(n.faults))
	for f := range n.faults {
		names = append(names, f.String())
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}
