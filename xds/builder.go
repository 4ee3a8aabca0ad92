// SPDX-License-Identifier: Apache-2.0

package xds

import (
	networking "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
)

// Builder is Build with a memory, for the proxies of one scope. What a service needs is
// made once for all classes that treat it alike, and again only when something it depends
// on has changed; the bytes are those of a full computation. It is not safe for
// concurrent use.
type Builder struct {
	// Weigh may hold back changes of remote weights (see federation.Damper); nil means
	// exact. A service whose weight it held back is to be named to Forget when it lets go.
	Weigh func(key federation.WeightKey, ready uint32) uint32

	// Closed names what gateways do not lead to yet (see federation.Query); nil means
	// nothing. A service that was closed is to be named to Forget when it opens.
	Closed func(key federation.WeightKey) bool

	// LogFormat of access logs; empty means AccessLogFormat.
	LogFormat string

	view    *federation.View // what the following was made for
	index   *config.Index
	ports   map[federation.WorkloadKey][]inboundPort
	parts   map[partKey]*built
	classes map[Class]*whole
	census  uint64 // see Census
}

// partKey is all that the part of a service without a VirtualService depends on, beside
// view and index.
type partKey struct {
	service     *federation.Service
	rule        *networking.DestinationRule
	trustDomain string
	families    families
}

// move makes view and index current, and forgets what they make invalid.
func (b *Builder) move(view *federation.View, index *config.Index) {
	if b.view == view && b.index == index {
		return
	}
	switch {
	case b.parts == nil, b.index != index, !view.SameRoads(b.view), b.view != nil && b.view.Scope != view.Scope:
		b.parts, b.classes = map[partKey]*built{}, map[Class]*whole{}
	default:
		for key := range b.parts {
			if s, ok := view.Service(key.service.Name); !ok || s != key.service {
				delete(b.parts, key)
			}
		}
		for class, w := range b.classes {
			if w.view != b.view {
				delete(b.classes, class) // nobody is of this class any more
			}
		}
	}
	if b.view == nil || b.index != index || !samePorts(b.view, view) {
		b.ports = nil
	}
	b.view, b.index = view, index
}

// Class is the class of a proxy in a view.
func (b *Builder) Class(view *federation.View, index *config.Index, proxy Proxy) Class {
	b.Census(view, index)
	return classOf(proxy, b.ports[proxy.Workload], index.SelectorKeys())
}

// Census stays the same as long as Class gives the same for every proxy.
func (b *Builder) Census(view *federation.View, index *config.Index) uint64 {
	b.move(view, index)
	if b.ports == nil {
		b.ports = inboundPorts(view)
		b.census++
	}
	return b.census
}

// Build is the function Build.
func (b *Builder) Build(view *federation.View, index *config.Index, proxy Proxy) (Resources, []federation.Finding) {
	return b.BuildClass(view, index, b.Class(view, index, proxy))
}

// BuildClass makes everything the proxies of a class are told.
func (b *Builder) BuildClass(view *federation.View, index *config.Index, class Class) (Resources, []federation.Finding) {
	b.move(view, index)
	job := newBuild(view, index, class)
	job.weigh, job.closed, job.logFormat = b.Weigh, b.Closed, b.LogFormat
	w := job.whole(b.classes[class], b.part)
	b.classes[class] = w
	return w.resources, w.findings
}

// part makes or remembers what one service needs. Routes of a VirtualService depend on
// other services too, so they are always made again.
func (b *Builder) part(job *build, s *federation.Service) *built {
	if job.routed(s) {
		made := job.guarded(s)
		made.routed = true
		return made
	}
	rule, _ := job.destinationRule(s)
	key := partKey{service: s, rule: rule, trustDomain: job.class.TrustDomain, families: job.class.families()}
	if part := b.parts[key]; part != nil {
		return part
	}
	made := job.guarded(s)
	b.parts[key] = made
	return made
}

// guarded is service, for input that nobody thought of: one service that makes the
// translation fail must not take down the others.
func (b *build) guarded(s *federation.Service) (out *built) {
	defer func() {
		if r := recover(); r != nil {
			out = &built{}
			out.note("Service "+s.Name.String(), federation.SeverityError, "cannot be translated and is left out: %v; please report this", r)
		}
	}()
	made := b.service(s)
	return &made
}

// routed tells whether the service has routes that users wrote.
func (b *build) routed(s *federation.Service) bool {
	vs, _ := b.index.VirtualService(b.class.Namespace, b.labels, s.Host)
	return vs != nil
}

// Forget makes the services with these names be made again.
func (b *Builder) Forget(names ...federation.ServiceName) {
	forget := make(map[federation.ServiceName]bool, len(names))
	for _, n := range names {
		forget[n] = true
	}
	for key := range b.parts {
		if forget[key.service.Name] {
			delete(b.parts, key)
		}
	}
	for _, w := range b.classes {
		w.forget(forget)
	}
}
