// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"maps"
	"slices"

	"github.com/isthmus-mesh/isthmus/api"
)

// names is what is held of the name table. It comes in parts, one for each service, so that
// one more service is one more part; in the state of the world all of them are one.
// A value is never changed, so readers may keep it.
type names struct {
	parts    map[string]*api.NameTable // by the name of the resource
	versions map[string]string         // the same keys; nil in the state of the world
}

// namesAnswer is one response of type NameTable.
type namesAnswer struct {
	nonce   string
	version string // state of the world only

	fresh   names
	removed []string
	whole   bool // fresh is all there is
}

// after is what is held when an answer was taken in.
func (n names) after(a namesAnswer) names {
	if a.whole {
		return a.fresh
	}
	next := names{map[string]*api.NameTable{}, map[string]string{}}
	if n.versions != nil {
		next = names{maps.Clone(n.parts), maps.Clone(n.versions)}
	}
	for _, name := range a.removed {
		delete(next.parts, name)
		delete(next.versions, name)
	}
	maps.Copy(next.parts, a.fresh.parts)
	maps.Copy(next.versions, a.fresh.versions)
	return next
}

// empty tells that nothing changes.
func (a namesAnswer) empty() bool { return !a.whole && len(a.fresh.parts) == 0 && len(a.removed) == 0 }

// table has the names of all parts. Of several parts with a name the last one counts, in the
// order of their own names, as where protobuf merges them.
func (n names) table() *api.NameTable {
	all := &api.NameTable{Table: make(map[string]*api.NameTable_NameInfo, len(n.parts))}
	for _, name := range slices.Sorted(maps.Keys(n.parts)) {
		maps.Copy(all.Table, n.parts[name].GetTable())
	}
	return all
}
