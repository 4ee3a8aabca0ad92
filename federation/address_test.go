// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/federation"
	"pgregory.net/rapid"
)

func TestAllocateIsStableAndNeverTwiceTheSame(t *testing.T) {
	t.Parallel()
	taken := map[netip.Addr]bool{}
	for i := range 2000 {
		host := fmt.Sprintf("s%d.shop.svc.cluster.local", i)
		a, err := Allocate(host, func(ip netip.Addr) bool { return taken[ip] })
		if err != nil {
			t.Fatal(err)
		}
		if taken[a.V4] || taken[a.V6] || !VirtualV4.Contains(a.V4) || !VirtualV6.Contains(a.V6) {
			t.Fatalf("%s: %v", host, a)
		}
		taken[a.V4], taken[a.V6] = true, true
	}
	none := func(netip.Addr) bool { return false }
	a, _ := Allocate("cart.shop.svc.cluster.local", none)
	b, _ := Allocate("cart.shop.svc.cluster.local", none)
	if a != b {
		t.Errorf("%v, then %v", a, b)
	}
}

func TestAllocateUsesASmallRangeUp(t *testing.T) {
	t.Parallel()
	r := VirtualRanges{V4: netip.MustParsePrefix("198.18.0.0/29")}
	taken := map[netip.Addr]bool{}
	for i := range 6 {
		a, err := r.Allocate(fmt.Sprint(i), func(ip netip.Addr) bool { return taken[ip] })
		if err != nil || taken[a.V4] || a.V6.IsValid() {
			t.Fatalf("%d: %v, %v", i, a, err)
		}
		taken[a.V4] = true
	}
	if taken[netip.MustParseAddr("198.18.0.0")] || taken[netip.MustParseAddr("198.18.0.7")] {
		t.Errorf("gave the first or the last one: %v", taken)
	}
	if _, err := r.Allocate("7", func(ip netip.Addr) bool { return taken[ip] }); !errors.Is(err, ErrRangeFull) {
		t.Errorf("error %v, want %v", err, ErrRangeFull)
	}
}

func TestNeedsVirtualAddress(t *testing.T) {
	t.Parallel()
	tests := []struct{ story, world, want string }{
		{"nobody needs one for what everybody has", `
			cluster east n1
			cluster west n2
			service east shop/cart 80/HTTP ip=10.96.0.1
			service west shop/cart 80/HTTP ip=10.96.0.1`, ""},
		{"who lacks it does", `
			cluster east n1
			cluster west n2
			service east shop/cart 80/HTTP ip=10.96.0.1`, "cart.shop.svc.cluster.local"},
		{"not for what is local", `
			cluster east n1
			cluster west n2
			service east shop/cart 80/HTTP ip=10.96.0.1 local
			service east kube-system/dns 80/HTTP ip=10.96.0.2
			service east shop/out 80/HTTP external=example.org`, ""},
		{"a service of virtual machines has none of its own", `
			cluster east n1
			service vm:n1 legacy/stock 80/HTTP`, "stock.legacy.svc.cluster.local"},
		{"pods with names: the plain one only where somebody lacks the service", `
			cluster east n1
			cluster west n2
			service east shop/db 80/TCP headless
			pod db-0 10.0.0.1 host=db-0
			pod other 10.0.0.2
			pod bad 10.0.0.3 host=UPPER.and_worse
			service west shop/db 80/TCP headless
			service west shop/q 80/TCP headless
			pod q-0 10.0.0.1 host=q-0`,
			"db-0.east.db.shop.svc.clusterset.local q-0.q.shop.svc.cluster.local q-0.west.q.shop.svc.clusterset.local q.shop.svc.cluster.local"},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			if got := strings.Join(NeedsVirtualAddress(story(t, tt.world)), " "); got != tt.want {
				t.Errorf("need %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("every service once there is a virtual machine", func(t *testing.T) {
		t.Parallel()
		s := story(t, "cluster east n1\nservice east shop/cart 80/HTTP ip=10.96.0.1")
		s.Workloads = map[WorkloadKey]*Workload{{Source: VMSource("n1"), UID: "vm-a"}: {}}
		if got := NeedsVirtualAddress(s); !slices.Equal(got, []string{"cart.shop.svc.cluster.local"}) {
			t.Errorf("need %q", got)
		}
	})
}

func TestPlanAddresses(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_000_000, 0)
	have := map[string]VirtualAddress{
		"kept": {}, "back": {Released: now.Add(-time.Hour)}, "gone": {},
		"held": {Released: now.Add(-23 * time.Hour)}, "old": {Released: now.Add(-24 * time.Hour)},
	}
	p := PlanAddresses(have, []string{"back", "kept", "new"}, now)
	if got, want := fmt.Sprint(p), "{[new] [back] [gone] [old]}"; got != want {
		t.Errorf("plan %s, want %s", got, want)
	}
	if p := PlanAddresses(map[string]VirtualAddress{"kept": {}}, []string{"kept"}, now); !p.Empty() {
		t.Errorf("nothing to do, but %v", p)
	}
}

func TestOverlaps(t *testing.T) {
	t.Parallel()
	s := story(t, `
		cluster east n1
		cluster near n1
		cluster west n2
		service east shop/cart 80/HTTP ip=240.250.0.1
		pod c-0 10.0.0.1
		service near shop/cart 80/HTTP
		pod c-0 10.0.0.1
		service west shop/cart 80/HTTP
		pod c-0 10.0.0.1`)
	pods := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
	for _, c := range s.Clusters {
		c.Ranges = AddressRanges{Pods: pods}
	}
	s.Clusters["west"].Ranges.Services = []netip.Prefix{netip.MustParsePrefix("240.0.0.0/8")}
	var got []string
	for _, f := range s.Overlaps(VirtualRanges{}) {
		got = append(got, f.Code+" "+f.Object+" "+f.Message)
	}
	want := []string{
		"MESH1022 Cluster east pod range 10.244.0.0/16 overlaps 10.244.0.0/16 of cluster near on the same network n1; join one of them with a network of its own",
		"MESH1022 Cluster west service range 240.0.0.0/8 overlaps the virtual addresses 240.240.0.0/12; start meshd with another range (--virtual-ipv4, --virtual-ipv6)",
		"MESH1022 Network n1 address 10.0.0.1 is used by east and by near; give one of them a network of its own",
		"MESH1022 source east uses address 240.250.0.1, which is in the virtual ranges; start meshd with others (--virtual-ipv4, --virtual-ipv6)",
	}
	if !slices.Equal(got, want) {
		t.Errorf("findings:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// However the store is asked, in whatever order, a host is where it hashes to or after.
func TestAllocateNeverGivesATakenOne(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.IntRange(24, 30).Draw(t, "bits")
		r := VirtualRanges{V4: netip.PrefixFrom(netip.MustParseAddr("198.18.0.0"), bits)}
		taken := map[netip.Addr]bool{}
		size := 1<<(32-bits) - 2
		for i := range size + 1 {
			a, err := r.Allocate(rapid.String().Draw(t, "host"), func(ip netip.Addr) bool { return taken[ip] })
			if i == size {
				if !errors.Is(err, ErrRangeFull) {
					t.Fatalf("full, but %v, %v", a, err)
				}
				return
			}
			if err != nil || taken[a.V4] || !r.Contains(a.V4) {
				t.Fatalf("%d of %d: %v, %v", i, size, a, err)
			}
			taken[a.V4] = true
		}
	})
}
