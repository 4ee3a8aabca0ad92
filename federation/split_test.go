// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"slices"
	"testing"

	. "github.com/isthmus-mesh/isthmus/federation"
)

const twoClusters = `
	cluster east n1
	cluster west n2
	gateway east n1 203.0.113.1
	gateway west n2 203.0.113.2
`

var splitStories = []struct {
	story string
	world string
	scope Scope
	want  string
	load  []int
}{
	{
		story: "a service only in west is its gateway, weighing what is behind",
		world: twoClusters + `
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1
			pod c-1 10.0.0.2
			pod c-2 10.0.0.3 NotReady`,
		scope: eastSees,
		want:  "P0 [203.0.113.2:15443]*2",
		load:  []int{100},
	},
	{
		story: "the same from west is its pods, without the unready one: nothing could spill",
		world: twoClusters + `
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1
			pod c-1 10.0.0.2
			pod c-2 10.0.0.3 NotReady`,
		scope: westSees,
		want:  "P0 10.0.0.1:8080*1 10.0.0.2:8080*1",
		load:  []int{100},
	},
	{
		story: "one of three unready: 93 stay, 7 go",
		world: twoClusters + `
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1
			pod c-1 10.0.0.2
			pod c-2 10.0.0.3 NotReady
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1
			pod c-1 10.0.0.2`,
		scope: eastSees,
		want: `P0 10.0.0.1:8080*1 10.0.0.2:8080*1 10.0.0.3:8080!*1
			P1 [203.0.113.2:15443]*2`,
		load: []int{93, 7},
	},
	{
		story: "none ready here: all go",
		world: twoClusters + `
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1 NotReady
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: eastSees,
		want: `P0 10.0.0.1:8080!*1
			P1 [203.0.113.2:15443]*1`,
		load: []int{0, 100},
	},
	{
		story: "two gateways for three endpoints: every weight is doubled",
		world: twoClusters + `
			gateway west n2 203.0.113.3
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1
			pod c-1 10.0.0.2
			pod c-2 10.0.0.3`,
		scope: eastSees,
		want: `P0 10.0.0.1:8080*2
			P1 [203.0.113.2:15443]*3 [203.0.113.3:15443]*3`,
		load: []int{100, 0},
	},
	{
		story: "a pod that terminates is not a pod that fails",
		world: twoClusters + `
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1
			pod c-1 10.0.0.2 Terminating
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: eastSees,
		want: `P0 10.0.0.1:8080*1
			P1 [203.0.113.2:15443]*1`,
		load: []int{100, 0},
	},
	{
		story: "the last ones serve while they terminate",
		world: twoClusters + `
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1 Terminating
			pod c-1 10.0.0.2 NotReady`,
		scope: eastSees,
		want:  "P0 10.0.0.1:8080*1",
		load:  []int{100},
	},
	{
		story: "three clusters on one flat network and one behind: own, own region, others",
		world: `
			cluster east n1
			cluster near n1
			cluster west n2
			gateway west n2 203.0.113.2
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1 region=eu
			service near shop/cart 80/HTTP
			pod c-0 10.0.1.1 region=eu
			pod c-1 10.0.1.2 region=us
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1 region=us`,
		scope: eastSees,
		want: `P0 10.0.0.1:8080*1
			P1 10.0.1.1:8080*1
			P2 10.0.1.2:8080*1
			P2 [203.0.113.2:15443]*1`,
		load: []int{100, 0, 0},
	},
	{
		story: "a network without a gateway has no hop",
		world: `
			cluster east n1
			cluster west n2
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: eastSees,
		want:  "",
		load:  []int{},
	},
	{
		story: "a gateway that is not ready is none",
		world: `
			cluster east n1
			cluster west n2
			gateway west n2 203.0.113.2 ready=0
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: eastSees,
		want:  "",
		load:  []int{},
	},
	{
		story: "an endpoint without a proxy is called at home, and out of reach elsewhere",
		world: twoClusters + `
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1 bare
			pod c-1 10.0.0.2`,
		scope: eastSees,
		want:  "P0 [203.0.113.2:15443]*1",
		load:  []int{100},
	},
	{
		story: "a virtual machine calls its own network first",
		world: twoClusters + `
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: Scope{Network: "n1"},
		want: `P0 10.0.0.1:8080*1
			P1 [203.0.113.2:15443]*1`,
		load: []int{100, 0},
	},
	{
		story: "a virtual machine on the own network comes before the other network",
		world: twoClusters + `
			service vm:n1 legacy/stock 80/HTTP
			pod vm-a 10.0.0.9
			service west legacy/stock 80/HTTP
			pod c-0 10.0.0.1`,
		scope: eastSees,
		want: `P0 10.0.0.9:8080*1
			P1 [203.0.113.2:15443]*1`,
		load: []int{100, 0},
	},
	{
		story: "a stale cluster is called after the fresh ones",
		world: twoClusters + `
			cluster north n3
			gateway north n3 203.0.113.3
			standing west demoted
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1 region=eu
			service north shop/cart 80/HTTP
			pod c-0 10.0.0.1 region=us`,
		scope: eastSees,
		want: `P0 [203.0.113.3:15443]*1
			P1 [203.0.113.2:15443]*1`,
		load: []int{100, 0},
	},
	{
		story: "a stale cluster notices nothing of it",
		world: twoClusters + `
			standing west demoted
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: westSees,
		want: `P0 10.0.0.1:8080*1
			P1 [203.0.113.1:15443]*1`,
		load: []int{100, 0},
	},
	{
		story: "a drained cluster is left out",
		world: twoClusters + `
			standing west drained
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1
			service east shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: eastSees,
		want:  "P0 10.0.0.1:8080*1",
		load:  []int{100},
	},
	{
		story: "unless nobody else has the service",
		world: twoClusters + `
			standing west drained
			service west shop/cart 80/HTTP
			pod c-0 10.0.0.1`,
		scope: eastSees,
		want:  "P0 [203.0.113.2:15443]*1",
		load:  []int{100},
	},
	{
		story: "a gateway passes to its own network only, whatever callers think of its cluster",
		world: twoClusters + `
			cluster west n2 draining
			standing west drained
			service east shop/cart 80/HTTP age=9
			pod c-0 10.0.0.1
			service west shop/cart 80/TCP
			pod c-0 10.0.0.1
			pod c-1 10.0.0.2 bare
			pod c-2 10.0.0.3 NotReady`,
		scope: Scope{Network: "n2", Gateway: true},
		want:  "P0 10.0.0.1:8080*1",
		load:  []int{100},
	},
	{
		story: "addresses that are not ready are published where the service says so",
		world: twoClusters + `
			service east shop/cart 80/HTTP publish
			pod c-0 10.0.0.1 NotReady`,
		scope: eastSees,
		want:  "P0 10.0.0.1:8080*1",
		load:  []int{100},
	},
}

func TestSplit(t *testing.T) {
	t.Parallel()
	for _, tt := range splitStories {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			v := story(t, tt.world).View(tt.scope)
			groups := v.Groups(v.Services[0], 80, nil)
			if got, want := hops(groups), trim(tt.want); got != want {
				t.Errorf("groups:\n%s\nwant:\n%s", got, want)
			}
			if got := Load(groups); !slices.Equal(got, tt.load) {
				t.Errorf("load %v, want %v", got, tt.load)
			}
		})
	}
}

func TestANetworkThatIsNotLedToYetIsLeftOut(t *testing.T) {
	t.Parallel()
	v := story(t, twoClusters+`
		service east shop/cart 80/HTTP
		pod c-0 10.0.0.1 Terminating
		service west shop/cart 80/HTTP
		pod c-0 10.0.0.1`).View(eastSees)
	svc, asked := mustService(t, v, "shop/cart"), []string{}
	split := func(closed bool) string {
		return hops(v.Split(Query{Service: svc, Port: 80, Closed: func(k WeightKey) bool {
			asked = append(asked, string(k.Network)+" "+k.SNI())
			return closed
		}}))
	}
	if got, want := split(false), "P0 [203.0.113.2:15443]*1"; got != want {
		t.Errorf("open: %s, want %s", got, want)
	}
	// What serves while it terminates goes on until there is something better.
	if got, want := split(true), "P0 10.0.0.1:8080*1"; got != want {
		t.Errorf("closed: %s, want %s", got, want)
	}
	if want := []string{"n2 outbound_.80_._.cart.shop.svc.cluster.local"}; !slices.Equal(asked[:1], want) || len(asked) != 2 {
		t.Errorf("asked for %q, want %q once each time", asked, want)
	}
}

func TestSplitOfSubset(t *testing.T) {
	t.Parallel()
	v := story(t, twoClusters+`
		service east shop/cart 80/HTTP
		pod c-0 10.0.0.1 label=version:v1
		pod c-1 10.0.0.2 label=version:v2
		service west shop/cart 80/HTTP
		pod c-0 10.0.0.1 label=version:v2
		pod c-1 10.0.0.2 label=version:v2`).View(eastSees)
	groups := v.Groups(mustService(t, v, "shop/cart"), 80, func(l map[string]string) bool { return l["version"] == "v2" })
	if got, want := hops(groups), "P0 10.0.0.2:8080*1\nP1 [203.0.113.2:15443]*2"; got != want {
		t.Errorf("groups:\n%s\nwant:\n%s", got, want)
	}
}
