// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
)

// staleness judges sources by how long they have been out of reach. The transition is in
// the store, so that replicas agree and a restart forgets nothing; whether the gateways of
// a silent cluster are away too is found out anew, by trying them.
type staleness struct {
	policy federation.StalePolicy
	log    *slog.Logger

	// paths tries the ways from and to a cluster, from everywhere that can be asked.
	paths func(ctx context.Context, cluster string) ([]*api.Path, error)

	mu       sync.Mutex
	silent   map[federation.SourceID]silence
	standing map[federation.SourceID]federation.Standing
	due      time.Time // when some source's standing changes by age alone; zero for never
}

// silence is one cluster whose API server is away.
type silence struct {
	name   string
	since  time.Time
	rounds int // trials in a row in which its gateways were reached from nowhere
}

// downRounds is how many trials in a row must fail before gateways count as down: one may
// have fallen into a restart.
const downRounds = 2

// judge returns the snapshot with the standing of its sources.
func (s *staleness) judge(snapshot *federation.Snapshot) *federation.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	silent := map[federation.SourceID]silence{}
	for id, c := range snapshot.Clusters {
		for _, condition := range c.Conditions {
			if condition.Type == federation.Reachable && !condition.Status {
				source := federation.KubeSource(id)
				silent[source] = silence{name: c.Name, since: condition.Since, rounds: s.silent[source].rounds}
			}
		}
	}
	s.silent = silent
	now := time.Now()
	known := map[federation.SourceID]federation.Freshness{}
	for source, one := range silent {
		known[source] = federation.Freshness{Age: now.Sub(one.since), GatewaysDown: one.rounds >= downRounds}
	}
	s.due = time.Time{}
	if next, ok := s.policy.Next(known); ok {
		s.due = now.Add(next)
	}
	standing := s.policy.Judge(known)
	s.tell(standing)
	s.standing = standing
	return snapshot.WithStanding(standing)
}

// tell logs what has changed: it is why traffic moves.
func (s *staleness) tell(standing map[federation.SourceID]federation.Standing) {
	if s.log == nil {
		return
	}
	for source, one := range s.silent {
		if now := standing[source]; now != s.standing[source] {
			s.log.Warn("a cluster whose API server is away counts differently for others", "cluster", one.name,
				"standing", now, "before", s.standing[source], "away_since", one.since.UTC().Format(time.RFC3339), "gateways_down", one.rounds >= downRounds)
		}
	}
	for source, before := range s.standing {
		if _, still := s.silent[source]; !still && before != federation.Fresh {
			s.log.Info("a cluster counts in full again", "source", source, "before", before)
		}
	}
}

// Standing is how much a source counts for others now.
func (s *staleness) Standing(source federation.SourceID) federation.Standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.standing[source]
}

// looks is the time between two looks at the clock and at silent clusters' gateways.
func (s *staleness) looks() time.Duration {
	const usual = 5 * time.Second
	if s.policy.DemoteAfter == 0 {
		return usual
	}
	return max(min(usual, s.policy.DemoteAfter/4), 100*time.Millisecond)
}

// run asks for a new judgement when one is due, be it that time has passed or that the
// gateways of a silent cluster went away or came back.
func (s *staleness) run(ctx context.Context, refresh func()) error {
	ticker := time.NewTicker(s.looks())
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		changed := s.tryGateways(ctx)
		s.mu.Lock()
		due := !s.due.IsZero() && !time.Now().Before(s.due)
		s.mu.Unlock()
		if due || changed {
			refresh()
		}
	}
}

// tryGateways tries those of every cluster that is demoted by now, and tells whether any
// went down or came back.
func (s *staleness) tryGateways(ctx context.Context) (changed bool) {
	s.mu.Lock()
	demoted := maps.Clone(s.silent)
	maps.DeleteFunc(demoted, func(source federation.SourceID, _ silence) bool { return s.standing[source] == federation.Fresh })
	s.mu.Unlock()
	for _, source := range slices.Sorted(maps.Keys(demoted)) {
		paths, err := s.paths(ctx, demoted[source].name)
		if err != nil {
			continue // it left meanwhile, or nothing was found out
		}
		changed = s.note(source, gatewaysDown(demoted[source].name, paths)) || changed
	}
	return changed
}

// note counts a trial in, and tells whether the verdict has changed.
func (s *staleness) note(source federation.SourceID, down bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	one, ok := s.silent[source]
	if !ok {
		return false
	}
	before := one.rounds >= downRounds
	if one.rounds++; !down {
		one.rounds = 0
	}
	s.silent[source] = one
	return before != (one.rounds >= downRounds)
}

// gatewaysDown tells whether the data path into a cluster is away, by trials of the ways
// from and to it. One point of view never decides: meshd and at least one other network's
// gateway must have tried in vain, nobody may have come through, and no agent of the
// cluster's own gateways may be connected to any replica.
func gatewaysDown(cluster string, paths []*api.Path) bool {
	byMeshd, byOthers := false, false
	for _, p := range paths {
		switch {
		case p.GetFrom() == cluster && p.GetState() != "unknown":
			return false // its gateway's agent can be asked
		case p.GetTo() != cluster, p.GetState() == "unknown":
		case p.GetState() != "failed":
			return false
		case p.GetFrom() == "meshd":
			byMeshd = true
		default:
			byOthers = true
		}
	}
	return byMeshd && byOthers
}
