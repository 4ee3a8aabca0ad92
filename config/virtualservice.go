// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"
)

// meshGateway is the reserved name that means all sidecars.
const meshGateway = "mesh"

// virtualServices of the sidecars, by host.
type virtualServices struct {
	all      []*virtualService // oldest first
	byObject map[*Object]*virtualService
	exact    map[string][]hostRoutes
	wildcard []hostRoutes // most specific first, then oldest first
}

type virtualService struct {
	object    *Object
	namespace string
	exportTo  []string
	spec      *networking.VirtualService // for sidecars: full names, their routes only
	id        string
}

// hostRoutes is a virtual service under one of its hosts.
type hostRoutes struct {
	host string
	*virtualService
}

// add is called oldest first.
func (v *virtualServices) add(o *Object, spec *networking.VirtualService, x, prev *Index) {
	if !forSidecars(spec.Gateways) {
		x.note(o, "NotYetTranslated: spec.gateways: none is %q; routes of Gateway objects come later", meshGateway)
		return
	}
	if len(spec.Hosts) == 0 {
		x.note(o, "NotYetTranslated: spec.hosts: none, so it can only be delegated to")
		return
	}
	s := &virtualService{object: o, namespace: o.Namespace, exportTo: slices.Sorted(slices.Values(spec.ExportTo)), id: ID(o.Object)}
	if old, ok := prev.services.byObject[o]; ok {
		s = old
	} else {
		s.spec = sidecarRoutes(spec, o.Namespace)
	}
	if v.byObject == nil {
		v.byObject = map[*Object]*virtualService{}
	}
	v.byObject[o] = s
	v.all = append(v.all, s)
}

// finish sorts by host, and notes hosts that an older service has for the same clients.
func (v *virtualServices) finish(x *Index) {
	v.exact = map[string][]hostRoutes{}
	taken := map[string]*virtualService{}
	for _, s := range v.all {
		for _, host := range s.spec.Hosts {
			clients := strings.Join(s.exportTo, ",")
			if clients != "" && clients != "*" {
				clients = s.namespace + ":" + clients
			} else {
				clients = "*"
			}
			if older := taken[host+" "+clients]; older != nil && older != s {
				x.note(s.object, "NoEffect: spec.hosts: %s has the older %s", host, older.id)
				continue
			}
			taken[host+" "+clients] = s
			if strings.HasPrefix(host, "*") {
				v.wildcard = append(v.wildcard, hostRoutes{host, s})
			} else {
				v.exact[host] = append(v.exact[host], hostRoutes{host, s})
			}
		}
	}
	slices.SortStableFunc(v.wildcard, func(a, b hostRoutes) int { return moreSpecific(a.host, b.host) })
}

// sidecarRoutes is a virtual service as sidecars need it: short names made full, and
// without what is said for gateways only.
func sidecarRoutes(spec *networking.VirtualService, namespace string) *networking.VirtualService {
	out := proto.Clone(spec).(*networking.VirtualService)
	for i := range out.Hosts {
		out.Hosts[i] = Resolve(out.Hosts[i], namespace)
	}
	resolve := func(d *networking.Destination) {
		if d != nil {
			d.Host = Resolve(d.Host, namespace)
		}
	}
	out.Http = slices.DeleteFunc(out.Http, func(r *networking.HTTPRoute) bool {
		before := len(r.Match)
		r.Match = slices.DeleteFunc(r.Match, func(m *networking.HTTPMatchRequest) bool { return !forSidecars(m.Gateways) })
		return before > 0 && len(r.Match) == 0
	})
	for _, r := range out.Http {
		for _, d := range r.Route {
			resolve(d.Destination)
		}
		resolve(r.Mirror)
		for _, m := range r.Mirrors {
			resolve(m.Destination)
		}
	}
	out.Tls = slices.DeleteFunc(out.Tls, func(r *networking.TLSRoute) bool {
		r.Match = slices.DeleteFunc(r.Match, func(m *networking.TLSMatchAttributes) bool { return !forSidecars(m.Gateways) })
		return len(r.Match) == 0
	})
	for _, r := range out.Tls {
		for _, d := range r.Route {
			resolve(d.Destination)
		}
	}
	out.Tcp = slices.DeleteFunc(out.Tcp, func(r *networking.TCPRoute) bool {
		before := len(r.Match)
		r.Match = slices.DeleteFunc(r.Match, func(m *networking.L4MatchAttributes) bool { return !forSidecars(m.Gateways) })
		return before > 0 && len(r.Match) == 0
	})
	for _, r := range out.Tcp {
		for _, d := range r.Route {
			resolve(d.Destination)
		}
	}
	return out
}

func forSidecars(gateways []string) bool {
	return len(gateways) == 0 || slices.Contains(gateways, meshGateway)
}

// VirtualService are the routes of a host for the sidecars of a workload, and their ID;
// nil if there are none. Names of hosts and destinations are full; routes and matches for
// gateways only are left out, those with sourceLabels or sourceNamespace are not.
//
// The more specific host wins; then a private service of the client's namespace
// (exportTo "."), then one exported to it by name, then a public one; then the oldest.
// Where the workload's Sidecar limits what it imports, services of other hosts do not
// count.
func (x *Index) VirtualService(namespace string, labels map[string]string, host string) (*networking.VirtualService, string) {
	if x == nil || len(x.services.all) == 0 {
		return nil, ""
	}
	limits := x.sidecars.of(namespace, labels)
	choose := func(list []hostRoutes) *virtualService {
		var best *virtualService
		for _, s := range list {
			if !Visible(s.exportTo, s.namespace, namespace) || limits != nil && !limits.imports(namespace, s.namespace, s.host, 0) {
				continue
			}
			if best == nil || cmp.Less(s.reach(), best.reach()) {
				best = s.virtualService
			}
		}
		return best
	}
	if s := choose(x.services.exact[host]); s != nil {
		return s.spec, s.id
	}
	rest := x.services.wildcard
	for len(rest) > 0 {
		n := 1
		for n < len(rest) && rest[n].host == rest[0].host {
			n++
		}
		if covers(rest[0].host, host) {
			if s := choose(rest[:n]); s != nil {
				return s.spec, s.id
			}
		}
		rest = rest[n:]
	}
	return nil, ""
}

// reach orders private before listed before public.
func (v *virtualService) reach() int {
	switch {
	case len(v.exportTo) == 0 || slices.Contains(v.exportTo, "*"):
		return 2
	case slices.Equal(v.exportTo, []string{"."}):
		return 0
	}
	return 1
}
