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

	view     *federation.View // what the following was made for
	index    *config.Index
	parts    map[federation.ServiceName][]variant
	classes  map[Class]*whole
	lagging  int // classes with something to look at again
	outcomes outcomes
	census   census
}

// variant is what was made of a service for all classes with one key.
type variant struct {
	key  partKey
	part *built
}

// partKey is all that the part of a service without a VirtualService depends on, beside
// service, view and index.
type partKey struct {
	rule        *networking.DestinationRule
	trustDomain string
	families    families
}

// move makes view and index current, and forgets what they make invalid.
func (b *Builder) move(view *federation.View, index *config.Index) {
	if b.view == view && b.index == index {
		return
	}
	foreign := b.view == nil || b.view.Scope != view.Scope
	var changed []federation.ServiceName
	if !foreign {
		changed = view.Changed(b.view)
	}
	b.census.move(b.view, view, changed, foreign, index.SelectorKeys())
	if foreign || b.index != index || !view.SameRoads(b.view) {
		b.parts, b.classes, b.lagging = map[federation.ServiceName][]variant{}, map[Class]*whole{}, 0
		b.outcomes = nil
	} else {
		b.again(changed, true)
	}
	b.view, b.index = view, index
}

// again makes all classes look at some services again. Those that nobody has asked for
// since the last change are dropped: nobody is of them any more.
func (b *Builder) again(names []federation.ServiceName, moved bool) {
	if len(names) == 0 {
		return
	}
	for _, name := range names {
		delete(b.parts, name)
	}
	b.lagging = len(b.classes)
	for class, w := range b.classes {
		if moved {
			w.missed++
		}
		if w.missed > 1 {
			delete(b.classes, class)
			b.lagging--
			continue
		}
		w.behind = append(w.behind, names...)
	}
	b.outcomes = nil
}

// Class is the class of a proxy in a view.
func (b *Builder) Class(view *federation.View, index *config.Index, proxy Proxy) Class {
	b.move(view, index)
	return classOf(proxy, b.census.ports(view, proxy.Workload), index.SelectorKeys())
}

// Moved are the workloads of which Class may say something else in this view than when
// Moved was asked last; all tells that they may be any.
func (b *Builder) Moved(view *federation.View, index *config.Index) (some []federation.WorkloadKey, all bool) {
	b.move(view, index)
	return b.census.moved()
}

// Build is the function Build.
func (b *Builder) Build(view *federation.View, index *config.Index, proxy Proxy) (Resources, []federation.Finding) {
	return b.BuildClass(view, index, b.Class(view, index, proxy))
}

// BuildClass makes everything the proxies of a class are told. While nothing of it has
// changed, the resources are the very same map; what has not changed in it are the very
// same lists, which equal classes share.
func (b *Builder) BuildClass(view *federation.View, index *config.Index, class Class) (Resources, []federation.Finding) {
	b.move(view, index)
	w := b.classes[class]
	if w != nil && len(w.behind) == 0 {
		w.missed = 0
		return w.resources, w.findings
	}
	job := newBuild(view, index, class)
	job.weigh, job.closed, job.logFormat = b.Weigh, b.Closed, b.LogFormat
	if w == nil {
		w = b.whole(job)
	} else {
		w = b.next(job, w, w.concerned(w.behind))
		if b.lagging--; b.lagging == 0 {
			b.outcomes = nil
		}
	}
	b.classes[class] = w
	return w.resources, w.findings
}

// part makes or remembers what one service needs. Routes of a VirtualService and aliases
// depend on other services too, so they are made for each class, and note which they asked
// for.
func (b *Builder) part(job *build, s *federation.Service) *built {
	if job.routed(s) {
		job.asked = nil
		made := job.guarded(s)
		made.routed, made.asked = true, job.asked
		return made
	}
	rule, _ := job.destinationRule(s)
	key := partKey{rule: rule, trustDomain: job.class.TrustDomain, families: job.class.families()}
	for _, v := range b.parts[s.Name] {
		if v.key == key {
			return v.part
		}
	}
	made := job.guarded(s)
	b.parts[s.Name] = append(b.parts[s.Name], variant{key, made})
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
	b.names(&made, s)
	return &made
}

// routed tells whether the service leads to others: by routes that users wrote, or as an
// alias.
func (b *build) routed(s *federation.Service) bool {
	if s.Type == federation.ExternalName {
		return true
	}
	vs, _ := b.index.VirtualService(b.class.Namespace, b.labels, s.Host)
	return vs != nil
}

// Forget makes the services with these names be made again.
func (b *Builder) Forget(names ...federation.ServiceName) { b.again(names, false) }
