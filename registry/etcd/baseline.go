// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"bytes"
	"hash/maphash"
	"maps"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// baseline is what a session knows to be stored for its source. It begins as what the
// replica holds, and changes with every transaction that was committed.
type baseline struct {
	seed       maphash.Seed
	hashes     map[string]uint64 // of every value that is stored
	layouts    map[federation.ServiceName]packedLayout
	conditions []federation.Condition

	// What the last level had: the same pointer needs no second look.
	records  map[federation.ServiceName]*federation.Record
	gateways map[string]*federation.Gateway
	objects  map[string]*federation.Object // by key

	// How workloads are spread over bundles, and which of those are not as they should be.
	bundles    map[string][]*federation.Workload
	stale      map[string]bool
	nextBundle int

	// garbage are keys that mean nothing: corrupt values, and slices of a generation that
	// never became visible. They go with the next level that knows records.
	garbage []string
}

// layout is how a record's endpoints are spread over slices.
type layout struct {
	generation int64
	next       int // for names of slices
	slices     map[string][]federation.Endpoint
}

// packedLayout is a layout as it is kept: there are many, mostly of one slice.
type packedLayout struct {
	generation int64
	next       int
	slices     []packedSlice
}

type packedSlice struct {
	name      string
	endpoints []federation.Endpoint
}

func (l *layout) pack() packedLayout {
	p := packedLayout{l.generation, l.next, make([]packedSlice, 0, len(l.slices))}
	for name, endpoints := range l.slices {
		p.slices = append(p.slices, packedSlice{name, endpoints})
	}
	return p
}

func (p packedLayout) unpack() *layout {
	l := &layout{p.generation, p.next, make(map[string][]federation.Endpoint, len(p.slices))}
	for _, s := range p.slices {
		l.slices[s.name] = s.endpoints
	}
	return l
}

// baseline collects what is stored for one source.
func (r *replica) baseline(source federation.SourceID) *baseline {
	b := &baseline{
		seed:     r.seed,
		hashes:   map[string]uint64{},
		layouts:  map[federation.ServiceName]packedLayout{},
		records:  map[federation.ServiceName]*federation.Record{},
		bundles:  map[string][]*federation.Workload{},
		stale:    map[string]bool{},
		gateways: map[string]*federation.Gateway{},
		objects:  map[string]*federation.Object{},
	}
	escaped := key("", string(source))
	for k, hash := range r.hashes {
		if !ofSource(k, escaped) {
			continue
		}
		b.hashes[k] = hash
		if _, corrupt := r.quarantine[k]; corrupt {
			b.garbage = append(b.garbage, k)
		}
	}
	b.takeBundles(source, r)
	for name, state := range r.records[source] {
		b.takeLayout(source, name, state)
	}
	if id, ok := source.Cluster(); ok && r.members[id] != nil {
		b.conditions = slices.Clone(r.members[id].conditions)
	}
	return b
}

// ofSource tells whether a key is one that a session of the source writes.
func ofSource(k, escaped string) bool {
	for _, prefix := range []string{recordsPrefix, workloadsPrefix, configPrefix} {
		if rest, ok := strings.CutPrefix(k, prefix); ok {
			return strings.HasPrefix(rest, escaped+"/")
		}
	}
	if rest, ok := strings.CutPrefix(k, gatewaysPrefix); ok {
		_, rest, _ = strings.Cut(rest, "/")
		return strings.HasPrefix(rest, escaped+"/")
	}
	return false
}

func (b *baseline) takeLayout(source federation.SourceID, name federation.ServiceName, state *recordState) {
	l := &layout{slices: map[string][]federation.Endpoint{}}
	if state.head != nil {
		l.generation = state.head.Generation
	}
	for _, slice := range state.slices {
		l.reserve(slice.name)
		if state.head != nil && slice.generation == l.generation {
			l.slices[slice.name] = slice.endpoints
		} else {
			b.garbage = append(b.garbage, recordKey(source, name)+"/"+key("", slice.name))
		}
	}
	b.layouts[name] = l.pack()
}

// stored tells whether a key holds exactly these bytes.
func (b *baseline) stored(k string, value []byte) bool {
	hash, ok := b.hashes[k]
	return ok && hash == maphash.Bytes(b.seed, value)
}

// group is operations that become visible together.
type group struct {
	puts    []keyValue
	deletes []string
	done    func() // once they are committed
	changes []change
}

// put writes a value that is not stored yet; means is what a replica would decode it to.
func (g *group) put(b *baseline, k string, value []byte, means any) {
	if !b.stored(k, value) {
		g.puts = append(g.puts, keyValue{key: k, value: value, means: means})
	}
}

func (g *group) empty() bool { return len(g.puts)+len(g.deletes) == 0 }

// settled remembers that everything a level asked for was committed.
func (b *baseline) settled(level *registry.Level) {
	if level.Records != nil {
		b.garbage = nil
	}
}

// note remembers that the group was committed.
func (g *group) note(b *baseline) {
	for _, kv := range g.puts {
		b.hashes[kv.key] = maphash.Bytes(b.seed, kv.value)
	}
	for _, k := range g.deletes {
		delete(b.hashes, k)
	}
	if g.done != nil {
		g.done()
	}
}

// plan is the difference between a level and what is stored, in groups to be written in
// order.
func (b *baseline) plan(source federation.SourceID, level *registry.Level) ([]*group, error) {
	var groups []*group
	touched := map[string]bool{}
	add := func(g *group, err error) error {
		if err == nil && !g.empty() {
			groups = append(groups, g)
			for _, kv := range g.puts {
				touched[kv.key] = true
			}
			for _, k := range g.deletes {
				touched[k] = true
			}
		} else if err == nil && g.done != nil {
			g.done()
		}
		return err
	}
	// Workloads first, so that a proxy that is told of an endpoint finds its workload.
	if err := b.planWorkloads(source, level.Workloads, add); err != nil {
		return nil, err
	}
	if level.Records != nil {
		for _, name := range changed(level.Records, b.records, federation.ServiceName.Compare) {
			staged, err := b.planRecord(source, level.Records[name])
			if err != nil {
				return nil, err
			}
			for _, g := range staged {
				add(g, nil)
			}
		}
		b.planGone(source, level.Records, add)
		b.planGarbage(source, touched, add)
	}
	if err := b.planGateways(level.Gateways, add, source); err != nil {
		return nil, err
	}
	if err := b.planObjects(source, level.Objects, add); err != nil {
		return nil, err
	}
	return groups, nil
}

type adder func(*group, error) error

// changed are the keys whose value is not the one that was stored last, ordered. Looking
// at pointers only, it costs little where little has changed.
func changed[K comparable, V any](level, last map[K]*V, compare func(a, b K) int) []K {
	var out []K
	for k, v := range level {
		if last[k] != v {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, compare)
	return out
}

// prune removes the stored keys below a prefix that are not wanted.
func (b *baseline) prune(prefix string, want map[string]bool, add adder) {
	var gone []string
	for k := range b.hashes {
		if strings.HasPrefix(k, prefix) && !want[k] {
			gone = append(gone, k)
		}
	}
	slices.Sort(gone)
	for _, k := range gone {
		add(&group{deletes: []string{k}}, nil)
	}
}

func (b *baseline) planGateways(gateways map[string]*federation.Gateway, add adder, source federation.SourceID) error {
	if gateways == nil {
		return nil
	}
	want := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(gateways)) {
		gw := gateways[name]
		k := gatewayKey(gw)
		want[k] = true
		if b.gateways[name] == gw {
			continue
		}
		value, err := encode(&gatewayValue{version{schema}, *gw})
		if err != nil {
			return err
		}
		g := &group{done: func() { b.gateways[name] = gw }}
		g.put(b, k, value, nil)
		add(g, nil)
	}
	b.prune(gatewaysPrefix, want, add) // the baseline has gateways of this source only
	for name := range b.gateways {
		if gateways[name] == nil {
			delete(b.gateways, name)
		}
	}
	return nil
}

func (b *baseline) planObjects(source federation.SourceID, objects map[registry.ObjectKind]map[registry.ObjectName]*federation.Object, add adder) error {
	for _, kind := range slices.Sorted(maps.Keys(objects)) {
		if objects[kind] == nil {
			continue
		}
		want := make(map[string]bool, len(objects[kind]))
		for name, object := range objects[kind] {
			k := objectKey(source, kind, name)
			want[k] = true
			if b.objects[k] == object {
				continue
			}
			value, err := encode(&objectValue{version{schema}, *object, compact(object.Raw)})
			if err != nil {
				return err
			}
			g := &group{done: func() { b.objects[k] = object }}
			g.put(b, k, value, nil)
			add(g, nil)
		}
		prefix := key(configPrefix, string(source), string(kind)) + "/"
		b.prune(prefix, want, add)
		for k := range b.objects {
			if strings.HasPrefix(k, prefix) && !want[k] {
				delete(b.objects, k)
			}
		}
	}
	return nil
}

// compact is JSON without white space; what is not JSON becomes a JSON string, so that it
// is kept all the same.
func compact(raw []byte) []byte {
	var out bytes.Buffer
	if compactJSON(&out, raw) != nil {
		quoted, _ := encode(string(raw)) // a string always encodes
		return quoted
	}
	return out.Bytes()
}

// planGone withdraws the records that are no longer there, and garbage with them.
func (b *baseline) planGone(source federation.SourceID, records map[federation.ServiceName]*federation.Record, add adder) {
	var gone []federation.ServiceName
	for name := range b.layouts {
		if records[name] == nil {
			gone = append(gone, name)
		}
	}
	slices.SortFunc(gone, federation.ServiceName.Compare)
	for _, name := range gone {
		k := recordKey(source, name)
		g := &group{done: func() { delete(b.layouts, name); delete(b.records, name) }}
		for stored := range b.hashes {
			if stored == k || strings.HasPrefix(stored, k+"/") {
				g.deletes = append(g.deletes, stored)
			}
		}
		slices.Sort(g.deletes)
		for _, slice := range b.layouts[name].slices {
			g.changes = appendChanges(g.changes, name, slice.endpoints, nil)
		}
		add(g, nil)
	}
}

// planGarbage removes the keys of records that mean nothing and that nothing was written
// to.
func (b *baseline) planGarbage(source federation.SourceID, touched map[string]bool, add adder) {
	prefix := key(recordsPrefix, string(source)) + "/"
	for _, k := range b.garbage {
		if _, there := b.hashes[k]; there && strings.HasPrefix(k, prefix) && !touched[k] && !b.wanted(k) {
			add(&group{deletes: []string{k}}, nil)
		}
	}
}

// wanted tells whether a key of a record that was garbage is in use again.
func (b *baseline) wanted(k string) bool {
	p, err := parts(k, recordsPrefix, 3, 4)
	if err != nil {
		return false
	}
	l, known := b.layouts[federation.ServiceName{Namespace: p[1], Name: p[2]}]
	return known && (len(p) == 3 || slices.ContainsFunc(l.slices, func(s packedSlice) bool { return s.name == p[3] }))
}
