// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
)

// The limits of slices and transactions. One endpoint's change writes one slice, so that a
// slice's size is what it costs; etcd refuses transactions of more than 128 operations.
const (
	sliceEndpoints = 64
	sliceBytes     = 6 << 10
	txnOperations  = 98 // of a session, leaving room for the log of changes
	txnBytes       = 512 << 10
)

func compactJSON(out *bytes.Buffer, raw []byte) error { return json.Compact(out, raw) }

// reserve keeps the names of slices from being given twice.
func (l *layout) reserve(name string) {
	_, n, _ := strings.Cut(name, "-")
	if i, err := strconv.Atoi(n); err == nil && i >= l.next {
		l.next = i + 1
	}
}

func (l *layout) name(generation int64) string {
	l.next++
	return fmt.Sprintf("%d-%d", generation, l.next-1)
}

// planRecord is what makes the stored record the wanted one: one group, or, where it does
// not fit into a transaction, slices of the next generation, then the head, then what is
// left over.
func (b *baseline) planRecord(source federation.SourceID, record *federation.Record) ([]*group, error) {
	stored := &layout{generation: 1}
	if packed, ok := b.layouts[record.Name]; ok {
		stored = packed.unpack()
	}
	next := &layout{generation: stored.generation, next: stored.next, slices: map[string][]federation.Endpoint{}}
	g := &group{}
	k := recordKey(source, record.Name)
	if err := b.spread(g, k, stored, next, record); err != nil {
		return nil, err
	}
	if err := b.putHead(g, k, record, next.generation); err != nil {
		return nil, err
	}
	g.changes = appendChanges(g.changes, record.Name, flatten(stored.slices), record.Endpoints)
	done := func() {
		b.layouts[record.Name] = next.pack()
		b.records[record.Name] = record
	}
	if len(g.puts)+len(g.deletes) <= txnOperations {
		g.done = done
		return []*group{g}, nil
	}
	return b.stage(k, record, stored, g.changes)
}

func (b *baseline) putHead(g *group, k string, record *federation.Record, generation int64) error {
	head := headValue{version: version{schema}, Generation: generation, Record: *record}
	head.Endpoints = nil
	value, err := encode(&head)
	if err != nil {
		return err
	}
	g.put(b, k, value, &headState{generation, record})
	return nil
}

func flatten(byName map[string][]federation.Endpoint) []federation.Endpoint {
	var out []federation.Endpoint
	for _, endpoints := range byName {
		out = append(out, endpoints...)
	}
	return out
}

// spread assigns endpoints to slices: those that are stored stay where they are, new ones
// go where something changes anyway, then where there is room.
func (b *baseline) spread(g *group, k string, stored, next *layout, record *federation.Record) error {
	home := map[string]string{}
	for name, list := range stored.slices {
		for i := range list {
			home[list[i].Key()] = name
		}
	}
	var fresh []federation.Endpoint
	for _, e := range record.Endpoints {
		if name, ok := home[e.Key()]; ok {
			next.slices[name] = append(next.slices[name], e)
			delete(home, e.Key()) // a second one of the same key goes elsewhere
		} else {
			fresh = append(fresh, e)
		}
	}
	dirty := map[string]bool{}
	for name, list := range stored.slices {
		if dirty[name] = !equalEndpoints(list, next.slices[name]); !dirty[name] {
			next.slices[name] = slices.Clip(list) // shared with the replica: who adds to it makes another
		}
	}
	if len(fresh) > 0 {
		names := slices.SortedFunc(maps.Keys(stored.slices), func(a, c string) int {
			if dirty[a] != dirty[c] {
				return map[bool]int{true: -1, false: 1}[dirty[a]]
			}
			return strings.Compare(a, c)
		})
		for _, name := range names {
			room := min(max(0, sliceEndpoints-len(next.slices[name])), len(fresh))
			if room > 0 && (dirty[name] || len(fresh) <= room) {
				next.slices[name] = append(next.slices[name], fresh[:room]...)
				fresh, dirty[name] = fresh[room:], true
			}
		}
		for chunk := range slices.Chunk(fresh, sliceEndpoints) {
			name := next.name(next.generation)
			next.slices[name], dirty[name] = slices.Clone(chunk), true
		}
	}
	next.share(record.Endpoints)
	for _, name := range slices.Sorted(maps.Keys(dirty)) {
		if !dirty[name] {
			continue
		}
		if err := b.putSlice(g, k, next, name, record); err != nil {
			return err
		}
	}
	return nil
}

// share takes a record's own endpoints where they are all in one slice, as mostly.
func (l *layout) share(endpoints []federation.Endpoint) {
	for name, list := range l.slices {
		if len(list) == len(endpoints) && slices.IsSortedFunc(endpoints, byKey) {
			l.slices[name] = slices.Clip(endpoints)
		}
	}
}

func byKey(a, b federation.Endpoint) int { return strings.Compare(a.Key(), b.Key()) }

// putSlice writes one slice, and moves what is too much for it to others. record is what
// the slice makes whole; nil if that is not seen before a head comes.
func (b *baseline) putSlice(g *group, k string, l *layout, name string, record *federation.Record) error {
	list := l.slices[name]
	if len(list) == 0 {
		delete(l.slices, name)
		if _, ok := b.hashes[k+"/"+name]; ok {
			g.deletes = append(g.deletes, k+"/"+name)
		}
		return nil
	}
	if !slices.IsSortedFunc(list, byKey) {
		slices.SortFunc(list, byKey)
	}
	value, err := encodeSlice(l.generation, list)
	if err != nil {
		return err
	}
	if len(value) <= sliceBytes || len(list) == 1 {
		g.put(b, k+"/"+name, value, &sliceState{name, l.generation, list, record})
		return nil
	}
	half := len(list) / 2
	l.slices[name] = slices.Clone(list[:half])
	other := l.name(l.generation)
	l.slices[other] = slices.Clone(list[half:])
	if err := b.putSlice(g, k, l, name, record); err != nil {
		return err
	}
	return b.putSlice(g, k, l, other, record)
}

// stage writes a record that is too much for one transaction: every slice anew under the
// next generation, which nobody sees; the head, which makes them visible; and then the
// removal of those before.
func (b *baseline) stage(k string, record *federation.Record, stored *layout, changes []change) ([]*group, error) {
	next := &layout{generation: stored.generation + 1, next: stored.next, slices: map[string][]federation.Endpoint{}}
	slicesGroup := &group{}
	for chunk := range slices.Chunk(record.Endpoints, sliceEndpoints) {
		name := next.name(next.generation)
		next.slices[name] = slices.Clone(chunk)
		if err := b.putSlice(slicesGroup, k, next, name, nil); err != nil {
			return nil, err
		}
	}
	var groups []*group
	for _, kv := range slicesGroup.puts {
		groups = append(groups, &group{puts: []keyValue{kv}})
	}
	head := &group{changes: changes, done: func() {
		b.layouts[record.Name] = next.pack()
		b.records[record.Name] = record
	}}
	if err := b.putHead(head, k, record, next.generation); err != nil {
		return nil, err
	}
	groups = append(groups, head)
	for name := range stored.slices {
		groups = append(groups, &group{deletes: []string{k + "/" + name}})
	}
	return groups, nil
}
