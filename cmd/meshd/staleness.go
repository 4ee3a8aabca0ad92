// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// staleness judges sources by how long they have been out of reach. The transition is in
// the store, so that replicas agree and a restart forgets nothing.
type staleness struct {
	policy federation.StalePolicy

	mu   sync.Mutex
	next time.Duration // until some source's standing changes by age alone; 0 for none
}

// judge returns the snapshot with the standing of its sources.
func (s *staleness) judge(snapshot *federation.Snapshot) *federation.Snapshot {
	silent := map[federation.SourceID]federation.Freshness{}
	for id, c := range snapshot.Clusters {
		for _, condition := range c.Conditions {
			if condition.Type == federation.Reachable && !condition.Status {
				silent[federation.KubeSource(id)] = federation.Freshness{Age: time.Since(condition.Since)}
			}
		}
	}
	next, _ := s.policy.Next(silent)
	s.mu.Lock()
	s.next = next
	s.mu.Unlock()
	return snapshot.WithStanding(s.policy.Judge(silent))
}

// run asks for a new judgement when one is due.
func (s *staleness) run(ctx context.Context, refresh func()) error {
	const look = 5 * time.Second
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		s.mu.Lock()
		due := s.next > 0 && s.next <= look
		s.mu.Unlock()
		if due {
			refresh()
		}
	}
}
