// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
)

func path(from, to, state string) *api.Path { return &api.Path{From: from, To: to, State: state} }

func TestOneWitnessDoesNotTakeGatewaysDown(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		why   string
		paths []*api.Path
		down  bool
	}{
		{"nobody comes through", []*api.Path{path("meshd", "west", "failed"), path("east", "west", "failed"), path("west", "east", "unknown")}, true},
		{"several networks fail", []*api.Path{path("meshd", "west", "failed"), path("east", "west", "failed"), path("north", "west", "failed")}, true},
		{"meshd alone", []*api.Path{path("meshd", "west", "failed"), path("west", "east", "unknown")}, false},
		{"meshd, and nobody else could try", []*api.Path{path("meshd", "west", "failed"), path("east", "west", "unknown")}, false},
		{"another gateway, but not meshd", []*api.Path{path("meshd", "west", "verified"), path("east", "west", "failed")}, false},
		{"one of two others comes through", []*api.Path{path("meshd", "west", "failed"), path("east", "west", "failed"), path("north", "west", "verified")}, false},
		{"a gateway of another making accepts connections", []*api.Path{path("meshd", "west", "reached"), path("east", "west", "failed")}, false},
		{"its own gateway's agent is connected", []*api.Path{path("meshd", "west", "failed"), path("east", "west", "failed"), path("west", "east", "failed")}, false},
		{"no path is known", nil, false},
	} {
		if got := gatewaysDown("west", c.paths); got != c.down {
			t.Errorf("%s: %v", c.why, got)
		}
	}
}

// west is a snapshot in which the API server of west is away since then; the zero time
// means that it is there.
func west(since time.Time) *federation.Snapshot {
	c := &federation.Cluster{ID: "uid-w", Name: "west", Conditions: []federation.Condition{{Type: federation.Reachable, Status: since.IsZero(), Since: since}}}
	return &federation.Snapshot{Clusters: map[federation.ClusterID]*federation.Cluster{"uid-w": c}}
}

// A cluster whose API server is away is demoted, in a mesh where nothing else happens
// too; it is drained when its gateways are away as well, and comes back with them.
func TestADeadClusterIsDrained(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		answer := []*api.Path{path("meshd", "west", "verified"), path("east", "west", "verified")}
		var failure error
		s := &staleness{
			policy: federation.StalePolicy{DemoteAfter: 5 * time.Minute, DrainAfter: 15 * time.Minute},
			paths: func(context.Context, string) ([]*api.Path, error) {
				mu.Lock()
				defer mu.Unlock()
				return answer, failure
			},
		}
		set := func(err error, paths ...*api.Path) {
			mu.Lock()
			defer mu.Unlock()
			answer, failure = paths, err
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		since := time.Now()
		s.judge(west(since))
		go s.run(ctx, func() { s.judge(west(since)) })
		const source = federation.SourceID("kube:uid-w")
		after := func(d time.Duration, want federation.Standing, why string) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if got := s.Standing(source); got != want {
				t.Errorf("%s: %v, want %v", why, got, want)
			}
		}
		after(4*time.Minute, federation.Fresh, "before --demote-after")
		after(time.Minute+10*time.Second, federation.Demoted, "after it")
		after(20*time.Minute, federation.Demoted, "its gateways answer")
		set(nil, path("meshd", "west", "failed"), path("east", "west", "failed"), path("west", "east", "unknown"))
		after(6*time.Second, federation.Demoted, "they failed once")
		after(6*time.Second, federation.Drained, "and once more")
		set(errors.New("nothing could be tried"))
		after(time.Minute, federation.Drained, "nothing new is known")
		set(nil, path("meshd", "west", "failed"), path("east", "west", "verified"))
		after(6*time.Second, federation.Demoted, "one witness comes through again")
		s.judge(west(time.Time{}))
		after(0, federation.Fresh, "its API server is back")
	})
}
