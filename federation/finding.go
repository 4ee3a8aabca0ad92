// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"slices"
)

// Finding is something a person should know, with a stable code.
type Finding struct {
	Code     string // MESH2203, …
	Severity string // "error", "warning", "info"
	Object   string // kind namespace/name @ source
	Message  string // names field, value, and what would be right
}

// The severities.
const (
	SeverityError   = "error"   // something does not work as it is written
	SeverityWarning = "warning" // something may surprise
	SeverityInfo    = "info"    // a consequence worth knowing
)

// The codes of this package's findings; `mesh explain` has the long text.
const (
	CodeOverlap          = "MESH1022" // address ranges that overlap
	CodePortProtocol     = "MESH2201" // a port's protocol differs between sources
	CodeServiceType      = "MESH2202" // a service's type or visibility differs between sources
	CodePortName         = "MESH2203" // a port's name differs between sources
	CodeOutsideGrant     = "MESH2204" // contributed, but not granted
	CodeNoProxy          = "MESH2205" // endpoints without a proxy, out of reach for other networks
	CodeNetworkNoGateway = "MESH8001" // a network with endpoints, but no way in
)

// sortFindings orders by code, object, message and drops repetitions.
func sortFindings(list []Finding) []Finding {
	slices.SortFunc(list, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Code, b.Code), cmp.Compare(a.Object, b.Object),
			cmp.Compare(a.Message, b.Message), cmp.Compare(a.Severity, b.Severity))
	})
	return slices.Compact(list)
}

// SourceName is how a person calls a source: the cluster's name where it has one.
func (s *Snapshot) SourceName(source SourceID) string {
	if id, ok := source.Cluster(); ok {
		if c := s.Clusters[id]; c != nil && c.Name != "" {
			return c.Name
		}
	}
	return string(source)
}
