// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sort"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/xds"
)

// modelClient applies responses as a proxy does, and checks what a proxy relies on.
type modelClient struct {
	t       *testing.T
	sotw    bool
	machine *machine
	now     time.Time

	world  xds.Resources
	wanted map[string]map[string]bool   // explicit names, by type
	all    map[string]bool              // wildcard, by type
	has    map[string]map[string]string // what it has, by type and name
	open   []*response                  // received, not answered
	bad    map[string]bool              // type/name/version it would refuse
}

var modelTypes = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, xds.NameTableType}

func newModel(t *testing.T, sotw bool) *modelClient {
	c := &modelClient{t: t, sotw: sotw, now: time.Unix(0, 0), world: xds.Resources{}, has: map[string]map[string]string{}, bad: map[string]bool{}}
	c.connect()
	return c
}

// connect begins a new stream, with what the client has kept.
func (c *modelClient) connect() {
	c.machine = newMachine(c.sotw)
	c.machine.update(c.world)
	c.open, c.wanted, c.all = nil, map[string]map[string]bool{}, map[string]bool{}
	for _, typeURL := range modelTypes {
		if c.has[typeURL] == nil || c.sotw {
			c.has[typeURL] = map[string]string{}
		}
	}
}

// change puts a resource into the world or takes it away.
func (c *modelClient) change(typeURL, name string, version byte) {
	world := maps.Clone(c.world)
	list := slices.DeleteFunc(slices.Clone(world[typeURL]), func(r xds.Resource) bool { return r.Name == name })
	if version%4 != 0 {
		v := fmt.Sprint(version)
		list = append(list, xds.Resource{Name: name, Version: v, Body: []byte(v)})
		sort.Slice(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	}
	world[typeURL] = list
	c.world = world
	c.machine.update(world)
}

// want subscribes to or from a name.
func (c *modelClient) want(typeURL, name string, on bool) {
	first := c.wanted[typeURL] == nil
	if first && c.sotw && !on {
		return // a first request without names would mean everything
	}
	if first {
		c.wanted[typeURL] = map[string]bool{}
	}
	r := request{typeURL: typeURL}
	if first && !c.sotw {
		r.initial = maps.Clone(c.has[typeURL])
	}
	switch {
	case name == wildcardName:
		c.all[typeURL] = on
	case on:
		c.wanted[typeURL][name] = true
	default:
		delete(c.wanted[typeURL], name)
	}
	if on {
		r.subscribe = []string{name}
	} else {
		r.unsubscribe = []string{name}
	}
	for n := range c.has[typeURL] {
		if !c.covers(typeURL, n) {
			delete(c.has[typeURL], n)
		}
	}
	r.names = c.names(typeURL)
	c.machine.request(r, c.now)
}

func (c *modelClient) names(typeURL string) []string {
	out := slices.Sorted(maps.Keys(c.wanted[typeURL]))
	if c.all[typeURL] {
		out = append(out, wildcardName)
	}
	return out
}

func (c *modelClient) covers(typeURL, name string) bool {
	return c.all[typeURL] || c.wanted[typeURL][name]
}

// receive takes one response, if there is one.
func (c *modelClient) receive() bool {
	r, _ := c.machine.next(c.now)
	if r == nil {
		return false
	}
	seen := map[string]bool{}
	for _, res := range r.resources {
		if seen[res.Name] {
			c.t.Fatalf("W8, D8: %s is twice in one response", res.Name)
		}
		seen[res.Name] = true
	}
	for _, n := range r.removed {
		if seen[n] {
			c.t.Fatalf("D8: %s is sent and removed in one response", n)
		}
	}
	for _, other := range c.open {
		if other.typeURL == r.typeURL || other.nonce == r.nonce {
			c.t.Fatalf("two responses in flight: %v and %v", other, r)
		}
	}
	c.open = append(c.open, r)
	return true
}

// answer acknowledges the oldest response, or refuses it if it is bad.
func (c *modelClient) answer() bool {
	if len(c.open) == 0 {
		return false
	}
	r := c.open[0]
	c.open = c.open[1:]
	ack := request{typeURL: r.typeURL, nonce: r.nonce, version: r.version, names: c.names(r.typeURL)}
	has := c.has[r.typeURL]
	if c.sotw && wholeSet(r.typeURL) {
		clear(has)
	}
	for _, res := range r.resources {
		if c.bad[r.typeURL+res.Name+res.Version] {
			ack.isNACK, ack.refused = true, "cannot use "+res.Name
		}
		if c.covers(r.typeURL, res.Name) {
			has[res.Name] = res.Version
		}
	}
	for _, n := range r.removed {
		delete(has, n)
	}
	c.machine.request(ack, c.now)
	return true
}

// settle lets everything arrive, and compares.
func (c *modelClient) settle() {
	for rounds := 0; c.receive() || c.answer(); rounds++ {
		if rounds > 500 {
			c.t.Fatal("the machine does not come to rest")
		}
	}
	if !c.machine.settled() {
		for _, s := range c.machine.subs {
			c.t.Logf("%+v", *s)
		}
		c.t.Fatal("nothing more to say, but not settled")
	}
	for _, typeURL := range modelTypes {
		if c.wanted[typeURL] == nil {
			continue
		}
		want := map[string]string{}
		for _, r := range c.world[typeURL] {
			if c.covers(typeURL, r.Name) {
				want[r.Name] = r.Version
			}
		}
		got := maps.Clone(c.has[typeURL])
		if c.sotw && !wholeSet(typeURL) {
			// Such types cannot be removed in this variant.
			maps.DeleteFunc(got, func(n, _ string) bool { _, ok := want[n]; return !ok })
		}
		if !maps.Equal(got, want) {
			c.t.Fatalf("%s: the client has %v, and should have %v", kind(typeURL), got, want)
		}
	}
}

// play turns bytes into a story: three bytes a step.
func (c *modelClient) play(script []byte) {
	for len(script) >= 3 {
		op, what, which := script[0], modelTypes[int(script[1])%len(modelTypes)], fmt.Sprintf("r%d", script[2]%4)
		switch op % 10 {
		case 0, 1:
			c.change(what, which, script[2]/4)
		case 2:
			c.want(what, which, true)
		case 3:
			c.want(what, which, false)
		case 4:
			c.want(what, wildcardName, true)
		case 5, 6:
			c.receive()
		case 7:
			c.answer()
		case 8:
			if script[2]%8 == 0 {
				c.connect()
			} else {
				c.bad[what+which+fmt.Sprint(script[2]/4)] = true
			}
		case 9:
			c.settle()
		}
		script = script[3:]
	}
	c.settle()
}

func TestWhatAProxyHolds(t *testing.T) {
	t.Parallel()
	for _, sotw := range []bool{false, true} {
		m, now := newMachine(sotw), time.Unix(0, 0)
		world := func(version string) {
			m.update(xds.Resources{
				xds.ClusterType:  {{Name: "a", Version: version}, {Name: "b", Version: "1"}},
				xds.ListenerType: {{Name: "l", Version: "1"}},
			})
		}
		ask := func(typeURL string) { m.request(request{typeURL: typeURL}, now) }
		held := func(what, name, want string) {
			t.Helper()
			if got, ok := m.Held(xds.ClusterType, name); got != want || ok != (want != "") {
				t.Errorf("sotw %v, %s: holds %s in version %q, want %q", sotw, what, name, got, want)
			}
		}
		world("1")
		held("before it asked", "a", "")
		ask(xds.ClusterType)
		first, _ := m.next(now)
		held("sent", "a", "")
		m.request(request{typeURL: xds.ClusterType, nonce: first.nonce}, now)
		held("acknowledged", "a", "1")
		m.next(now)
		if m.Settled() {
			t.Errorf("sotw %v: settled before it asked for listeners", sotw)
		}
		ask(xds.ListenerType)
		listeners, _ := m.next(now)
		m.request(request{typeURL: xds.ListenerType, nonce: listeners.nonce}, now)
		if m.next(now); !m.Settled() {
			t.Errorf("sotw %v: not settled", sotw)
		}
		world("2")
		second, _ := m.next(now)
		held("another version sent", "a", "")
		m.request(request{typeURL: xds.ClusterType, nonce: second.nonce, isNACK: true, refused: "a is bad"}, now)
		held("refused", "a", "")
		held("refused, but not for it", "b", "1")
		world("3")
		third, _ := m.next(now)
		m.request(request{typeURL: xds.ClusterType, nonce: third.nonce}, now)
		held("mended", "a", "3")
	}
}

func TestWhatHasBecomeCurrentMeanwhileIsNotSent(t *testing.T) {
	t.Parallel()
	m, now := newMachine(false), time.Unix(0, 0)
	world := func(listener string) {
		m.update(xds.Resources{xds.ClusterType: {{Name: "a", Version: "1"}}, xds.ListenerType: {{Name: "l", Version: listener}}})
	}
	world("1")
	m.request(request{typeURL: xds.ClusterType, subscribe: []string{"*"}}, now)
	clusters, _ := m.next(now)
	m.request(request{typeURL: xds.ListenerType, subscribe: []string{"l"}, initial: map[string]string{"l": "2"}}, now)
	if r, _ := m.next(now); r != nil {
		t.Fatalf("listeners do not wait for clusters: %+v", r)
	}
	world("2")
	m.request(request{typeURL: xds.ClusterType, nonce: clusters.nonce}, now)
	if r, _ := m.next(now); r != nil {
		t.Errorf("sent again: %+v", r)
	}
}

func FuzzMachine(f *testing.F) {
	f.Add([]byte{4, 0, 0, 0, 0, 5, 5, 0, 0, 7, 0, 0, 0, 0, 9, 9, 0, 0}, false)
	f.Add([]byte{4, 0, 0, 2, 1, 1, 0, 0, 5, 0, 1, 5, 5, 0, 0, 8, 0, 8, 4, 0, 0, 9, 0, 0}, true)
	f.Add([]byte{2, 1, 1, 0, 1, 1, 5, 0, 0, 3, 1, 1, 2, 1, 1, 9, 0, 0, 0, 1, 1, 9, 0, 0}, false)
	f.Fuzz(func(t *testing.T, script []byte, sotw bool) {
		if len(script) > 600 {
			return
		}
		newModel(t, sotw).play(script)
	})
}

// FuzzRequest feeds whatever bytes decode as requests to both variants.
func FuzzRequest(f *testing.F) {
	seed, _ := proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResourceNamesSubscribe: []string{"*", "a"}, InitialResourceVersions: map[string]string{"a": "1"}})
	f.Add(seed, seed)
	f.Fuzz(func(t *testing.T, one, two []byte) {
		world := xds.Resources{xds.ClusterType: {{Name: "a", Version: "1"}}, xds.EndpointType: {{Name: "a", Version: "1"}}}
		for _, sotw := range []bool{true, false} {
			m := newMachine(sotw)
			m.update(world)
			for _, raw := range [][]byte{one, two} {
				var d discoveryv3.DeltaDiscoveryRequest
				var s discoveryv3.DiscoveryRequest
				switch {
				case sotw && proto.Unmarshal(raw, &s) == nil:
					m.request(sotwRequest(&s), time.Unix(0, 0))
				case !sotw && proto.Unmarshal(raw, &d) == nil:
					m.request(deltaRequest(&d), time.Unix(0, 0))
				}
				for range 20 {
					r, _ := m.next(time.Unix(0, 0))
					if r == nil {
						break
					}
					m.request(request{typeURL: r.typeURL, nonce: r.nonce}, time.Unix(0, 0))
				}
			}
		}
	})
}

// FuzzAcknowledgement compares the short way of reading with protobuf's.
func FuzzAcknowledgement(f *testing.F) {
	for _, r := range []*discoveryv3.DeltaDiscoveryRequest{
		{TypeUrl: xds.ClusterType, ResponseNonce: "7"},
		{TypeUrl: "another", ResponseNonce: "7"},
		{TypeUrl: xds.ClusterType, ResponseNonce: "7", ResourceNamesSubscribe: []string{"a"}},
		{TypeUrl: xds.ClusterType},
	} {
		seed, _ := proto.Marshal(r)
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		short, ok := new(recentNonce).acknowledgement(raw)
		var r discoveryv3.DeltaDiscoveryRequest
		if !ok || proto.Unmarshal(raw, &r) != nil {
			return
		}
		if long := deltaRequest(&r); !reflect.DeepEqual(short, long) || r.Node != nil {
			t.Errorf("%x: %+v, protobuf says %+v", raw, short, long)
		}
	})
}
