// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"maps"
	"reflect"
	"slices"
	"sync"
)

// Change names what may differ between a snapshot and the one before it. To name too much
// costs time only. What it does not speak of is always compared.
type Change struct {
	Services  []ServiceName // whose records differ, came or went
	Workloads []WorkloadKey // likewise

	// AnyService and AnyWorkload say that it is not known which.
	AnyService, AnyWorkload bool
}

// History is the change log of one maker of snapshots: who has an earlier one asks it what
// has changed since, instead of comparing everything. A snapshot that no history knows, or
// whose records were exchanged later, is compared as a whole. It is safe for concurrent
// use; the zero History is empty.
type History struct {
	mu    sync.Mutex
	last  uint64   // number of the last step
	steps []Change // the newest ones, oldest first
}

// How much a history remembers: so many steps, and of one step so many names. Who is
// further behind compares.
const (
	keptSteps = 128
	keptNames = 256
)

// place is where a snapshot stands in a history, with the maps that it had there: a copy
// of a snapshot with other maps stands nowhere.
type place struct {
	history   *History
	step      uint64
	records   map[ServiceName][]*Record
	workloads map[WorkloadKey]*Workload
}

// Append makes a snapshot the next one, before anybody else sees it. The change is against
// the snapshot that was appended last.
func (h *History) Append(s *Snapshot, c Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(c.Services) > keptNames {
		c.Services, c.AnyService = nil, true
	}
	if len(c.Workloads) > keptNames {
		c.Workloads, c.AnyWorkload = nil, true
	}
	if h.last++; len(h.steps) == keptSteps {
		h.steps = slices.Delete(h.steps, 0, 1)
	}
	h.steps = append(h.steps, c)
	s.place = place{h, h.last, s.Records, s.Workloads}
}

// since collects what is told of the steps after an earlier one; false if that is too long
// ago, or not earlier.
func (h *History) since(step, now uint64) (Change, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	oldest := h.last - uint64(len(h.steps)) // its own change is not needed
	if step > now || step < oldest {
		return Change{}, false
	}
	var out Change
	for _, c := range h.steps[step-oldest : now-oldest] {
		out.Services, out.Workloads = append(out.Services, c.Services...), append(out.Workloads, c.Workloads...)
		out.AnyService, out.AnyWorkload = out.AnyService || c.AnyService, out.AnyWorkload || c.AnyWorkload
	}
	return out, true
}

// changedServices names the services whose records may differ from those of an earlier
// place, ordered; false if that is not known.
func (s *Snapshot) changedServices(from place) ([]ServiceName, bool) {
	if from.history == nil || from.history != s.place.history || !sameMap(s.place.records, s.Records) {
		return nil, false
	}
	c, ok := from.history.since(from.step, s.place.step)
	if !ok || c.AnyService {
		return nil, false
	}
	slices.SortFunc(c.Services, ServiceName.Compare)
	return slices.Compact(c.Services), true
}

// ChangedWorkloads are the keys of the workloads that are not the same in an earlier
// snapshot, or came or went since.
func (s *Snapshot) ChangedWorkloads(prev *Snapshot) []WorkloadKey {
	if sameMap(prev.Workloads, s.Workloads) {
		return nil
	}
	differs := func(key WorkloadKey) bool { return prev.Workloads[key] != s.Workloads[key] }
	if h := prev.place.history; h != nil && h == s.place.history && sameMap(s.place.workloads, s.Workloads) && sameMap(prev.place.workloads, prev.Workloads) {
		if c, ok := h.since(prev.place.step, s.place.step); ok && !c.AnyWorkload {
			named := map[WorkloadKey]bool{}
			for _, key := range c.Workloads {
				if differs(key) {
					named[key] = true
				}
			}
			return slices.Collect(maps.Keys(named))
		}
	}
	var out []WorkloadKey
	for key := range s.Workloads {
		if differs(key) {
			out = append(out, key)
		}
	}
	for key := range prev.Workloads {
		if _, ok := s.Workloads[key]; !ok {
			out = append(out, key)
		}
	}
	return out
}

// sameMap compares by identity: what stands in snapshots does not change.
func sameMap[K comparable, V any](a, b map[K]V) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}
