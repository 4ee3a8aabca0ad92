// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
)

// admission leaves out of a source's levels what it was not granted.
type admission struct {
	source  federation.SourceID
	trimmed map[*federation.Record]*federation.Record
}

// admit is the level without what its source was not granted, and the level's findings
// with those about that. Services of kube-* stay, because they are local to their cluster
// (see federation.Snapshot.Granted).
func (a *admission) admit(level *Level, grant federation.Grant) (*Level, []federation.Finding) {
	if _, kube := a.source.Cluster(); !kube {
		return level, level.Findings
	}
	r := refusal{}
	out := *level
	out.Records = keep(level.Records, func(_ federation.ServiceName, record *federation.Record) bool {
		namespace := record.Name.Namespace
		return grant.AllowsNamespace(namespace) || strings.HasPrefix(namespace, "kube-") || r.add("services", namespace)
	})
	out.Records = a.trim(out.Records, grant, r)
	out.Workloads = keep(level.Workloads, func(_ string, w *federation.Workload) bool {
		return grant.AllowsIdentity(w.Namespace, w.ServiceAccount) || r.add("workloads", w.Namespace+"/"+w.ServiceAccount)
	})
	cloned := false
	for kind, objects := range level.Objects {
		kept := keep(objects, func(name ObjectName, _ *federation.Object) bool {
			return name.Namespace == "" || grant.AllowsNamespace(name.Namespace) || r.add(string(kind), name.Namespace)
		})
		if len(kept) != len(objects) {
			if !cloned {
				out.Objects, cloned = maps.Clone(level.Objects), true
			}
			out.Objects[kind] = kept
		}
	}
	return &out, append(slices.Clip(level.Findings), r.findings(a.source)...)
}

// trim leaves out the endpoints whose identity is not granted. A record that was trimmed
// before is the same pointer again.
func (a *admission) trim(records map[federation.ServiceName]*federation.Record, grant federation.Grant, r refusal) map[federation.ServiceName]*federation.Record {
	if len(grant.ServiceAccounts) == 0 {
		a.trimmed = nil
		return records
	}
	out, trimmed := records, map[*federation.Record]*federation.Record{}
	for name, record := range records {
		if !grant.AllowsNamespace(name.Namespace) {
			continue // one of kube-*, which only its own cluster sees
		}
		refused := func(e federation.Endpoint) bool {
			return e.ServiceAccount != "" && !grant.AllowsIdentity(name.Namespace, e.ServiceAccount)
		}
		at := slices.IndexFunc(record.Endpoints, refused)
		if at < 0 {
			continue
		}
		r.add("endpoints", name.Namespace+"/"+record.Endpoints[at].ServiceAccount)
		less := a.trimmed[record]
		if less == nil {
			copied := *record
			copied.Endpoints = slices.DeleteFunc(slices.Clone(record.Endpoints), refused)
			less = &copied
		}
		trimmed[record] = less
		if len(trimmed) == 1 {
			out = maps.Clone(records)
		}
		out[name] = less
	}
	a.trimmed = trimmed
	return out
}

// keep is the map without what is not wanted; the very map where that is nothing.
func keep[K comparable, V any](m map[K]V, want func(K, V) bool) map[K]V {
	out, cloned := m, false
	for k, v := range m {
		if want(k, v) {
			continue
		}
		if !cloned {
			out, cloned = maps.Clone(m), true
		}
		delete(out, k)
	}
	return out
}

// refusal counts what was left out, by kind and whose it was.
type refusal map[[2]string]int

// add always returns false, so that it ends a condition.
func (r refusal) add(kind, whose string) bool {
	if kind == "workloads" && strings.HasPrefix(whose, "kube-") {
		return false // nobody expects them
	}
	r[[2]string{kind, whose}]++
	return false
}

func (r refusal) findings(source federation.SourceID) []federation.Finding {
	var out []federation.Finding
	for _, k := range slices.SortedFunc(maps.Keys(r), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		out = append(out, federation.Finding{
			Code: federation.CodeOutsideGrant, Severity: federation.SeverityWarning,
			Object:  fmt.Sprintf("%s %s @ %s", k[0], k[1], source),
			Message: fmt.Sprintf("%d %s of %q are outside the grant of the cluster and left out; widen its grant, or remove them", r[k], k[0], k[1]),
		})
	}
	return out
}
