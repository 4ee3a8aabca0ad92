// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
)

// snapshotFindings is what merging one snapshot has found out.
type snapshotFindings struct {
	revision  federation.Revision
	known     bool
	all       []*api.Finding
	byService map[federation.ServiceName][]*api.Finding
}

// snapshotFindings computes them once for each snapshot that is asked about.
func (s *Server) snapshotFindings(snapshot *federation.Snapshot) snapshotFindings {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.findings.known && s.findings.revision == snapshot.Revision {
		return s.findings
	}
	granted, found := snapshot.Granted()
	found = append(found, granted.Overlaps(s.cfg.Virtual)...)
	scopes := map[federation.Scope]bool{}
	for _, c := range granted.Clusters {
		scopes[federation.Scope{Cluster: c.ID, Network: c.Network}] = true
	}
	for scope := range scopes {
		found = append(found, granted.View(scope).Findings...)
	}
	out := snapshotFindings{revision: snapshot.Revision, known: true, byService: map[federation.ServiceName][]*api.Finding{}}
	out.all = findingsOut(found)
	for _, f := range out.all {
		if name, ok := serviceOf(f.GetSubject()); ok {
			out.byService[name] = append(out.byService[name], f)
		}
	}
	s.findings = out
	return out
}

// findingsOut orders findings and says each one once.
func findingsOut(found []federation.Finding) []*api.Finding {
	slices.SortFunc(found, func(a, b federation.Finding) int {
		return cmp.Or(cmp.Compare(a.Code, b.Code), cmp.Compare(a.Object, b.Object), cmp.Compare(a.Message, b.Message))
	})
	var out []*api.Finding
	for _, f := range slices.Compact(found) {
		out = append(out, &api.Finding{Code: f.Code, Severity: f.Severity, Subject: f.Object, Message: f.Message})
	}
	return out
}

// serviceOf reads the service out of "Service shop/cart @ east".
func serviceOf(object string) (federation.ServiceName, bool) {
	kind, rest, _ := strings.Cut(object, " ")
	name, _, _ := strings.Cut(rest, " ")
	namespace, name, ok := strings.Cut(name, "/")
	return federation.ServiceName{Namespace: namespace, Name: name}, ok && strings.EqualFold(kind, "Service")
}
