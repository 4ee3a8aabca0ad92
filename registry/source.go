// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Source reports services until ctx ends.
//
// Run offers levels to sink whenever something may have changed, and returns only when
// ctx is done (nil) or when it cannot go on (an error; it is then started again after a
// pause). A source that merely loses touch with what it reads keeps running, says so
// through Observe, and offers nothing.
type Source interface {
	Run(ctx context.Context, sink Sink) error
}

// Sink takes what one source reports. Its methods never block and may be called from any
// goroutine; of several levels or statuses in a row only the last one counts.
type Sink interface {
	// Offer hands over everything the source reports now. The level and what it points
	// to belong to the sink from then on: nobody changes them. Items that did not change
	// since the last level should be the same pointers, which makes the comparison cheap.
	Offer(Level)

	// Observe replaces what is known about the source itself.
	Observe(Status)
}

// Level is everything one source reports at one time.
//
// A nil map means unknown: the source could not read that kind, and what is stored stays
// as it is. A map that is empty but not nil means that there is nothing.
type Level struct {
	Records   map[federation.ServiceName]*federation.Record
	Workloads map[string]*federation.Workload // by UID
	Gateways  map[string]*federation.Gateway  // by name

	// Objects of configuration. A kind without an entry is unknown.
	Objects map[ObjectKind]map[ObjectName]*federation.Object

	// Findings are what a person should know about the source's objects.
	Findings []federation.Finding
}

// ObjectKind is a kind with its group, "VirtualService.networking.istio.io".
type ObjectKind string

// ObjectName is the name of an object of one kind; Namespace is empty for objects outside
// of namespaces.
type ObjectName struct{ Namespace, Name string }

// Status is what is known about a source itself, apart from what it reports. Times and
// lags stay in memory; only transitions of conditions are stored.
type Status struct {
	// Conditions, each type at most once. Since may be zero: it is then when the status
	// was first observed. Types that are missing keep their stored state.
	Conditions []federation.Condition

	// Beacon is the youngest timestamp that travelled the whole way from the source's
	// API back to us, and Lag how long it took; zero if there was none yet.
	Beacon time.Time
	Lag    time.Duration

	// Unheard is since when the source hears nothing of some kind of objects, although it
	// may hear of others; zero while it hears of all.
	Unheard time.Time

	// Version of what is behind the source, "v1.36.3".
	Version string

	// CredentialsExpire is when the credential in use ends; zero if never or unknown.
	CredentialsExpire time.Time
}

// Condition returns the condition of that type; false if it was not observed.
func (s *Status) Condition(kind string) (federation.Condition, bool) {
	for _, c := range s.Conditions {
		if c.Type == kind {
			return c, true
		}
	}
	return federation.Condition{}, false
}
