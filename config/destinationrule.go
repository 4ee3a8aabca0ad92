// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/federation"
)

// destinationRules by namespace and host. Rules of one namespace for the same host,
// selector and exportTo are merged: the oldest traffic policy, the subsets of all.
type destinationRules struct {
	all         []*rule
	places      map[[2]string][]*rule // by namespace and host, while they are added
	byNamespace map[string]*hostRules
	merged      map[*Object]*rule // those of several parts, by the first
}

// hostRules are the rules of one namespace.
type hostRules struct {
	exact    map[string][]*rule // those with a selector first, then oldest first
	wildcard []*rule            // most specific first
}

type rule struct {
	host      string // full
	namespace string
	exportTo  []string
	selector  map[string]string
	parts     []*Object // oldest first
	spec      *networking.DestinationRule
	id        string
}

func (d *destinationRules) add(o *Object, spec *networking.DestinationRule) {
	r := &rule{
		host: Resolve(spec.Host, o.Namespace), namespace: o.Namespace, exportTo: slices.Sorted(slices.Values(spec.ExportTo)),
		selector: spec.WorkloadSelector.GetMatchLabels(), parts: []*Object{o}, spec: spec, id: ID(o.Object),
	}
	if d.places == nil {
		d.places = map[[2]string][]*rule{}
	}
	place := [2]string{r.namespace, r.host}
	for _, known := range d.places[place] {
		if slices.Equal(known.exportTo, r.exportTo) && maps.Equal(known.selector, r.selector) {
			known.parts = append(known.parts, o)
			return
		}
	}
	d.places[place] = append(d.places[place], r)
	d.all = append(d.all, r)
}

// finish merges and sorts; merged rules that did not change keep their pointer.
func (d *destinationRules) finish(prev *destinationRules) {
	d.byNamespace, d.merged, d.places = map[string]*hostRules{}, map[*Object]*rule{}, nil
	for _, r := range d.all {
		if len(r.parts) > 1 {
			r.merge(prev)
			d.merged[r.parts[0]] = r
		}
		ns := d.byNamespace[r.namespace]
		if ns == nil {
			ns = &hostRules{exact: map[string][]*rule{}}
			d.byNamespace[r.namespace] = ns
		}
		if r.host[0] == '*' {
			ns.wildcard = append(ns.wildcard, r)
		} else {
			ns.exact[r.host] = append(ns.exact[r.host], r)
		}
	}
	for _, ns := range d.byNamespace {
		for _, list := range ns.exact {
			slices.SortStableFunc(list, selectorsFirst)
		}
		slices.SortStableFunc(ns.wildcard, func(a, b *rule) int { return cmp.Or(moreSpecific(a.host, b.host), selectorsFirst(a, b)) })
	}
}

func selectorsFirst(a, b *rule) int {
	return cmp.Compare(min(1, len(b.selector)), min(1, len(a.selector)))
}

func (r *rule) merge(prev *destinationRules) {
	if old, ok := prev.merged[r.parts[0]]; ok && slices.Equal(old.parts, r.parts) {
		r.spec = old.spec
		return
	}
	merged := proto.Clone(r.spec).(*networking.DestinationRule)
	for _, o := range r.parts[1:] {
		more := o.Spec.(*networking.DestinationRule)
		if merged.TrafficPolicy == nil {
			merged.TrafficPolicy = more.TrafficPolicy
		}
		for _, s := range more.Subsets {
			if !slices.ContainsFunc(merged.Subsets, func(k *networking.Subset) bool { return k.Name == s.Name }) {
				merged.Subsets = append(merged.Subsets, s)
			}
		}
	}
	r.spec = merged
}

// DestinationRule is the rule for calls to a service from a workload, and its ID; nil if
// there is none. It is looked for in the client's namespace, then in the service's, then
// in the root namespace; within one, the more specific host wins, then a rule with a
// workload selector, then the oldest. Only rules whose exportTo includes the client's
// namespace count (https://istio.io/latest/docs/ops/best-practices/traffic-management/#cross-namespace-configuration).
func (x *Index) DestinationRule(namespace string, labels map[string]string, service federation.ServiceName) (*networking.DestinationRule, string) {
	if x == nil {
		return nil, ""
	}
	for i, place := range [...]string{namespace, service.Namespace, RootNamespace} {
		// A rule for everybody stands in the root namespace; for the workloads there it
		// must not hide those of the services. Only a private one is meant for them.
		private := i == 0 && place == RootNamespace
		if r := x.rules.in(place, private, namespace, labels, service.Host()); r != nil {
			return r.spec, r.id
		}
	}
	return nil, ""
}

// in finds the rule of one namespace.
func (d *destinationRules) in(place string, private bool, client string, labels map[string]string, host string) *rule {
	ns := d.byNamespace[place]
	if ns == nil {
		return nil
	}
	fits := func(r *rule) bool {
		if private && !slices.Equal(r.exportTo, []string{"."}) {
			return false
		}
		return Visible(r.exportTo, place, client) && matches(r.selector, labels)
	}
	for _, r := range ns.exact[host] {
		if fits(r) {
			return r
		}
	}
	for _, r := range ns.wildcard {
		if covers(r.host, host) && fits(r) {
			return r
		}
	}
	return nil
}
