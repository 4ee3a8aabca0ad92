// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"maps"
	"reflect"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// exposure is what a source says and the store does not know: in snapshots it takes the
// place of what is stored of the source.
type exposure struct {
	given *registry.Level // as the source says it
	shown registry.Level  // the same, with the pointers that were shown before where they mean the same
	until int64           // the revision that has it; 0 while none has
}

// Expose implements registry.Store.
func (s *Store) Expose(source federation.SourceID, level *registry.Level) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replica.expose(source, level)
	s.publishLocked()
}

// Conceal implements registry.Store.
func (s *Store) Conceal(source federation.SourceID, after federation.Revision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.replica.exposed[source]
	if e == nil {
		return
	}
	if e.until = int64(after); s.replica.revision >= e.until {
		s.replica.conceal(source)
		s.publishLocked()
	}
}

// Settled implements registry.Store.
func (s *Store) Settled(source federation.SourceID) federation.Revision {
	s.mu.Lock()
	defer s.mu.Unlock()
	return federation.Revision(s.replica.settled[source])
}

// SyncedElsewhere implements registry.Store.
func (s *Store) SyncedElsewhere(source federation.SourceID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	session, held := s.replica.sessions[source]
	return held && session.holder != s.holder && s.replica.settled[source] == session.created
}

// recordOf is the record that snapshots show of a source; nil if none.
func (r *replica) recordOf(source federation.SourceID, name federation.ServiceName) *federation.Record {
	if e := r.exposed[source]; e != nil && e.shown.Records != nil {
		return e.shown.Records[name]
	}
	if state := r.records[source][name]; state != nil {
		return state.assemble()
	}
	return nil
}

// expose takes the place of an earlier exposure. What is unknown goes on being shown as it
// is stored.
func (r *replica) expose(source federation.SourceID, level *registry.Level) {
	before := r.exposed[source]
	if before == nil {
		before = &exposure{given: &registry.Level{}}
	}
	next := &exposure{given: level, shown: *level}
	if level.Records != nil {
		next.shown.Records = r.exposeRecords(source, before, level.Records)
	} else if before.shown.Records != nil {
		r.concealRecords(source, before)
	}
	next.shown.Workloads = keepSame(level.Workloads, before.shown.Workloads, func(a, b *federation.Workload) bool { return reflect.DeepEqual(a, b) })
	next.shown.Gateways = keepSame(level.Gateways, before.shown.Gateways, func(a, b *federation.Gateway) bool { return reflect.DeepEqual(a, b) })
	r.dirtyShown = r.dirtyShown || !sameMap(next.shown.Workloads, before.shown.Workloads)
	r.dirtyGateways = r.dirtyGateways || !sameMap(next.shown.Gateways, before.shown.Gateways)
	next.shown.Objects = make(map[registry.ObjectKind]map[registry.ObjectName]*federation.Object, len(level.Objects))
	for kind, objects := range level.Objects {
		if objects == nil {
			continue
		}
		kept := keepSame(objects, before.shown.Objects[kind], equalObject)
		next.shown.Objects[kind] = kept
		r.dirtyObjects = r.dirtyObjects || !sameMap(kept, before.shown.Objects[kind])
	}
	r.dirtyObjects = r.dirtyObjects || len(next.shown.Objects) != len(before.shown.Objects)
	r.exposed[source] = next
}

// exposeRecords marks the services that are shown differently from now on.
func (r *replica) exposeRecords(source federation.SourceID, before *exposure, given map[federation.ServiceName]*federation.Record) map[federation.ServiceName]*federation.Record {
	shown := make(map[federation.ServiceName]*federation.Record, len(given))
	for name, record := range given {
		was := r.recordOf(source, name)
		if was == nil || before.given.Records[name] != record && !equalRecord(was, record) {
			r.dirtyServices[name] = true
			was = record
		}
		shown[name] = was
	}
	for name := range before.shown.Records {
		if shown[name] == nil {
			r.dirtyServices[name] = true
		}
	}
	for name := range r.records[source] {
		if shown[name] == nil && before.shown.Records == nil {
			r.dirtyServices[name] = true
		}
	}
	return shown
}

// conceal shows again what is stored.
func (r *replica) conceal(source federation.SourceID) {
	e := r.exposed[source]
	if e == nil {
		return
	}
	delete(r.exposed, source)
	if e.shown.Records != nil {
		r.concealRecords(source, e)
	}
	r.dirtyShown = r.dirtyShown || e.shown.Workloads != nil
	r.dirtyGateways = r.dirtyGateways || e.shown.Gateways != nil
	r.dirtyObjects = r.dirtyObjects || len(e.shown.Objects) > 0
}

// concealRecords marks the services that are stored otherwise than they were shown. Those
// that are the same keep the pointer that was shown.
func (r *replica) concealRecords(source federation.SourceID, e *exposure) {
	for name, record := range e.shown.Records {
		if state := r.records[source][name]; state != nil && state.head != nil && equalRecord(state.assemble(), record) {
			state.record = record
			continue
		}
		r.dirtyServices[name] = true
	}
	for name := range r.records[source] {
		if e.shown.Records[name] == nil {
			r.dirtyServices[name] = true
		}
	}
}

// concealStored ends the exposures that are stored by now.
func (r *replica) concealStored() {
	for source, e := range r.exposed {
		if e.until > 0 && r.revision >= e.until {
			r.conceal(source)
		}
	}
}

func (r *replica) publishWorkloads() (next map[federation.WorkloadKey]*federation.Workload, changed []federation.WorkloadKey, known bool) {
	changed, known = r.gatherWorkloads()
	next, cloned := r.workloads, false
	for source, e := range r.exposed {
		if e.shown.Workloads == nil {
			continue
		}
		if !cloned {
			next, cloned = maps.Clone(next), true
		}
		maps.DeleteFunc(next, func(k federation.WorkloadKey, _ *federation.Workload) bool { return k.Source == source })
		for uid, w := range e.shown.Workloads {
			next[federation.WorkloadKey{Source: source, UID: uid}] = w
		}
	}
	return next, changed, known && !r.dirtyShown // what is stored of a source that is shown otherwise only names too much
}

// hidesObject tells whether another state of an object's kind is shown of its source.
func (r *replica) hidesObject(k string, source federation.SourceID) bool {
	e := r.exposed[source]
	if e == nil {
		return false
	}
	for kind := range e.shown.Objects {
		if strings.HasPrefix(k, key(configPrefix, string(source), string(kind))+"/") {
			return true
		}
	}
	return false
}

// keepSame is fresh with the pointers of before where they mean the same; nil stays nil.
func keepSame[K comparable, V any](fresh, before map[K]*V, equal func(a, b *V) bool) map[K]*V {
	if fresh == nil {
		return nil
	}
	out := make(map[K]*V, len(fresh))
	for k, v := range fresh {
		if was := before[k]; was != nil && (was == v || equal(was, v)) {
			v = was
		}
		out[k] = v
	}
	return out
}

// sameMap compares by pointers.
func sameMap[K comparable, V any](a, b map[K]*V) bool {
	return (a == nil) == (b == nil) && maps.Equal(a, b)
}

// equalRecord compares what a source says with what was read from the store, where times
// have no zone of their own.
func equalRecord(a, b *federation.Record) bool {
	if a == nil || b == nil {
		return a == b
	}
	x, y := *a, *b
	x.Created, y.Created = x.Created.UTC(), y.Created.UTC()
	return reflect.DeepEqual(&x, &y)
}

func equalObject(a, b *federation.Object) bool {
	x, y := *a, *b
	x.Created, y.Created = x.Created.UTC(), y.Created.UTC()
	return reflect.DeepEqual(&x, &y)
}
