// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"slices"

	"github.com/isthmus-mesh/isthmus/federation"
)

// whole is what was last made for a class, part by part. From it the next one is made by
// exchanging the parts that have changed; the bytes are those of a full computation.
type whole struct {
	view   *federation.View
	frame  *built
	parts  []*built // as the view's services are
	routed []federation.ServiceName

	resources Resources
	sums      map[string]uint64 // of the lists, see sumOf
	findings  []federation.Finding
	plain     bool // no two resources had one name

	behind []federation.ServiceName // services to look at again, since it was made
	missed int                      // changes since it was asked for
}

// hidden stands for a service that the class does not see, or that is not there.
var hidden = &built{}

// exchange is one part in place of another.
type exchange struct{ was, is *built }

// whole makes everything of the class.
func (b *Builder) whole(job *build) *whole {
	w := &whole{view: job.view, parts: make([]*built, len(job.view.Services))}
	frame := job.frame()
	w.frame = &frame
	for i, s := range job.view.Services {
		w.parts[i] = b.seen(job, s)
		if w.parts[i].routed {
			w.routed = append(w.routed, s.Name)
		}
	}
	w.gather()
	b.share(w)
	return w
}

// seen is the part of a service as far as the class sees it.
func (b *Builder) seen(job *build, s *federation.Service) *built {
	if !job.visible(s) {
		return hidden
	}
	return b.part(job, s)
}

// next makes everything of the class from what it was, looking only at some services.
func (b *Builder) next(job *build, old *whole, names []federation.ServiceName) *whole {
	w := &whole{view: job.view, frame: old.frame, parts: old.parts, routed: old.routed}
	sameFindings, aligned := true, true
	var changes []exchange
	parts, from := make([]*built, 0, len(job.view.Services)), 0
	for _, name := range names {
		at, had := old.view.Index(name)
		parts = append(parts, old.parts[from:at]...)
		from = at
		x := exchange{hidden, hidden}
		if had {
			x.was, from = old.parts[at], at+1
		}
		s, has := job.view.Service(name)
		if has {
			x.is = b.seen(job, s)
			parts = append(parts, x.is)
		}
		aligned = aligned && had == has
		if x.was == x.is {
			continue // mostly because the class sees neither
		}
		changes = append(changes, x)
		sameFindings = sameFindings && len(x.was.findings)+len(x.is.findings) == 0
		w.reroute(name, x)
	}
	if len(changes) > 0 || !aligned {
		w.parts = append(parts, old.parts[from:]...)
	}
	if !old.plain || !b.apply(w, old, changes) {
		w.gather()
		b.share(w)
		return w
	}
	w.plain, w.findings = true, old.findings
	if !sameFindings {
		w.findings = nil
		for _, p := range w.all() {
			w.findings = append(w.findings, p.findings...)
		}
	}
	return w
}

// reroute notes whether a service has routes that users wrote.
func (w *whole) reroute(name federation.ServiceName, x exchange) {
	if x.was.routed == x.is.routed {
		return
	}
	w.routed = slices.DeleteFunc(slices.Clone(w.routed), func(n federation.ServiceName) bool { return n == name })
	if x.is.routed {
		w.routed = append(w.routed, name)
	}
}

// concerned are the services that are to be looked at when some have changed: these, and
// those whose routes asked for one of them. The names come ordered, and go so.
func (w *whole) concerned(names []federation.ServiceName) []federation.ServiceName {
	names = slices.Clone(names)
	slices.SortFunc(names, federation.ServiceName.Compare)
	names = slices.Compact(names)
	own := names
	for _, name := range w.routed {
		i, ok := w.view.Index(name)
		if _, changed := slices.BinarySearchFunc(own, name, federation.ServiceName.Compare); changed || !ok {
			continue
		}
		if slices.ContainsFunc(w.parts[i].asked, func(n federation.ServiceName) bool {
			_, changed := slices.BinarySearchFunc(own, n, federation.ServiceName.Compare)
			return changed
		}) {
			names = append(names[:len(names):len(names)], name)
		}
	}
	slices.SortFunc(names, federation.ServiceName.Compare)
	return names
}

// all are the parts in their order.
func (w *whole) all() []*built {
	out := make([]*built, 0, len(w.parts)+1)
	out = append(out, w.frame)
	for _, p := range w.parts {
		if p != hidden {
			out = append(out, p)
		}
	}
	return out
}

// gather puts the parts together.
func (w *whole) gather() {
	parts := w.all()
	n := 0
	for _, p := range parts {
		n += len(p.pods)
		for _, list := range p.resources {
			n += len(list)
		}
	}
	w.resources, w.findings = gather(parts)
	for _, list := range w.resources {
		n -= len(list)
	}
	w.plain = n == 0
	w.sums = make(map[string]uint64, len(w.resources))
	for typeURL, list := range w.resources {
		for i := range list {
			w.sums[typeURL] += sumOf(&list[i])
		}
	}
}
