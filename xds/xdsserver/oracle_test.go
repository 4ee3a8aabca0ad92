// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/xds"
)

// TestOracle feeds the same changes to go-control-plane's server and to ours, and wants
// the same answers. A change adds or removes: ours sends the two apart, which the other
// does not.
func TestOracle(t *testing.T) {
	t.Parallel()
	linear := cachev3.NewLinearCache(xds.ClusterType)
	listener := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, serverv3.NewServer(t.Context(), linear, nil))
	go func() { _ = g.Serve(listener) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return listener.Dial() }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })

	world := map[string]*clusterv3.Cluster{"start": {Name: "start"}}
	ours := newBench(t)
	apply := func(changed map[string]types.Resource, removed []string) {
		if err := linear.UpdateResources(changed, removed); err != nil {
			t.Fatal(err)
		}
		list := []xds.Resource{}
		for _, name := range slices.Sorted(maps.Keys(world)) {
			r, err := xds.NewResource(name, world[name])
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, r)
		}
		ours.source.put(xds.Resources{xds.ClusterType: list})
	}
	apply(map[string]types.Resource{"start": world["start"]}, nil)
	a, b := newTalkOn(t, conn), ours.delta()
	exchange := func(what string) {
		t.Helper()
		one, two := <-a.got, <-b.got
		a.ack(one)
		b.ack(two)
		if x, y := answer(one), answer(two); x != y {
			t.Fatalf("%s: go-control-plane says %s, we say %s", what, x, y)
		}
	}
	a.subscribe(xds.ClusterType, "*")
	b.subscribe(xds.ClusterType, "*")
	exchange("first answer")
	random := rand.New(rand.NewPCG(1, 2))
	for step := range 200 {
		name := fmt.Sprintf("c%d", random.IntN(10))
		if _, ok := world[name]; ok && random.IntN(2) == 0 {
			delete(world, name)
			apply(nil, []string{name})
		} else {
			world[name] = &clusterv3.Cluster{Name: name, ConnectTimeout: durationpb.New(time.Duration(step+1) * time.Millisecond)}
			apply(map[string]types.Resource{name: world[name]}, nil)
		}
		exchange(fmt.Sprintf("step %d (%s)", step, name))
	}
}

// answer shows names, bodies and removals, ordered.
func answer(r *discoveryv3.DeltaDiscoveryResponse) string {
	var got []string
	for _, res := range r.Resources {
		got = append(got, fmt.Sprintf("%s=%x", res.Name, res.Resource.Value))
	}
	for _, n := range r.RemovedResources {
		got = append(got, "-"+n)
	}
	slices.Sort(got)
	return fmt.Sprint(got)
}
