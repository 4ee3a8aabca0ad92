// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"hash/maphash"
	"maps"
	"slices"
	"sort"
)

// Lists of resources are shared by all classes that have the same: whoever compares two
// lists by identity, or works something out for a pair of them, does so once for many
// classes. Classes come to share a list when they are made, and go on doing so as long as
// the same parts change in it.

// listKey names a list by identity.
type listKey struct {
	typeURL string
	first   *Resource
	n       int
}

func keyOf(typeURL string, list []Resource) listKey {
	k := listKey{typeURL: typeURL, n: len(list)}
	if len(list) > 0 {
		k.first = &list[0]
	}
	return k
}

// outcome is what a list became.
type outcome struct {
	changes []exchange
	list    []Resource
	sum     uint64
	plain   bool // false where two resources would have one name
}

// outcomes are those of one change of view, to be had by the next class that has the same
// list.
type outcomes map[listKey][]outcome

// seed of the sums of lists, which never leave the process.
var seed = maphash.MakeSeed()

// sumOf adds up to something that tells lists apart quickly; who finds two alike compares.
func sumOf(r *Resource) uint64 {
	return maphash.String(seed, r.Name)*31 + maphash.String(seed, r.Version)
}

// share makes the lists of a new class those of other classes where they are equal.
func (b *Builder) share(w *whole) {
	open := maps.Clone(w.resources)
	for _, other := range b.classes {
		for typeURL, list := range open {
			known := other.resources[typeURL]
			if other.sums[typeURL] == w.sums[typeURL] && len(known) == len(list) && sameResources(known, list) {
				w.resources[typeURL] = known
				delete(open, typeURL)
			}
		}
	}
}

func sameResources(a, b []Resource) bool {
	return slices.EqualFunc(a, b, func(x, y Resource) bool { return x.Name == y.Name && x.Version == y.Version })
}

// apply makes the lists after some changes; false where two resources have one name. If no
// list differs, the resources are the very same map.
func (b *Builder) apply(w, old *whole, changes []exchange) bool {
	w.resources, w.sums = old.resources, old.sums
	own := false
	for _, typeURL := range [...]string{ClusterType, EndpointType, ListenerType, RouteType, NameTableType} {
		before := old.resources[typeURL]
		after := b.after(typeURL, before, old.sums[typeURL], changes)
		if !after.plain {
			return false
		}
		if keyOf(typeURL, before) == keyOf(typeURL, after.list) {
			continue
		}
		if !own {
			w.resources, w.sums, own = maps.Clone(old.resources), maps.Clone(old.sums), true
		}
		w.resources[typeURL], w.sums[typeURL] = after.list, after.sum
		if len(after.list) == 0 {
			delete(w.resources, typeURL)
			delete(w.sums, typeURL)
		}
	}
	return true
}

// after is a list after some changes, worked out once for all that have it.
func (b *Builder) after(typeURL string, list []Resource, sum uint64, changes []exchange) outcome {
	key := keyOf(typeURL, list)
	for _, known := range b.outcomes[key] {
		if slices.Equal(known.changes, changes) {
			return known
		}
	}
	e := editor{list: list, sum: sum}
	out := outcome{changes: changes, plain: true}
	for _, x := range changes {
		e.replace(x.was.of(typeURL), x.is.of(typeURL))
	}
	for _, x := range changes {
		out.plain = out.plain && e.add(x.was.of(typeURL), x.is.of(typeURL))
	}
	out.list, out.sum = e.list, e.sum
	if key.first != nil {
		if b.outcomes == nil {
			b.outcomes = outcomes{}
		}
		b.outcomes[key] = append(b.outcomes[key], out)
	}
	return out
}

// of are the resources of one type, those of pods last.
func (b *built) of(typeURL string) []Resource {
	list := b.resources[typeURL]
	if typeURL == ListenerType && len(b.pods) > 0 {
		return slices.Concat(list, b.pods)
	}
	return list
}

// editor changes a copy of a list, which it makes when it has to.
type editor struct {
	list   []Resource
	sum    uint64
	copied bool
}

// replace puts the resources of a part's successor in the place of those of the same name,
// and takes out those that it does not have.
func (e *editor) replace(was, is []Resource) {
	next := places(is)
	for i := range was {
		r := &was[i]
		n := next(r.Name)
		if n >= 0 && is[n].Version == r.Version {
			continue
		}
		at, ok := e.find(r.Name)
		switch {
		case !ok:
		case n < 0:
			e.copy()
			e.sum -= sumOf(r)
			e.list = slices.Delete(e.list, at, at+1)
		default:
			e.copy()
			e.sum += sumOf(&is[n]) - sumOf(r)
			e.list[at] = is[n]
		}
	}
}

// add puts in what a part's predecessor did not have; false if somebody else has a resource
// of that name, or the part itself has two.
func (e *editor) add(was, is []Resource) bool {
	before, own := places(was), places(is)
	for i := range is {
		if own(is[i].Name) != i {
			return false
		}
		if before(is[i].Name) >= 0 {
			continue
		}
		at, taken := e.find(is[i].Name)
		if taken {
			return false
		}
		e.copy()
		e.sum += sumOf(&is[i])
		e.list = slices.Insert(e.list, at, is[i])
	}
	return true
}

// places finds the first resource of a name; -1 if there is none.
func places(list []Resource) func(name string) int {
	const few = 16
	if len(list) <= few {
		return func(name string) int {
			return slices.IndexFunc(list, func(r Resource) bool { return r.Name == name })
		}
	}
	first := make(map[string]int, len(list))
	for i := len(list) - 1; i >= 0; i-- {
		first[list[i].Name] = i
	}
	return func(name string) int {
		if i, ok := first[name]; ok {
			return i
		}
		return -1
	}
}

func (e *editor) find(name string) (int, bool) {
	at := sort.Search(len(e.list), func(i int) bool { return e.list[i].Name >= name })
	return at, at < len(e.list) && e.list[at].Name == name
}

func (e *editor) copy() {
	if !e.copied {
		e.list, e.copied = slices.Clone(e.list), true
	}
}
