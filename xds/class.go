// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Class is what proxies that must receive identical resources have in common. Build sees
// of a proxy only its class, so the proxies of one class cannot differ. It is comparable.
type Class struct {
	Scope       federation.Scope
	Role        federation.ProxyRole
	Namespace   string
	TrustDomain string
	V4, V6      bool
	Labels      string // those that some policy's selector looks at: k=v, …
	Ports       string // its inbound ports: number/protocol, …
}

// String is short enough for a table.
func (c Class) String() string {
	out := fmt.Sprintf("%s/%s/%s/%s", c.Role, c.Scope.Network, c.Scope.Cluster, c.Namespace)
	if c.Labels != "" {
		out += " " + c.Labels
	}
	if c.Ports != "" {
		out += " " + c.Ports
	}
	return out
}

func (c Class) families() families { return families{v4: c.V4, v6: c.V6} }

// Scope says whose view the proxy sees. A gateway sees what strangers may be let in to:
// nothing that is local to one cluster, so that it cannot be asked for it.
func (p Proxy) Scope() federation.Scope {
	if p.Role == federation.GatewayRole {
		return federation.Scope{Network: p.Network, Gateway: true}
	}
	return federation.Scope{Cluster: p.Cluster, Network: p.Network}
}

// GatewayClass is the class of an east-west gateway.
func GatewayClass(p Proxy) Class { return classOf(p, nil, nil) }

// classOf finds the class of a proxy. keys are the label keys that selectors look at.
func classOf(p Proxy, ports []inboundPort, keys []string) Class {
	c := Class{Scope: p.Scope(), Role: p.Role, TrustDomain: p.trustDomain()}
	for _, ip := range p.Addresses {
		if ip.Unmap().Is4() {
			c.V4 = true
		} else {
			c.V6 = true
		}
	}
	if !c.V4 && !c.V6 {
		c.V4 = true
	}
	if p.Role == federation.GatewayRole {
		return c
	}
	c.Namespace = p.Namespace
	c.Labels = canonicalLabels(p.Labels, keys)
	c.Ports = canonicalPorts(ports)
	return c
}

func canonicalLabels(labels map[string]string, keys []string) string {
	var parts []string
	for _, k := range keys {
		if v, ok := labels[k]; ok {
			parts = append(parts, k+"="+v)
		}
	}
	slices.Sort(parts)
	return strings.Join(slices.Compact(parts), ",")
}

// labels undoes canonicalLabels. Neither keys nor values can hold "," or "=".
func (c Class) labels() map[string]string {
	out := map[string]string{}
	for _, part := range strings.Split(c.Labels, ",") {
		if k, v, ok := strings.Cut(part, "="); ok {
			out[k] = v
		}
	}
	return out
}

func canonicalPorts(ports []inboundPort) string {
	var parts []string
	for _, p := range ports {
		parts = append(parts, fmt.Sprintf("%d/%s", p.number, p.protocol))
	}
	return strings.Join(parts, ",")
}

// ports undoes canonicalPorts.
func (c Class) ports() []inboundPort {
	var out []inboundPort
	for _, part := range strings.Split(c.Ports, ",") {
		var p inboundPort
		if n, _ := fmt.Sscanf(part, "%d", &p.number); n != 1 {
			continue
		}
		_, protocol, _ := strings.Cut(part, "/")
		p.protocol = federation.Protocol(protocol)
		out = append(out, p)
	}
	return out
}

func withPort(list []inboundPort, p inboundPort) []inboundPort {
	for i := range list {
		if list[i].number == p.number {
			switch was := list[i].protocol; {
			case was == p.protocol:
			case was.IsHTTP() && p.protocol.IsHTTP():
				list[i].protocol = federation.HTTP
			default:
				list[i].protocol = federation.Unknown
			}
			return list
		}
	}
	return append(list, p)
}
