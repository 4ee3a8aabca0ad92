// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"github.com/isthmus-mesh/isthmus/federation"
)

// Builder is Build with a memory: it makes again only what a change can have touched,
// with the same bytes as a full computation. It is not safe for concurrent use.
type Builder struct {
	// Weigh may hold back changes of remote weights (see federation.Damper); nil means
	// exact. A service whose weight it holds back is to be named to Forget when it lets go.
	Weigh func(key federation.WeightKey, ready uint32) uint32

	view    *federation.View // that ports was made for
	ports   map[federation.WorkloadKey][]inboundPort
	classes map[Class]*memory
}

// memory is what was last built for a class.
type memory struct {
	view  *federation.View
	index Index
	parts map[*federation.Service]*built
}

// Class is the class of a proxy in a view.
func (b *Builder) Class(view *federation.View, index Index, proxy Proxy) Class {
	if b.view != view {
		b.view, b.ports = view, inboundPorts(view)
	}
	var keys []string
	if index != nil {
		keys = index.SelectorKeys()
	}
	return classOf(proxy, b.ports[proxy.Workload], keys)
}

// Build is the function Build.
func (b *Builder) Build(view *federation.View, index Index, proxy Proxy) (Resources, []federation.Finding) {
	return b.BuildClass(view, index, b.Class(view, index, proxy))
}

// BuildClass makes everything the proxies of a class are told.
func (b *Builder) BuildClass(view *federation.View, index Index, class Class) (Resources, []federation.Finding) {
	old := b.classes[class]
	if old != nil && (old.index != index || !view.SameRoads(old.view)) {
		old = nil
	}
	job := newBuild(view, index, class)
	job.weigh = b.Weigh
	fresh := &memory{view: view, index: index, parts: make(map[*federation.Service]*built, len(view.Services))}

	frame := job.frame()
	parts := []*built{&frame}
	var seen []*federation.Service
	for _, s := range view.Services {
		if !job.visible(s) {
			continue
		}
		seen = append(seen, s)
		var part *built
		if old != nil && !job.routed(s) {
			part = old.parts[s]
		}
		if part == nil {
			made := job.service(s)
			part = &made
		}
		fresh.parts[s] = part
		parts = append(parts, part)
	}
	table := job.nameTable(seen)
	parts = append(parts, &table)
	if b.classes == nil {
		b.classes = map[Class]*memory{}
	}
	b.classes[class] = fresh
	return gather(parts)
}

// routed tells whether the service's routes may depend on other services.
func (b *build) routed(s *federation.Service) bool {
	if b.index == nil {
		return false
	}
	vs, _ := b.index.VirtualService(b.class.Namespace, b.labels, s.Host)
	return vs != nil
}

// Forget makes the services with these names be built again, for all classes.
func (b *Builder) Forget(names ...federation.ServiceName) {
	for _, m := range b.classes {
		for _, name := range names {
			if s, ok := m.view.Service(name); ok {
				delete(m.parts, s)
			}
		}
	}
}

// Keep drops what was built for classes that keep does not want.
func (b *Builder) Keep(keep func(Class) bool) {
	for c := range b.classes {
		if !keep(c) {
			delete(b.classes, c)
		}
	}
}
