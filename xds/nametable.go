// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"net/netip"
	"unicode/utf8"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
)

// names adds what the agent's DNS answers of a service. The table comes in parts, a
// resource for each service, so that one more service is one more part. One without any
// address has none, so that the question goes on to the cluster's own DNS.
func (b *build) names(out *built, s *federation.Service) {
	table := &api.NameTable{Table: map[string]*api.NameTable_NameInfo{}}
	name := func(host string, registry bool, list []netip.Addr) {
		ips := b.dialable(list)
		if len(ips) == 0 || !utf8.ValidString(host) {
			return
		}
		info := &api.NameTable_NameInfo{Ips: ips}
		if registry {
			info.Registry, info.Shortname, info.Namespace = "Kubernetes", s.Name.Name, s.Name.Namespace
		}
		table.Table[host] = info
	}
	addresses := s.Addresses
	switch {
	case s.Type == federation.ExternalName:
		addresses = b.aliasOf(s)
	case s.HeadlessHere():
		addresses = b.podNames(s, name)
	}
	name(s.Host, true, addresses)
	for _, alias := range s.Aliases {
		name(alias, false, addresses)
	}
	for _, pod := range s.Pods {
		name(pod.Host, false, pod.Address)
	}
	if len(table.Table) == 0 {
		return
	}
	r, err := NewResource(s.Host, table)
	if err != nil {
		out.note("Service "+s.Name.String(), federation.SeverityError, "its names cannot be told: %v", err)
		return
	}
	out.add(NameTableType, r)
}

// podNames names the pods of a headless service and returns all their addresses.
func (b *build) podNames(s *federation.Service, name func(string, bool, []netip.Addr)) []netip.Addr {
	var all []netip.Addr
	byHost := map[string][]netip.Addr{}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if !e.Direct || e.Health != federation.Ready {
			continue
		}
		all = append(all, e.Addresses...)
		if e.Hostname != "" {
			byHost[e.Hostname] = append(byHost[e.Hostname], e.Addresses...)
		}
	}
	for host, list := range byHost {
		name(host+"."+s.Host, false, list)
	}
	return all
}

// aliasOf are the addresses of the service that an ExternalName means, if it is one of
// the mesh: the cluster's own DNS may not know it.
func (b *build) aliasOf(s *federation.Service) []netip.Addr {
	name, ok := federation.ServiceOfHost(s.ExternalName)
	if !ok {
		return nil
	}
	b.asked = append(b.asked, name)
	target, ok := b.view.Service(name)
	if !ok || target.Type == federation.ExternalName || !b.visible(target) {
		return nil
	}
	return target.Addresses
}

// dialable are the addresses of the families that the class has.
func (b *build) dialable(list []netip.Addr) []string {
	var out []string
	for _, ip := range list {
		if b.class.families().has(ip) {
			out = append(out, ip.String())
		}
	}
	return out
}
