// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"weak"

	"github.com/isthmus-mesh/isthmus/xds"
)

// holding is what a proxy has of one type. While it has all that it should, that is a list
// which it shares with its whole class; what differs from that is kept beside it. Whoever
// uses it minds what the proxy wants: the list may hold more.
type holding struct {
	base []xds.Resource          // ordered by name
	over map[string]xds.Resource // instead of base; one without a name is not there
}

// get finds what the proxy has under a name.
func (h *holding) get(name string) (xds.Resource, bool) {
	if r, ok := h.over[name]; ok {
		return r, r.Name != ""
	}
	return find(h.base, name)
}

func find(list []xds.Resource, name string) (xds.Resource, bool) {
	i := sort.Search(len(list), func(i int) bool { return list[i].Name >= name })
	if i < len(list) && list[i].Name == name {
		return list[i], true
	}
	return xds.Resource{}, false
}

// claim takes a returning proxy's word for what it has, in relation to what there is: most
// of the time it is the same.
func (h *holding) claim(versions map[string]string, list []xds.Resource) {
	if len(versions) == 0 {
		return
	}
	h.base = list
	known := 0
	for i := range list {
		version, ok := versions[list[i].Name]
		switch {
		case !ok:
			h.remove(list[i].Name)
			continue
		case version != list[i].Version:
			h.set(xds.Resource{Name: list[i].Name, Version: version})
		}
		known++
	}
	if known == len(versions) {
		return
	}
	for name, version := range versions {
		if _, ok := find(list, name); !ok {
			h.set(xds.Resource{Name: strings.Clone(name), Version: strings.Clone(version)})
		}
	}
}

func (h *holding) set(r xds.Resource) {
	if h.over == nil {
		h.over = map[string]xds.Resource{}
	}
	h.over[r.Name] = r
}

func (h *holding) remove(name string) {
	if _, ok := find(h.base, name); !ok {
		delete(h.over, name)
		return
	}
	if h.over == nil {
		h.over = map[string]xds.Resource{}
	}
	h.over[name] = xds.Resource{}
}

// keep forgets everything but some names.
func (h *holding) keep(some func(string) bool) {
	var other []string
	for _, r := range h.among(func(string) bool { return true }) {
		if !some(r.Name) {
			other = append(other, r.Name)
		}
	}
	for _, name := range other {
		h.remove(name)
	}
}

// rebase makes a list what the proxy has.
func (h *holding) rebase(list []xds.Resource) { h.base, h.over = list, nil }

// among lists what the proxy has of what it wants, ordered by name.
func (h *holding) among(wanted func(string) bool) []xds.Resource {
	out := make([]xds.Resource, 0, len(h.base))
	for _, r := range h.base {
		if _, ok := h.over[r.Name]; !ok && wanted(r.Name) {
			out = append(out, r)
		}
	}
	for name, r := range h.over {
		if r.Name != "" && wanted(name) {
			out = append(out, r)
		}
	}
	if len(h.over) > 0 {
		slices.SortFunc(out, func(a, b xds.Resource) int { return strings.Compare(a.Name, b.Name) })
	}
	return out
}

// names is a set of names. Sets that are equal share most of what they hold.
type names struct {
	common []string        // ordered, shared
	except map[string]bool // true: also in the set; false: not in it, though common
}

func (n *names) has(name string) bool {
	if in, ok := n.except[name]; ok {
		return in
	}
	_, ok := slices.BinarySearch(n.common, name)
	return ok
}

// are tells whether the set is known to be that very list, and no other.
func (n *names) are(list []string) bool {
	return len(n.except) == 0 && len(list) > 0 && len(list) == len(n.common) && &list[0] == &n.common[0]
}

func (n *names) put(name string, in bool) {
	if _, common := slices.BinarySearch(n.common, name); common == in {
		delete(n.except, name)
		return
	}
	if n.except == nil {
		n.except = map[string]bool{}
	}
	n.except[name] = in
}

func (n *names) empty() bool {
	for name := range n.each {
		_ = name
		return false
	}
	return true
}

// each goes over the set, in no order.
func (n *names) each(yield func(string) bool) {
	for _, name := range n.common {
		if _, ok := n.except[name]; !ok && !yield(name) {
			return
		}
	}
	for name, in := range n.except {
		if in && !yield(name) {
			return
		}
	}
}

// differences are what many streams need to know of few lists: which resources differ
// between what they have and what they should have. It is worked out once for all.
type differences struct {
	mu     sync.Mutex
	known  map[differenceKey]*difference
	oldest []differenceKey
	sets   map[string][]string
	made   uint64
}

// keptDifferences bounds the memory: a stream whose difference was forgotten has it worked
// out again. keptSets is the same for sets of names.
const keptDifferences, keptSets = 512, 512

// differenceKey names two lists by identity, and keeps neither alive: a new list is never
// taken for one that is gone.
type differenceKey struct {
	from, to   weak.Pointer[xds.Resource]
	nFrom, nTo int
}

// difference between two lists. It is immutable.
type difference struct {
	changed []xds.Resource // of the second: not in the first, or in another version
	gone    []string       // in the first only
	names   []string       // of what changed
	nonce   string         // of responses that are just what changed; unlike those of a stream

	once   sync.Once
	answer *response // that is just what changed; nil if it is too large for one message

	encode  sync.Once
	message *message // the same, encoded
}

// response is the one that all send who lack just what changed.
func (d *difference) response(typeURL string) *response {
	d.once.Do(func() {
		r := &response{typeURL: typeURL, nonce: d.nonce, resources: d.changed, whole: d}
		for i := range d.changed {
			r.size += len(d.changed[i].Body)
		}
		if r.size <= responseBytes || len(d.changed) == 1 {
			d.answer = r
		}
	})
	return d.answer
}

func keyOf(from, to []xds.Resource) differenceKey {
	k := differenceKey{nFrom: len(from), nTo: len(to)}
	if len(from) > 0 {
		k.from = weak.Make(&from[0])
	}
	if len(to) > 0 {
		k.to = weak.Make(&to[0])
	}
	return k
}

var noDifference = &difference{}

// between two lists that are ordered by name.
func (d *differences) between(from, to []xds.Resource) *difference {
	if sameList(from, to) {
		return noDifference
	}
	key := keyOf(from, to)
	d.mu.Lock()
	defer d.mu.Unlock()
	if known := d.known[key]; known != nil {
		return known
	}
	d.made++
	made := differ(from, to)
	made.nonce = "." + strconv.FormatUint(d.made, 36)
	if d.known == nil {
		d.known = map[differenceKey]*difference{}
	}
	if len(d.oldest) >= keptDifferences {
		delete(d.known, d.oldest[0])
		d.oldest = slices.Delete(d.oldest, 0, 1)
	}
	d.known[key], d.oldest = made, append(d.oldest, key)
	return made
}

func differ(from, to []xds.Resource) *difference {
	d := &difference{}
	d.merge(from, to)
	d.names = make([]string, len(d.changed))
	for i, r := range d.changed {
		d.names[i] = r.Name
	}
	return d
}

// merge goes through both lists at once.
func (d *difference) merge(from, to []xds.Resource) {
	if len(from) == 0 {
		d.changed = to
		return
	}
	i := 0
	for _, r := range to {
		for ; i < len(from) && from[i].Name < r.Name; i++ {
			d.gone = append(d.gone, from[i].Name)
		}
		if i < len(from) && from[i].Name == r.Name {
			if from[i].Version != r.Version {
				d.changed = append(d.changed, r)
			}
			i++
			continue
		}
		d.changed = append(d.changed, r)
	}
	for ; i < len(from); i++ {
		d.gone = append(d.gone, from[i].Name)
	}
}

// fewNames is up to how many names a stream keeps for itself.
const fewNames = 16

// share makes a set of names one that all streams with equal sets share.
func (d *differences) share(n *names) {
	if len(n.except) <= fewNames {
		return
	}
	list := slices.Sorted(n.each)
	key := setKey(list)
	d.mu.Lock()
	defer d.mu.Unlock()
	shared, ok := d.sets[key]
	if !ok {
		if d.sets == nil || len(d.sets) >= keptSets {
			d.sets = map[string][]string{} // streams keep what they use
		}
		shared = make([]string, len(list))
		for i, name := range list {
			shared[i] = strings.Clone(name) // it may stand in a request
		}
		d.sets[key] = shared
	}
	n.common, n.except = shared, nil
}
