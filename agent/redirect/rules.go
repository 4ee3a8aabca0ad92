// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

const (
	// Table is the name of the nftables table, in family inet.
	Table = "isthmus"
	// Mark is the socket mark of the agent's own connections.
	Mark = 0x539
	// UID is the user and group that Envoy runs as.
	UID = 1337
	// OutboundPort, InboundPort and DNSPort are where traffic goes.
	OutboundPort = 15001
	// InboundPort is Envoy's listener for connections to the workload.
	InboundPort = 15006
	// DNSPort is the agent's resolver.
	DNSPort = 15053
)

// Inside is the source address of Envoy's IPv4 connections to its own
// workload. It tells such a connection from one in which the workload calls
// itself by its own address, which is a call like any other. IPv6 has only one
// loopback address, so there such calls go to the workload directly.
var Inside = netip.MustParseAddr("127.0.0.6")

// Own are the ports of agent and Envoy that must be reachable as they are.
var Own = []uint16{15020, 15021, 15090}

// Rules say what is captured. The zero value captures all TCP in both
// directions and all DNS: what a pod wants.
type Rules struct {
	// OutboundTo limits outbound capture to these ranges; empty captures all.
	OutboundTo []netip.Prefix
	// ExcludeTo and ExcludeToPorts are destinations left alone.
	ExcludeTo      []netip.Prefix
	ExcludeToPorts []uint16
	// InboundPorts limits inbound capture to these ports; empty captures all.
	InboundPorts []uint16
	// ExcludeInboundPorts are left alone, besides Own.
	ExcludeInboundPorts []uint16
	// Resolvers limits DNS capture to queries sent to these addresses: those of
	// resolv.conf. A resolver on the same machine can then ask its own upstream
	// without meeting itself. Empty captures all queries.
	Resolvers []netip.Addr
	// NoInbound, NoOutbound and NoDNS leave a whole direction alone.
	NoInbound, NoOutbound, NoDNS bool
	// UID replaces the user that Envoy runs as; 0 means UID.
	UID int
}

// Text renders the transaction for nft -f: remove the table if it is there,
// then make it.
func (r Rules) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "add table inet %s\ndelete table inet %s\ntable inet %s {\n", Table, Table, Table)
	if !r.NoInbound {
		b.WriteString(chain("inbound", "type nat hook prerouting priority -100; policy accept;", r.inbound()))
	}
	if !r.NoOutbound || !r.NoDNS || !r.NoInbound {
		b.WriteString(chain("outbound", "type nat hook output priority -100; policy accept;", r.outbound()))
	}
	b.WriteString("}\n")
	return b.String()
}

func chain(name, kind string, rules []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\tchain %s {\n\t\t%s\n", name, kind)
	for _, rule := range rules {
		fmt.Fprintf(&b, "\t\t%s\n", rule)
	}
	b.WriteString("\t}\n")
	return b.String()
}

func (r Rules) inbound() []string {
	rules := []string{
		`iifname "lo" return`,
		fmt.Sprintf("tcp dport %s return", ports(append(slices.Clone(Own), r.ExcludeInboundPorts...))),
	}
	if len(r.InboundPorts) > 0 {
		return append(rules, fmt.Sprintf("tcp dport %s redirect to :%d", ports(r.InboundPorts), InboundPort))
	}
	return append(rules, fmt.Sprintf("meta l4proto tcp redirect to :%d", InboundPort))
}

// outbound is evaluated in order; each line names who is let go, or caught.
func (r Rules) outbound() []string {
	uid := r.UID
	if uid == 0 {
		uid = UID
	}
	rules := []string{
		fmt.Sprintf("meta mark %#x return", Mark),
		fmt.Sprintf(`oifname "lo" ip saddr %s return`, Inside),
	}
	if !r.NoInbound {
		rules = append(rules, r.selfCalls(uid)...)
	}
	rules = append(rules,
		fmt.Sprintf("meta skuid %d return", uid),
		fmt.Sprintf("meta skgid %d return", uid),
	)
	if !r.NoDNS {
		rules = append(rules, r.dns()...)
	}
	if r.NoOutbound {
		return rules
	}
	if len(r.ExcludeToPorts) > 0 {
		rules = append(rules, fmt.Sprintf("tcp dport %s return", ports(r.ExcludeToPorts)))
	}
	rules = append(rules, perFamily("%s daddr %s return", r.ExcludeTo)...)
	if len(r.OutboundTo) > 0 {
		// Before the loopback rule: where no route leads to a virtual address,
		// Apply leads it to loopback.
		return append(rules, perFamily("%s daddr %s meta l4proto tcp redirect to :"+strconv.Itoa(OutboundPort), r.OutboundTo)...)
	}
	return append(rules, `oifname "lo" return`, fmt.Sprintf("meta l4proto tcp redirect to :%d", OutboundPort))
}

// selfCalls sends Envoy's connections to its own workload's address through
// the inbound listener, as a call from anywhere else would go.
func (r Rules) selfCalls(uid int) []string {
	prefix := fmt.Sprintf(`meta skuid %d oifname "lo" ip daddr != 127.0.0.0/8 tcp dport`, uid)
	if len(r.InboundPorts) > 0 {
		return []string{fmt.Sprintf("%s %s redirect to :%d", prefix, ports(r.InboundPorts), InboundPort)}
	}
	left := ports(append(slices.Clone(Own), r.ExcludeInboundPorts...))
	return []string{fmt.Sprintf("%s != %s redirect to :%d", prefix, left, InboundPort)}
}

func (r Rules) dns() []string {
	if len(r.Resolvers) == 0 {
		return []string{
			fmt.Sprintf("udp dport 53 redirect to :%d", DNSPort),
			fmt.Sprintf("tcp dport 53 redirect to :%d", DNSPort),
		}
	}
	var prefixes []netip.Prefix
	for _, a := range r.Resolvers {
		a = a.Unmap().WithZone("")
		prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
	}
	return append(
		perFamily("%s daddr %s udp dport 53 redirect to :"+strconv.Itoa(DNSPort), prefixes),
		perFamily("%s daddr %s tcp dport 53 redirect to :"+strconv.Itoa(DNSPort), prefixes)...,
	)
}

// perFamily makes one rule for IPv4 and one for IPv6 out of a format with two
// places: the family and the set.
func perFamily(format string, prefixes []netip.Prefix) []string {
	var four, six []string
	for _, p := range prefixes {
		p = p.Masked()
		text := p.String()
		if p.IsSingleIP() {
			text = p.Addr().String()
		}
		if p.Addr().Is4() {
			four = append(four, text)
		} else {
			six = append(six, text)
		}
	}
	var rules []string
	for _, family := range []struct {
		name string
		in   []string
	}{{"ip", four}, {"ip6", six}} {
		if len(family.in) == 0 {
			continue
		}
		slices.Sort(family.in)
		rules = append(rules, fmt.Sprintf(format, family.name, "{ "+strings.Join(slices.Compact(family.in), ", ")+" }"))
	}
	return rules
}

func ports(in []uint16) string {
	in = slices.Clone(in)
	slices.Sort(in)
	var texts []string
	for _, p := range slices.Compact(in) {
		texts = append(texts, strconv.Itoa(int(p)))
	}
	return "{ " + strings.Join(texts, ", ") + " }"
}
