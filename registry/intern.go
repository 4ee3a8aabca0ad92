// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"hash/maphash"
	"maps"
	"strings"
	"sync"
)

// Interner shares equal strings and label sets. What is decoded has copies of its own of
// the few names that thousands of pods have in common; with an Interner they have one. It
// may be used concurrently; its zero value is ready.
type Interner struct {
	mu      sync.Mutex
	seed    maphash.Seed
	strings map[string]string
	sets    map[uint64]map[string]string
}

// internMost bounds what an Interner remembers. It then begins anew: what is in use stays
// in use.
const internMost = 1 << 14

// String returns a string equal to s, the same one for all who ask.
func (in *Interner) String(s string) string {
	if s == "" {
		return s
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.stringLocked(s)
}

func (in *Interner) stringLocked(s string) string {
	if shared, ok := in.strings[s]; ok {
		return shared
	}
	if in.strings == nil || len(in.strings) >= internMost {
		in.strings = map[string]string{}
	}
	s = strings.Clone(s) // it may be a piece of something large
	in.strings[s] = s
	return s
}

// Labels returns a map equal to set, the same one for all who ask; nil for an empty set.
// Nobody may change what it returns.
func (in *Interner) Labels(set map[string]string) map[string]string {
	if len(set) == 0 {
		return nil
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.sets == nil || len(in.sets) >= internMost {
		in.sets, in.seed = map[uint64]map[string]string{}, maphash.MakeSeed()
	}
	var sum uint64 // whatever the order
	for k, v := range set {
		sum += maphash.Comparable(in.seed, [2]string{k, v})
	}
	if shared, ok := in.sets[sum]; ok && maps.Equal(shared, set) {
		return shared
	}
	shared := make(map[string]string, len(set))
	for k, v := range set {
		shared[in.stringLocked(k)] = in.stringLocked(v)
	}
	in.sets[sum] = shared
	return shared
}
