// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/federation"
	"pgregory.net/rapid"
)

// The random world: four clusters on three networks and the VMs of two, a handful of
// services, everything in disagreement with everything, and all networks reusing the
// same few addresses.
var (
	worldClusters = []ClusterID{"east", "near", "west", "north"}
	worldNetworks = []Network{"n1", "n1", "n2", "n3"}
	worldScopes   = []Scope{eastSees, {Cluster: "near", Network: "n1"}, westSees, {Cluster: "north", Network: "n3"}, {Network: "n1"}, {Network: "n9"}}
)

func drawWorld(t *rapid.T) *Snapshot {
	s := &Snapshot{
		Clusters: map[ClusterID]*Cluster{}, Records: map[ServiceName][]*Record{},
		Gateways: map[Network][]*Gateway{}, Addresses: map[string]VirtualAddress{}, Standing: map[SourceID]Standing{},
	}
	for i, id := range worldClusters {
		s.Clusters[id] = &Cluster{ID: id, Name: string(id), Network: worldNetworks[i], Draining: oneIn(t, 8)}
		if oneIn(t, 8) {
			s.Clusters[id].Grant.Namespaces = []string{"shop"}
		}
		if oneIn(t, 5) {
			s.Standing[KubeSource(id)] = rapid.SampledFrom([]Standing{Demoted, Drained}).Draw(t, "standing")
		}
		for g := range rapid.IntRange(0, 2).Draw(t, "gateways") {
			n := worldNetworks[i]
			s.Gateways[n] = append(s.Gateways[n], &Gateway{
				Source: KubeSource(id), Network: n, Name: fmt.Sprint(g), Ready: rapid.IntRange(0, 1).Draw(t, "ready"),
				Addresses: []GatewayAddress{{Host: fmt.Sprintf("203.0.113.%d", 10*i+g), Port: 15443}},
			})
		}
	}
	sources := []SourceID{VMSource("n1"), VMSource("n9")}
	for _, id := range worldClusters {
		sources = append(sources, KubeSource(id))
	}
	for _, name := range []ServiceName{{Namespace: "shop", Name: "cart"}, {Namespace: "pay", Name: "api"}, {Namespace: "kube-system", Name: "dns"}} {
		s.Addresses[name.Host()] = VirtualAddress{Host: name.Host(), V4: netip.AddrFrom4([4]byte{240, 240, 0, byte(len(name.Name))})}
		for i, source := range sources {
			if !oneIn(t, 3) {
				s.Records[name] = append(s.Records[name], drawRecord(t, s, name, source, byte(i)))
			}
		}
	}
	return s
}

func oneIn(t *rapid.T, n int) bool { return rapid.IntRange(1, n).Draw(t, "oneIn") == 1 }

func drawRecord(t *rapid.T, s *Snapshot, name ServiceName, source SourceID, i byte) *Record {
	r := &Record{
		Source: source, Name: name, Created: time.Unix(int64(rapid.IntRange(1, 3).Draw(t, "created")), 0),
		Type:         rapid.SampledFrom([]ServiceType{ClusterIP, ClusterIP, ClusterIP, Headless, ExternalName}).Draw(t, "type"),
		Ports:        []Port{{Number: 80, Protocol: rapid.SampledFrom([]Protocol{HTTP, HTTP, TCP}).Draw(t, "protocol")}},
		ClusterLocal: oneIn(t, 10), PublishNotReady: oneIn(t, 10),
	}
	if oneIn(t, 2) {
		r.Ports = append(r.Ports, Port{Number: 90, Protocol: GRPC})
	}
	home := Network("")
	if id, ok := source.Cluster(); ok {
		home = s.Clusters[id].Network
		r.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, i, 1})}
	} else {
		home, _ = source.VMNetwork()
	}
	for n := range rapid.IntRange(0, 5).Draw(t, "endpoints") {
		e := Endpoint{
			Workload: fmt.Sprint("w-", n), Hostname: fmt.Sprint("w-", n), ServiceAccount: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "account"),
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(n)})}, Network: home,
			Health:      rapid.SampledFrom([]Health{Ready, Ready, Ready, NotReady, Terminating}).Draw(t, "health"),
			Mesh:        !oneIn(t, 6),
			Locality:    Locality{Region: rapid.SampledFrom([]string{"", "eu", "us"}).Draw(t, "region")},
			TargetPorts: map[uint32]uint32{80: 8080},
		}
		if len(r.Ports) > 1 && !oneIn(t, 4) {
			e.TargetPorts[90] = 9090
		}
		if oneIn(t, 10) {
			e.Network = "n2"
		}
		r.Endpoints = append(r.Endpoints, e)
	}
	return r
}

// plain is a view as its users see it, without what only makes the next one cheap.
func plain(v *View) string {
	out := fmt.Sprintf("%v %v %v\n", v.Scope, v.Region, v.Findings)
	for _, s := range v.Services {
		out += fmt.Sprintf("%s own=%t alias=%v\n%+v\n", describe(s), s.Own, s.Aliases, s.Endpoints)
		for _, p := range s.Ports {
			out += fmt.Sprintf("%+v\n", v.Groups(s, p.Number, nil))
		}
	}
	return out
}

func TestViewDoesNotDependOnOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		shuffled := *s
		shuffled.Records = map[ServiceName][]*Record{}
		for name, list := range s.Records {
			shuffled.Records[name] = rapid.Permutation(list).Draw(t, "records")
		}
		shuffled.Gateways = map[Network][]*Gateway{}
		for n, list := range s.Gateways {
			shuffled.Gateways[n] = rapid.Permutation(list).Draw(t, "gateways")
		}
		for _, scope := range worldScopes {
			if a, b := plain(s.View(scope)), plain(shuffled.View(scope)); a != b {
				t.Fatalf("in order:\n%s\nshuffled:\n%s", a, b)
			}
		}
	})
}

func TestViewHoldsNoForeignAddress(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		for _, scope := range worldScopes {
			v := s.View(scope)
			for _, svc := range v.Services {
				checkAddresses(t, s, v, svc)
				for _, p := range svc.Ports {
					checkHops(t, v, svc, v.Groups(svc, p.Number, nil))
				}
			}
		}
	})
}

func checkAddresses(t *rapid.T, s *Snapshot, v *View, svc *Service) {
	allowed := s.Addresses[svc.Host].Addrs()
	for _, r := range s.Records[svc.Name] {
		if r.Source == KubeSource(v.Scope.Cluster) {
			allowed = append(allowed, r.ClusterIPs...)
		}
	}
	for _, ip := range slices.Concat(svc.Addresses, svc.AlsoAt) {
		if !slices.Contains(allowed, ip) {
			t.Fatalf("%v sees %s at %s", v.Scope, svc.Name, ip)
		}
	}
	for _, e := range svc.Endpoints {
		if e.Direct != (e.Network == v.Scope.Network) || !e.Direct && len(e.Addresses) > 0 {
			t.Fatalf("%v sees %+v", v.Scope, e)
		}
		if svc.HeadlessHere() && e.Cluster != v.Scope.Cluster {
			t.Fatalf("%v: headless %s has a pod of %s", v.Scope, svc.Name, e.Cluster)
		}
	}
	for _, p := range svc.Pods {
		if e := p.Endpoint; !e.Direct && len(e.Addresses) > 0 {
			t.Fatalf("%v sees %+v", v.Scope, e)
		}
	}
}

func checkHops(t *rapid.T, v *View, svc *Service, groups []Group) {
	for _, g := range groups {
		for _, h := range g.Hops {
			if h.Gateway != (g.Network != v.Scope.Network) {
				t.Fatalf("%v: %s: hop %+v of network %s", v.Scope, svc.Name, h, g.Network)
			}
			if h.Gateway && !slices.ContainsFunc(v.Gateways[g.Network], func(a GatewayAddress) bool { return a.Host == h.Host }) {
				t.Fatalf("%v: %s is no gateway of %s", v.Scope, h.Host, g.Network)
			}
			if h.Mesh && h.Account != "" && !slices.Contains(svc.Accounts, "ns/"+svc.Name.Namespace+"/sa/"+h.Account) {
				t.Fatalf("%v: %s: account %s is not pinned", v.Scope, svc.Name, h.Account)
			}
		}
	}
}

// Gateways together weigh exactly what is behind them, in the unit of one endpoint; the
// priorities have no gaps; the loads add up.
func TestWeightsAreExact(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		for _, scope := range worldScopes {
			v := s.View(scope)
			for _, svc := range v.Services {
				for _, p := range svc.Ports {
					groups := v.Groups(svc, p.Number, nil)
					checkPriorities(t, groups)
					checkWeights(t, v, svc, p.Number, groups)
				}
			}
		}
	})
}

func checkPriorities(t *rapid.T, groups []Group) {
	next := uint32(0)
	for _, g := range groups {
		if g.Priority > next {
			t.Fatalf("priority %d is missing: %s", next, hops(groups))
		}
		next = g.Priority + 1
	}
	sum := 0
	for _, l := range Load(groups) {
		sum += l
	}
	if len(groups) > 0 && sum != 100 {
		t.Fatalf("loads add up to %d: %s", sum, hops(groups))
	}
}

func checkWeights(t *rapid.T, v *View, svc *Service, port uint32, groups []Group) {
	ready := map[Network]uint64{}
	terminating := map[Network]uint64{}
	drained := map[Network]uint64{}
	for _, e := range svc.Endpoints {
		if _, ok := e.TargetPorts[port]; !ok || !e.Direct && (!e.Mesh || len(v.Gateways[e.Network]) == 0) {
			continue
		}
		switch {
		case e.Standing == Drained:
			drained[e.Network]++
		case e.Health == Ready:
			ready[e.Network]++
		case e.Health == Terminating:
			terminating[e.Network]++
		}
	}
	if len(drained) > 0 {
		return // a story of its own: see TestSplit
	}
	if len(ready) == 0 {
		ready = terminating
	}
	sums, direct := map[Network]uint64{}, uint64(0)
	for _, g := range groups {
		for _, h := range g.Hops {
			if h.Weight == 0 {
				t.Fatalf("weight 0: %s", hops(groups))
			}
			if !h.Gateway {
				direct = uint64(h.Weight)
			}
			if h.Health == Ready {
				sums[g.Network] += uint64(h.Weight)
			}
		}
	}
	unit := direct
	for n, sum := range sums {
		if unit == 0 {
			unit = sum / ready[n]
		}
		if sum != unit*ready[n] {
			t.Fatalf("network %s weighs %d, unit %d, %d ready: %s", n, sum, unit, ready[n], hops(groups))
		}
	}
	if len(sums) != len(ready) {
		t.Fatalf("%v ready, weights of %v", ready, sums)
	}
}

// A view computed from an earlier one is the view computed afresh, whatever happened.
func TestViewFromIsView(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		before, after := drawWorld(t), drawWorld(t)
		// Keep some of what was, by pointer, as a store does.
		for name, list := range after.Records {
			if oneIn(t, 2) && len(before.Records[name]) > 0 {
				after.Records[name] = before.Records[name]
			} else if oneIn(t, 2) {
				delete(after.Records, name)
			} else {
				after.Records[name] = slices.Clone(list)
			}
		}
		if oneIn(t, 2) {
			after.Clusters, after.Standing = before.Clusters, maps.Clone(before.Standing)
		}
		for _, scope := range worldScopes {
			prev := before.View(scope)
			got, want := after.ViewFrom(prev, scope), after.View(scope)
			if a, b := plain(got), plain(want); a != b {
				t.Fatalf("from the earlier view:\n%s\nafresh:\n%s", a, b)
			}
			if !reflect.DeepEqual(got.Gateways, want.Gateways) {
				t.Fatalf("gateways %v, want %v", got.Gateways, want.Gateways)
			}
			if again := after.ViewFrom(got, scope); len(again.Changed(got)) != 0 {
				t.Fatalf("changed without a change: %v", again.Changed(got))
			}
		}
	})
}

// A maker's change log gives the same views as comparing does, whatever happened between
// two looks, and however long ago the first was.
func TestHistoryGivesTheSameViews(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		history, now := &History{}, drawWorld(t)
		now.Workloads = map[WorkloadKey]*Workload{}
		history.Append(now, Change{AnyService: true, AnyWorkload: true})
		seen := now
		prev := map[Scope]*View{}
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			now = drawStep(t, history, now)
			if oneIn(t, 3) {
				continue // nobody looks
			}
			for _, scope := range worldScopes {
				v := now.ViewFrom(prev[scope], scope)
				if a, b := plain(v), plain(now.View(scope)); a != b {
					t.Fatalf("by the change log:\n%s\nafresh:\n%s", a, b)
				}
				compared := *v // a view that nobody computed from another
				if got, want := v.Changed(prev[scope]), (&compared).Changed(prev[scope]); !slices.Equal(got, want) {
					t.Fatalf("changed %v, compared %v", got, want)
				}
				prev[scope] = v
				if !oneIn(t, 4) {
					continue
				}
				foreign := *now // somebody exchanges the records and says nothing
				foreign.Records = drawWorld(t).Records
				if a, b := plain(foreign.ViewFrom(v, scope)), plain(foreign.View(scope)); a != b {
					t.Fatalf("other records:\n%s\nafresh:\n%s", a, b)
				}
			}
			got, want := now.ChangedWorkloads(seen), changedWorkloads(seen, now)
			slices.SortFunc(got, func(a, b WorkloadKey) int { return cmp.Compare(a.UID, b.UID) })
			if !slices.Equal(got, want) {
				t.Fatalf("workloads changed: %v, compared %v", got, want)
			}
			seen = now
		}
	})
}

// drawStep is the next snapshot of a maker, who may name too much, or say that it does not
// know.
func drawStep(t *rapid.T, h *History, was *Snapshot) *Snapshot {
	other := drawWorld(t)
	next := *was
	next.Revision++
	next.Records, next.Workloads = maps.Clone(was.Records), maps.Clone(was.Workloads)
	var c Change
	for name, records := range other.Records {
		switch {
		case oneIn(t, 3):
			next.Records[name] = records
		case oneIn(t, 5):
			delete(next.Records, name)
		case oneIn(t, 3):
			continue
		}
		c.Services = append(c.Services, name)
	}
	for range rapid.IntRange(0, 3).Draw(t, "workloads") {
		key := WorkloadKey{Source: "kube:east", UID: fmt.Sprint(rapid.IntRange(1, 4).Draw(t, "uid"))}
		if c.Workloads = append(c.Workloads, key); oneIn(t, 3) {
			delete(next.Workloads, key)
		} else if oneIn(t, 2) {
			next.Workloads[key] = &Workload{UID: key.UID}
		}
	}
	if oneIn(t, 4) {
		next.Gateways = other.Gateways
	}
	if oneIn(t, 4) {
		next.Addresses = other.Addresses
	}
	if oneIn(t, 6) {
		next.Clusters, next.Standing = other.Clusters, other.Standing
	}
	if oneIn(t, 6) {
		c = Change{AnyService: true, AnyWorkload: true}
	}
	h.Append(&next, c)
	return &next
}

func changedWorkloads(a, b *Snapshot) []WorkloadKey {
	var out []WorkloadKey
	for i := range 5 {
		key := WorkloadKey{Source: "kube:east", UID: fmt.Sprint(i)}
		if a.Workloads[key] != b.Workloads[key] {
			out = append(out, key)
		}
	}
	return out
}

func TestHistoryForgets(t *testing.T) {
	t.Parallel()
	s := story(t, twoClusters+`
		service east shop/cart 80/HTTP
		pod e-0 10.0.0.1`)
	h, first := &History{}, s.View(eastSees)
	h.Append(s, Change{})
	v := s.ViewFrom(first, eastSees)
	for range 1000 { // far more than it keeps
		next := *s
		next.Records = map[ServiceName][]*Record{}
		h.Append(&next, Change{Services: []ServiceName{{Namespace: "shop", Name: "cart"}}})
		s = &next
	}
	if got := s.ViewFrom(v, eastSees).Services; len(got) != 0 {
		t.Errorf("who was away too long did not notice that %v went", got[0].Name)
	}
}
