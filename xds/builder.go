// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"maps"
	"slices"

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
	parts    map[federation.ServiceName]*variants
	classes  map[Class]*whole
	lagging  int // classes with something to look at again
	outcomes outcomes
	census   census
}

// variants are what was made of a service, and of what it was before it changed.
type variants struct {
	service *federation.Service
	made    []variant
	before  *federation.Service
	earlier []variant
}

// variant is what was made for all classes with one key.
type variant struct {
	key  partKey
	part *built
}

func (k partKey) among(list []variant) *built {
	for _, v := range list {
		if v.key == k {
			return v.part
		}
	}
	return nil
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
		b.parts, b.classes, b.lagging = map[federation.ServiceName]*variants{}, map[Class]*whole{}, 0
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
		if v := b.parts[name]; v != nil && len(v.made) > 0 {
			b.parts[name] = &variants{before: v.service, earlier: v.made}
		} else {
			delete(b.parts, name)
		}
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
	v := b.parts[s.Name]
	if v == nil {
		v = &variants{}
		b.parts[s.Name] = v
	}
	v.service = s
	if part := key.among(v.made); part != nil {
		return part
	}
	made := job.again(v.before, key.among(v.earlier), s)
	if made == nil {
		made = job.guarded(s)
	}
	v.made = append(v.made, variant{key, made})
	return made
}

// guarded is service, for input that nobody thought of: one service that makes the
// translation fail must not take down the others.
func (b *build) guarded(s *federation.Service) (out *built) {
	defer rescue(s, &out)
	made := b.service(s)
	b.names(&made, s)
	return &made
}

func rescue(s *federation.Service, out **built) {
	if r := recover(); r != nil {
		*out = &built{}
		(*out).note("Service "+s.Name.String(), federation.SeverityError, "cannot be translated and is left out: %v; please report this", r)
	}
}

// again is guarded for a service of which only endpoints have changed since something was
// made of it: their assignments alone are made. It is nil where more is to be done.
func (b *build) again(before *federation.Service, earlier *built, s *federation.Service) (out *built) {
	if earlier == nil || len(earlier.findings) > 0 || !sameTrunk(before, s) {
		return nil
	}
	defer rescue(s, &out)
	sb := &serviceBuild{build: b, svc: s, object: "Service " + s.Name.String()}
	sb.rule, _ = b.destinationRule(s)
	for _, port := range s.Ports {
		for _, t := range sb.targets(port) {
			if slices.ContainsFunc(earlier.resources[EndpointType], func(r Resource) bool { return r.Name == t.name }) {
				sb.assign(t, sb.groups(t, port))
			}
		}
	}
	fresh := sb.resources[EndpointType]
	if len(sb.findings) > 0 || len(fresh) != len(earlier.resources[EndpointType]) {
		return nil
	}
	for i, was := range earlier.resources[EndpointType] {
		if fresh[i].Name == was.Name && fresh[i].Version == was.Version {
			fresh[i] = was
		}
	}
	sb.resources = maps.Clone(earlier.resources)
	if len(fresh) > 0 {
		sb.resources[EndpointType] = fresh
	}
	return &sb.built
}

// sameTrunk tells whether nothing but the assignments of a service can differ between two
// of its states. Each pod of a headless one has listeners, or resources of its own.
func sameTrunk(a, b *federation.Service) bool {
	return a.Name == b.Name && a.Host == b.Host && a.Type == b.Type && a.Own == b.Own && !b.HeadlessHere() &&
		len(a.Pods)+len(b.Pods) == 0 && slices.Equal(a.Ports, b.Ports) && slices.Equal(a.Accounts, b.Accounts) &&
		slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.AlsoAt, b.AlsoAt) && slices.Equal(a.Aliases, b.Aliases)
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
