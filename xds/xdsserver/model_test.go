// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// What the model plays with: few names, so that much happens to each. One of them is heavy,
// so that a proxy that does not read stops who sends.
var (
	playedTypes = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, xds.NameTableType}
	playedNames = []string{"a", "b", "c", "heavy"}
)

const probeType = "type.googleapis.com/envoy.test.Probe"

// collective tells whether a type may be asked for as a whole.
func collective(typeURL string) bool { return typeURL != xds.EndpointType && typeURL != xds.RouteType }

// fullAnswers tells whether a SotW answer says all there is of a type.
func fullAnswers(typeURL string) bool {
	return typeURL == xds.ClusterType || typeURL == xds.ListenerType || typeURL == xds.NameTableType
}

// body makes a resource that is different in each version.
func body(typeURL, name string, version int) proto.Message {
	text := fmt.Sprintf("%s-%d", name, version)
	if name == "heavy" {
		text += strings.Repeat("x", 40<<10)
	}
	switch typeURL {
	case xds.ClusterType:
		return &clusterv3.Cluster{Name: name, AltStatName: text}
	case xds.EndpointType:
		return &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{Priority: uint32(version)}}}
	case xds.ListenerType:
		return &listenerv3.Listener{Name: name, StatPrefix: text}
	case xds.RouteType:
		return &routev3.RouteConfiguration{Name: name, InternalOnlyHeaders: []string{text}}
	}
	return &api.NameTable{Table: map[string]*api.NameTable_NameInfo{text: {}}}
}

// stage is two replicas that are told of the same commits, each in its own time, and
// go-control-plane's server, which is told of them too.
type stage struct {
	world    map[string]map[string]int // versions, by type and name
	versions int

	mu  sync.Mutex
	bad map[string]bool // what proxies cannot use, by type and body

	sources []*source
	servers []*xdsserver.Server
	ours    []*grpc.ClientConn

	linear map[string]*cachev3.LinearCache
	theirs *grpc.ClientConn
}

func newStage(t *rapid.T) *stage {
	s := &stage{world: map[string]map[string]int{}, bad: map[string]bool{}, linear: map[string]*cachev3.LinearCache{}}
	for range 2 {
		source := &source{}
		server := xdsserver.New(xdsserver.Config{
			Source: source, Authenticate: func(context.Context) (xdsserver.Peer, error) { return xdsserver.Peer{}, nil },
		})
		g := grpc.NewServer(xdsserver.Options()...)
		server.Register(g)
		s.sources, s.servers, s.ours = append(s.sources, source), append(s.servers, server), append(s.ours, overTCP(t, g))
	}
	mux := &cachev3.MuxCache{
		Classify:      func(r *cachev3.Request) string { return r.GetTypeUrl() },
		ClassifyDelta: func(r *cachev3.DeltaRequest) string { return r.GetTypeUrl() },
		Caches:        map[string]cachev3.Cache{},
	}
	for _, typeURL := range playedTypes {
		s.world[typeURL], s.linear[typeURL] = map[string]int{}, cachev3.NewLinearCache(typeURL)
		mux.Caches[typeURL] = s.linear[typeURL]
	}
	g := grpc.NewServer()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, serverv3.NewServer(ctx, mux, nil))
	s.theirs = overTCP(t, g)
	for replica := range s.sources {
		s.publish(t, replica)
	}
	return s
}

// overTCP serves on a socket, and connects to it with a small window.
func overTCP(t *rapid.T, g *grpc.Server) *grpc.ClientConn {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// commit changes one resource, or takes it away. Replicas are told by publish.
func (s *stage) commit(t *rapid.T, typeURL, name string, gone, unusable bool) {
	if gone {
		delete(s.world[typeURL], name)
		if err := s.linear[typeURL].UpdateResources(nil, []string{name}); err != nil {
			t.Fatal(err)
		}
		return
	}
	s.versions++
	s.world[typeURL][name] = s.versions
	m := body(typeURL, name, s.versions)
	if unusable {
		s.mu.Lock()
		s.bad[typeURL+encoded(m)] = true
		s.mu.Unlock()
	}
	if err := s.linear[typeURL].UpdateResources(map[string]types.Resource{name: m}, nil); err != nil {
		t.Fatal(err)
	}
}

// unusable tells whether proxies refuse a resource.
func (s *stage) unusable(typeURL, body string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bad[typeURL+body]
}

func encoded(m proto.Message) string {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err) // strings of the test's own
	}
	return string(b)
}

// publish lets a replica know of all that was committed.
func (s *stage) publish(t *rapid.T, replica int) {
	resources := xds.Resources{}
	for _, typeURL := range playedTypes {
		var list []xds.Resource
		for _, name := range slices.Sorted(maps.Keys(s.world[typeURL])) {
			r, err := xds.NewResource(name, body(typeURL, name, s.world[typeURL][name]))
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, r)
		}
		resources[typeURL] = list
	}
	s.sources[replica].put(resources)
}

// quiet lets everybody come to rest, and compares everything with everything.
func (s *stage) quiet(t *rapid.T, players []*player) {
	for replica := range s.sources {
		s.publish(t, replica)
	}
	for _, p := range players {
		status := p.rest()
		p.compare(status)
		for replica := range s.ours {
			got := s.whole(t, replica, p.want)
			for typeURL, w := range p.want {
				if want := s.there(typeURL, w); !maps.Equal(got[typeURL], want) {
					t.Errorf("replica %d says of %s %.300q, there is %.300q", replica, typeURL, got[typeURL], want)
				}
			}
		}
		s.consult(t, p.want)
	}
}

// there is what there is of what is wanted: bodies by name.
func (s *stage) there(typeURL string, w *wanted) map[string]string {
	out := map[string]string{}
	for name, version := range s.world[typeURL] {
		if w.covers(name) {
			out[name] = encoded(body(typeURL, name, version))
		}
	}
	return out
}

// whole asks a replica on a fresh SotW stream. Names come last in the order, and are always
// answered: then all has been said.
func (s *stage) whole(t *rapid.T, replica int, want map[string]*wanted) map[string]map[string]string {
	l := openLine(t, s.ours[replica], true)
	defer l.close()
	out, names := map[string]map[string]string{}, map[string][]string{}
	for _, typeURL := range playedTypes {
		if w := want[typeURL]; w != nil {
			names[typeURL] = w.list()
		}
		if typeURL == xds.NameTableType {
			names[typeURL] = append(names[typeURL], "nothing")
		}
		if len(names[typeURL]) > 0 {
			out[typeURL] = map[string]string{}
			l.must(t, request{typeURL: typeURL, names: names[typeURL], node: "whole"})
		}
	}
	for {
		h, err := l.receive()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range h.resources {
			out[h.typeURL][r.name] = r.body
		}
		if h.typeURL == xds.NameTableType {
			return out
		}
		l.must(t, request{typeURL: h.typeURL, nonce: h.nonce, version: h.version, names: names[h.typeURL]})
	}
}

// consult asks go-control-plane the same on a fresh incremental stream.
func (s *stage) consult(t *rapid.T, want map[string]*wanted) {
	l := openLine(t, s.theirs, false)
	defer l.close()
	for typeURL, w := range want {
		there := s.there(typeURL, w)
		if len(there) == 0 {
			continue // it says nothing of what is not there
		}
		l.must(t, request{typeURL: typeURL, subscribe: w.list(), node: "oracle"})
		h, err := l.receive()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, r := range h.resources {
			got[r.name] = r.body
		}
		if h.typeURL != typeURL || !maps.Equal(got, there) {
			t.Errorf("go-control-plane says of %s %.300q, there is %.300q", typeURL, got, there)
		}
	}
}

func TestModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := newStage(t)
		players := []*player{newPlayer(t, s, "delta", false), newPlayer(t, s, "whole", true)}
		one := func(t *rapid.T) *player { return players[rapid.IntRange(0, 1).Draw(t, "proxy")] }
		someType, someName := rapid.SampledFrom(playedTypes), rapid.SampledFrom(playedNames)
		wish := func(t *rapid.T) (typeURL, name string) {
			if typeURL = someType.Draw(t, "type"); collective(typeURL) {
				return typeURL, rapid.SampledFrom(append([]string{"*", "*"}, playedNames...)).Draw(t, "name")
			}
			return typeURL, someName.Draw(t, "name")
		}
		commit := func(t *rapid.T) {
			for range rapid.IntRange(1, 4).Draw(t, "changes") {
				fate := rapid.IntRange(0, 9).Draw(t, "fate")
				s.commit(t, someType.Draw(t, "type"), someName.Draw(t, "name"), fate < 3, fate == 9)
			}
			if to := rapid.IntRange(0, 3).Draw(t, "to"); to > 0 {
				for replica := range s.sources {
					if to == 3 || to == replica+1 {
						s.publish(t, replica)
					}
				}
			}
		}
		subscribe := func(t *rapid.T) {
			typeURL, name := wish(t)
			one(t).change(typeURL, name, true)
		}
		t.Repeat(map[string]func(*rapid.T){
			"commit": commit, "commit again": commit, "subscribe": subscribe, "subscribe again": subscribe,
			"unsubscribe": func(t *rapid.T) {
				typeURL, name := wish(t)
				one(t).change(typeURL, name, false)
			},
			"read slowly": func(t *rapid.T) { one(t).pause(rapid.Bool().Draw(t, "pause")) },
			"reconnect": func(t *rapid.T) {
				one(t).connect(rapid.IntRange(0, 1).Draw(t, "replica"), rapid.Permutation(playedTypes).Draw(t, "order"))
			},
			"quiet": func(t *rapid.T) { s.quiet(t, players) },
		})
		s.quiet(t, players)
	})
}

// eventually waits for a condition. It fails after much longer than any machine takes.
func eventually(t *rapid.T, holds func() bool, otherwise func() string) {
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatal(otherwise())
		}
	}
}
