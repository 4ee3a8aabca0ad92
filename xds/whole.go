// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"maps"
	"net/netip"
	"slices"
	"sort"

	"github.com/isthmus-mesh/isthmus/federation"
)

// whole is what was last made for a class, part by part. From it the next one is made by
// exchanging the parts that have changed; the bytes are those of a full computation.
type whole struct {
	view  *federation.View
	frame *built
	parts []*built     // as the view's services are
	again map[int]bool // those of parts to be made again in any case
	table *built

	resources Resources
	findings  []federation.Finding
	plain     bool // no two resources had one name
}

// hidden stands for a service that the class does not see.
var hidden = &built{}

// forget makes services be made again.
func (w *whole) forget(names map[federation.ServiceName]bool) {
	for i, s := range w.view.Services {
		if names[s.Name] {
			if w.again == nil {
				w.again = map[int]bool{}
			}
			w.again[i] = true
		}
	}
}

// whole makes everything of the class, sharing what has not changed since an earlier one,
// which may be nil. The earlier one is of the same index and roads.
func (b *build) whole(old *whole, part func(*build, *federation.Service) *built) *whole {
	w := &whole{view: b.view, parts: make([]*built, len(b.view.Services))}
	aligned := old != nil && len(old.parts) == len(w.parts)
	sameNames := aligned
	var seen []*federation.Service
	for i, s := range b.view.Services {
		if aligned && old.view.Services[i] == s && !old.again[i] && !old.parts[i].routed {
			w.parts[i] = old.parts[i]
		} else if b.visible(s) {
			w.parts[i] = part(b, s)
		} else {
			w.parts[i] = hidden
		}
		if w.parts[i] != hidden {
			seen = append(seen, s)
		}
		sameNames = sameNames && (old.parts[i] == hidden) == (w.parts[i] == hidden) && namedAlike(old.view.Services[i], s)
	}
	if old != nil {
		w.frame = old.frame
	} else {
		frame := b.frame()
		w.frame = &frame
	}
	if sameNames {
		w.table = old.table
	} else {
		table := b.nameTable(seen)
		w.table = &table
	}
	if !aligned || !w.exchange(old) {
		w.gather()
	}
	return w
}

// all are the parts in their order.
func (w *whole) all() []*built {
	out := make([]*built, 0, len(w.parts)+2)
	out = append(out, w.frame)
	for _, p := range w.parts {
		if p != hidden {
			out = append(out, p)
		}
	}
	return append(out, w.table)
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
}

// exchange puts the parts that have changed into what was made before. It is false where
// more than the content of resources has changed.
func (w *whole) exchange(old *whole) bool {
	if !old.plain {
		return false
	}
	w.resources, w.plain = maps.Clone(old.resources), true
	copied := map[string]bool{}
	if w.table != old.table && !w.swap(old.table, w.table, copied) {
		return false
	}
	for i, p := range w.parts {
		switch was := old.parts[i]; {
		case was == p:
		case was == hidden, p == hidden:
			return false
		case !w.swap(was, p, copied):
			return false
		}
	}
	for _, p := range w.all() {
		w.findings = append(w.findings, p.findings...)
	}
	return true
}

// swap replaces the resources of one part by those of another with the same names.
func (w *whole) swap(old, fresh *built, copied map[string]bool) bool {
	if len(old.resources) != len(fresh.resources) || !w.swapList(ListenerType, old.pods, fresh.pods, copied) {
		return false
	}
	for typeURL, list := range fresh.resources {
		if !w.swapList(typeURL, old.resources[typeURL], list, copied) {
			return false
		}
	}
	return true
}

func (w *whole) swapList(typeURL string, old, fresh []Resource, copied map[string]bool) bool {
	if len(old) != len(fresh) {
		return false
	}
	for i, r := range fresh {
		if old[i].Name != r.Name {
			return false
		}
		if old[i].Version == r.Version {
			continue
		}
		list := w.resources[typeURL]
		at := sort.Search(len(list), func(i int) bool { return list[i].Name >= r.Name })
		if at == len(list) || list[at].Name != r.Name {
			return false
		}
		if !copied[typeURL] {
			list = slices.Clone(list)
			w.resources[typeURL], copied[typeURL] = list, true
		}
		list[at] = r
	}
	return true
}

// namedAlike tells whether two states of a service have the same names with the same
// addresses.
func namedAlike(a, b *federation.Service) bool {
	if a == b {
		return true
	}
	return a.Name == b.Name && a.Type == b.Type && a.Own == b.Own && !b.HeadlessHere() && a.ExternalName == b.ExternalName &&
		slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Aliases, b.Aliases) &&
		slices.EqualFunc(a.Pods, b.Pods, func(x, y federation.NamedPod) bool {
			return x.Host == y.Host && slices.Equal[[]netip.Addr](x.Address, y.Address)
		})
}

// samePorts tells whether the workloads of two views have the same inbound ports.
func samePorts(old, view *federation.View) bool {
	if len(old.Services) != len(view.Services) {
		return false
	}
	for i, s := range view.Services {
		was := old.Services[i]
		if was == s {
			continue
		}
		if was.Name != s.Name || !slices.Equal(was.Ports, s.Ports) || !slices.EqualFunc(was.Endpoints, s.Endpoints, sameTargets) {
			return false
		}
	}
	return true
}

func sameTargets(a, b federation.ServiceEndpoint) bool {
	return a.UID == b.UID && a.Source == b.Source && a.Direct == b.Direct && maps.Equal(a.TargetPorts, b.TargetPorts)
}
