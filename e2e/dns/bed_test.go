// SPDX-License-Identifier: Apache-2.0

package dns_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/dns"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // the test that needs namespaces skips itself and says why
	}
	bed.Main(m)
}

// TestInBed asks the DNS of a real cluster from a host on the cluster's network.
func TestInBed(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces")
	}
	w, err := bed.NewWorld(bed.WorldConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("close world: %v", err)
		}
	})
	network, err := w.Network("n1", bed.NetworkConfig{})
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := w.Cluster("east", bed.ClusterConfig{Network: network})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	server, err := dns.InBed(ctx, &all, cluster)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(all.Wait)
	t.Cleanup(cancel)
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, protocol, _ string) (net.Conn, error) {
		return network.Router().Dial(ctx, protocol, netip.AddrPortFrom(server, 53).String())
	}}
	lookup := func(name, want string) {
		t.Helper()
		asked, done := context.WithTimeout(ctx, 5*time.Second)
		defer done()
		got, err := resolver.LookupHost(asked, name)
		if want == "" && err == nil || want != "" && (err != nil || len(got) != 1 || got[0] != want) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
	lookup("kubernetes.default.svc.cluster.local.", "10.96.0.1")
	lookup("kubernetes.shop.svc.cluster.local.", "")
	if err := cluster.APIServer.Kill(); err != nil {
		t.Fatal(err)
	}
	lookup("kubernetes.default.svc.cluster.local.", "10.96.0.1") // while the API server is away
}
