// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// staticGateway is the name of a gateway that only the registration tells of.
const staticGateway = "static"

// levelGateways are the east-west gateways of the member: one for each Service that is
// labelled as such, and those the registration names.
func (c *caches) levelGateways() map[string]*federation.Gateway {
	out := map[string]*federation.Gateway{}
	for name, mark := range c.gateways {
		if mark == istioGateway && !c.member.AllowIstioCA {
			continue // it passes on what trusts other roots
		}
		s, ok := c.services.get(registry.ObjectName(name))
		if ok {
			g := c.gateway(s)
			out[g.Name] = g
		}
	}
	if len(c.member.GatewayAddresses) > 0 {
		c.addStatic(out)
	}
	for name, g := range out {
		if old := c.last.Gateways[name]; old != nil && reflect.DeepEqual(old, g) {
			out[name] = old
		}
	}
	return out
}

// addStatic gives the gateways of the member's network the addresses of the registration.
func (c *caches) addStatic(out map[string]*federation.Gateway) {
	addresses, problem := parseAddresses(strings.Join(c.member.GatewayAddresses, ","))
	if problem != "" {
		c.find(codeMalformed, "cluster gateway addresses", problem)
	}
	found := false
	for _, name := range slices.Sorted(maps.Keys(out)) {
		if g := out[name]; g.Network == c.member.Network {
			g.Addresses, g.Pending, found = addresses, "", true
		}
	}
	if !found {
		// Nobody tells how many pods are behind: what is named is taken to be there.
		out[staticGateway] = &federation.Gateway{Source: c.source, Network: c.member.Network, Name: staticGateway, Addresses: addresses, Ready: 1}
	}
}

func (c *caches) gateway(s *serviceRow) *federation.Gateway {
	g := &federation.Gateway{Source: c.source, Name: s.name.String(), Network: federation.Network(s.labels[NetworkLabel])}
	if g.Network == "" {
		g.Network = c.member.Network
	}
	g.Ready = c.readyPods(s.name)
	if s.explicit != "" {
		var problem string
		if g.Addresses, problem = parseAddresses(s.explicit); problem != "" {
			c.find(codeMalformed, "Service "+s.name.String(), "annotation "+GatewayAddress+": "+problem)
		}
	}
	port, ok := gatewayPort(s)
	switch {
	case len(g.Addresses) > 0:
	case !ok:
		g.Pending = fmt.Sprintf("Service %s has no port %d and none named \"tls\"", s.name, GatewayPort)
	case len(s.addresses) > 0:
		for _, host := range s.addresses {
			g.Addresses = append(g.Addresses, federation.GatewayAddress{Host: host, Port: port})
		}
	case s.balancer:
		g.Pending = fmt.Sprintf("Service %s waits for an address of its load balancer", s.name)
	case s.nodePorts[port] > 0:
		g.Addresses = c.nodeAddresses(s, s.nodePorts[port])
		if len(g.Addresses) == 0 {
			g.Pending = fmt.Sprintf("no node of a ready pod of Service %s has an address", s.name)
		}
	default:
		g.Pending = fmt.Sprintf("Service %s has no address that other networks reach: want type LoadBalancer or NodePort, or annotation %s", s.name, GatewayAddress)
	}
	slices.SortFunc(g.Addresses, func(a, b federation.GatewayAddress) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port))
	})
	if g.Pending == "" && g.Ready == 0 {
		g.Pending = fmt.Sprintf("no pod of Service %s is ready", s.name)
	}
	return g
}

// readyPods counts the pods behind a service; one of two families counts once.
func (c *caches) readyPods(name federation.ServiceName) int {
	seen := map[string]bool{}
	for _, slice := range c.slicesOf[name] {
		for i := range slice.row.endpoints {
			if e := &slice.row.endpoints[i]; e.health == ready {
				seen[first(e.pod, e.addr.String())] = true
			}
		}
	}
	return len(seen)
}

func gatewayPort(s *serviceRow) (uint32, bool) {
	for _, p := range s.ports {
		if p.Number == GatewayPort {
			return p.Number, true
		}
	}
	for _, p := range s.ports {
		if p.Name == "tls" {
			return p.Number, true
		}
	}
	return 0, false
}

// nodeAddresses are the nodes where a ready gateway pod runs.
func (c *caches) nodeAddresses(s *serviceRow, port uint32) []federation.GatewayAddress {
	seen := map[string]bool{}
	var out []federation.GatewayAddress
	for _, slice := range c.slicesOf[s.name] {
		for i := range slice.row.endpoints {
			e := &slice.row.endpoints[i]
			if e.place == nil || seen[e.place.node] || e.health != ready {
				continue
			}
			n, ok := c.nodes.get(inCluster(e.place.node))
			if !ok {
				continue
			}
			seen[e.place.node] = true
			for _, a := range n.addresses {
				out = append(out, federation.GatewayAddress{Host: a, Port: port})
			}
		}
	}
	return out
}

// parseAddresses reads "host[:port], …".
func parseAddresses(list string) ([]federation.GatewayAddress, string) {
	var out []federation.GatewayAddress
	problem := ""
	for _, text := range strings.Split(list, ",") {
		text = strings.TrimSpace(text)
		if text == "" {
			continue
		}
		host, port := text, uint64(GatewayPort)
		if h, p, err := net.SplitHostPort(text); err == nil {
			n, err := strconv.ParseUint(p, 10, 16)
			if err != nil || n == 0 {
				problem = fmt.Sprintf("%q: want host or host:port", cut(text))
				continue
			}
			host, port = h, n
		}
		if strings.ContainsAny(host, " /@") {
			problem = fmt.Sprintf("%q: want host or host:port", cut(text))
			continue
		}
		out = append(out, federation.GatewayAddress{Host: strings.Trim(host, "[]"), Port: uint32(port)})
	}
	return out, problem
}

// gatewayCondition sums up the gateways of the member's network.
func (c *caches) gatewayCondition(gateways map[string]*federation.Gateway) federation.Condition {
	condition := federation.Condition{Type: federation.GatewayReady, Status: true, Reason: "NoGateway", Message: "the cluster has no east-west gateway"}
	for _, name := range slices.Sorted(maps.Keys(gateways)) {
		g := gateways[name]
		if len(g.Addresses) > 0 && g.Ready > 0 {
			return federation.Condition{Type: federation.GatewayReady, Status: true, Reason: "Ready"}
		}
		condition.Status, condition.Reason, condition.Message = false, "Pending", g.Pending
	}
	return condition
}
