// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"cmp"
	"slices"

	"github.com/isthmus-mesh/isthmus/federation"
)

// What a session of this process writes comes back by the watch. So that it is not decoded
// then, and in memory a second time, the session tells what it is about to write: what
// comes back with the same bytes means the same.

// expectation is what a value will mean, if it has that hash.
type expectation struct {
	key   string
	hash  uint64
	means any // []*federation.Workload, *headState or *sliceState
}

// expect announces the puts of some groups. Those that are not committed after all are
// forgotten with the session, or replaced by the next attempt.
func (s *Store) expect(groups []*group) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range groups {
		for _, kv := range g.puts {
			if kv.means != nil {
				s.replica.expected[kv.key] = expectation{kv.key, s.replica.hash(kv.value), kv.means}
			}
		}
	}
}

// forget drops what a session has announced and not written.
func (s *Store) forget(source federation.SourceID) {
	escaped := key("", string(source))
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.replica.expected {
		if ofSource(k, escaped) {
			delete(s.replica.expected, k)
		}
	}
}

// takeExpected takes in a value that was announced; false if this one was not.
func (r *replica) takeExpected(k string, hash uint64) bool {
	e, ok := r.expected[k]
	if !ok || e.hash != hash {
		return false
	}
	delete(r.expected, k)
	if list, ok := e.means.([]*federation.Workload); ok {
		r.setBundle(k, list)
		return true
	}
	p, err := parts(k, recordsPrefix, 3, 4)
	if err != nil {
		return false
	}
	source, name := federation.SourceID(p[0]), federation.ServiceName{Namespace: p[1], Name: p[2]}
	state := r.recordState(source, name)
	switch means := e.means.(type) {
	case *headState:
		state.head, state.whole = means, means.record
	case *sliceState:
		state.setSlice(means)
		if means.record != nil {
			state.whole, means.record = means.record, nil
		}
	}
	r.dirtyRecord(source, name)
	return true
}

func (s *recordState) setSlice(slice *sliceState) {
	for i := range s.slices {
		if s.slices[i].name == slice.name {
			s.slices[i] = slice
			return
		}
	}
	s.slices = append(s.slices, slice)
}

func (s *recordState) dropSlice(name string) {
	s.slices = slices.DeleteFunc(s.slices, func(slice *sliceState) bool { return slice.name == name })
}

// assemble makes the record of a head and the slices of its generation. It is the very
// record that the session wrote, where that is what was stored.
func (s *recordState) assemble() *federation.Record {
	if s.record != nil || s.head == nil {
		return s.record
	}
	visible := make([]*sliceState, 0, len(s.slices))
	total := 0
	for _, slice := range s.slices {
		if slice.generation == s.head.Generation && len(slice.endpoints) > 0 {
			visible = append(visible, slice)
			total += len(slice.endpoints)
		}
	}
	var endpoints []federation.Endpoint
	if len(visible) == 1 {
		endpoints = visible[0].endpoints // ordered when it was written
	} else if total > 0 {
		endpoints = make([]federation.Endpoint, 0, total)
		for _, slice := range visible {
			endpoints = append(endpoints, slice.endpoints...)
		}
		slices.SortFunc(endpoints, func(a, b federation.Endpoint) int { return cmp.Compare(a.Key(), b.Key()) })
	}
	if s.whole != nil && sameEndpoints(s.whole.Endpoints, endpoints) {
		s.record = s.whole
	} else {
		record := *s.head.record
		record.Endpoints = endpoints
		s.record = &record
	}
	// What was there before must not stay because of its head.
	s.whole, s.head = nil, &headState{s.head.Generation, s.record}
	return s.record
}

// sameEndpoints is equalEndpoints, quicker for the very same ones.
func sameEndpoints(a, b []federation.Endpoint) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || equalEndpoints(a, b))
}
