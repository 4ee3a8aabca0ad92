// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"crypto/tls"
	"log/slog"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// What one replica alone knows, the other ones tell, too; and who is away is
// left out.
func TestReplicasCompleteEachOther(t *testing.T) {
	t.Parallel()
	one := newWorld(t)
	east := one.join(t, "uid-e", "east", "n1")
	one.sources.set(registry.SourceState{Source: east, Holding: true, Status: registry.Status{
		Conditions: []federation.Condition{{Type: federation.Synced, Status: true}}, Version: "v1.36.3",
		Beacon: time.Now(), Lag: 7 * time.Millisecond,
	}})
	one.proxies.set(proxyStatus(east, "cart", time.Time{}))

	serving := one.ca.Serving(t, "127.0.0.1")
	peers := apiserver.NewPeerGroup(apiserver.PeerConfig{
		Addresses: func() []string { return []string{one.address, "127.0.0.1:1"} },
		Authority: one.ca.Authority, Certificate: func() *tls.Certificate { return &serving }, Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() { peers.Close() })
	two := newWorld(t, func(c *apiserver.Config) {
		c.Store, c.Authority, c.Peers, c.Replica = one.store, one.ca.Authority, peers, "meshd-1"
	})
	// The second world has an authority of its own; its listener shows that one's
	// certificate, but its server trusts the first one's administrators.
	two.client = api.NewAdminClient(two.dial(t, two.address, one.ca.Admin(t)))

	cluster, err := two.client.GetCluster(t.Context(), &api.GetClusterRequest{Name: "east"})
	if err != nil {
		t.Fatal(err)
	}
	st := cluster.GetStatus()
	if st.GetSyncedBy() != "meshd-0" || st.GetLag().AsDuration() != 7*time.Millisecond || st.GetKubernetesVersion() != "v1.36.3" || st.GetProxies() != 1 {
		t.Errorf("status %v", st)
	}
	list, err := two.client.ListProxies(t.Context(), &api.ListProxiesRequest{})
	if err != nil || len(list.GetItems()) != 1 || list.GetItems()[0].GetReplica() != "meshd-0" {
		t.Errorf("proxies %v, %v", list, err)
	}
	version, err := two.client.GetVersion(t.Context(), &api.GetVersionRequest{})
	if err != nil || version.GetMembers()[0].GetKubernetes() != "v1.36.3" {
		t.Errorf("version %v, %v", version, err)
	}
}

// A connection between replicas lasts longer than the certificate with which it began.
func TestReplicasGoOnWhenACertificateHasEnded(t *testing.T) {
	t.Parallel()
	clock := catest.NewClock()
	one := newWorld(t)
	one.ca = catest.New(t, func(c *ca.Config) { c.Clock = clock.Now })
	server := newWorld(t, func(c *apiserver.Config) { c.Authority = one.ca.Authority })
	serving := one.ca.Serving(t, "127.0.0.1")
	peers := apiserver.NewPeerGroup(apiserver.PeerConfig{
		Addresses: func() []string { return []string{server.address} },
		Authority: server.ca.Authority, Certificate: func() *tls.Certificate { return &serving }, Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() { peers.Close() })
	if lists, missing := peers.Trust(t.Context()); len(lists) != 1 || len(missing) != 0 {
		t.Fatalf("%d answers, without %v", len(lists), missing)
	}
	clock.Advance(25 * time.Hour)
	serving = one.ca.Serving(t, "127.0.0.1")
	if lists, missing := peers.Trust(t.Context()); len(lists) != 1 || len(missing) != 0 {
		t.Errorf("after a day: %d answers, without %v", len(lists), missing)
	}
}
