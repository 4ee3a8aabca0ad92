// SPDX-License-Identifier: Apache-2.0

package federation

import "time"

// Standing tells how much a source's word counts for others. Inside its own views it
// always counts in full.
type Standing uint8

// The standings, best first.
const (
	Fresh   Standing = iota
	Demoted          // called only when nothing fresh is left
	Drained          // called only when nothing else has the service at all
)

func (s Standing) String() string {
	return [...]string{"fresh", "demoted", "drained"}[min(s, Drained)]
}

// Freshness is what is known of a source's word at one moment.
type Freshness struct {
	// Age since its beacon last arrived.
	Age time.Duration

	// GatewaysDown tells that nobody reaches the gateways of its network either: not its
	// API server alone is away, but the data path.
	GatewaysDown bool
}

// StalePolicy says what becomes of endpoints whose source has fallen silent. An API
// server that is away says nothing about the workloads, so by itself it only demotes:
// the cluster's endpoints remain behind everyone else's for as long as it takes. They are
// drained when the gateways have been silent too. Absence is never deletion: a service
// that nobody else has keeps its endpoints even then.
type StalePolicy struct {
	// DemoteAfter is the age from which fresh endpoints go first. Zero means 5 min: longer
	// than an upgrade of an API server, shorter than what a rolled-out workload survives.
	DemoteAfter time.Duration

	// DrainAfter is the age from which a source whose gateways are down too is left out.
	// Zero means 15 min.
	DrainAfter time.Duration
}

// Judge is the standing of every source that is not Fresh.
func (p StalePolicy) Judge(sources map[SourceID]Freshness) map[SourceID]Standing {
	demote, drain := p.DemoteAfter, p.DrainAfter
	if demote == 0 {
		demote = 5 * time.Minute
	}
	if drain == 0 {
		drain = 15 * time.Minute
	}
	out := map[SourceID]Standing{}
	for source, f := range sources {
		switch {
		case f.GatewaysDown && f.Age >= drain:
			out[source] = Drained
		case f.Age >= demote:
			out[source] = Demoted
		}
	}
	return out
}

// Next is how long until some source's standing changes by age alone; false if none will.
func (p StalePolicy) Next(sources map[SourceID]Freshness) (time.Duration, bool) {
	demote, drain := p.DemoteAfter, p.DrainAfter
	if demote == 0 {
		demote = 5 * time.Minute
	}
	if drain == 0 {
		drain = 15 * time.Minute
	}
	var next time.Duration
	found := false
	for _, f := range sources {
		for _, limit := range [...]time.Duration{demote, drain} {
			if limit == drain && !f.GatewaysDown || f.Age >= limit {
				continue
			}
			if wait := limit - f.Age; !found || wait < next {
				next, found = wait, true
			}
		}
	}
	return next, found
}

// WithStanding is the snapshot under a new judgement. Only transitions need a new one.
func (s *Snapshot) WithStanding(standing map[SourceID]Standing) *Snapshot {
	out := *s
	out.Standing = standing
	return &out
}

// standing of a source in the merger's scope: the own cluster never doubts itself.
func (m *merger) standing(source SourceID) Standing {
	if source == m.own || m.scope.Gateway {
		return Fresh
	}
	if n, ok := source.VMNetwork(); ok && m.scope.Cluster == "" && n == m.scope.Network {
		return Fresh
	}
	return m.snapshot.Standing[source]
}
