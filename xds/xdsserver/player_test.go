// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// wanted is what a proxy has asked for.
type wanted struct {
	names map[string]bool
	all   bool
}

func (w *wanted) covers(name string) bool { return w.all || w.names[name] }

func (w *wanted) list() []string {
	out := slices.Sorted(maps.Keys(w.names))
	if w.all {
		out = append(out, "*")
	}
	return out
}

// player is a proxy that takes its time. Its reader goes on by itself while it is not
// paused; what it has said and heard is under mu.
type player struct {
	t     *rapid.T
	stage *stage
	sotw  bool
	name  string

	mu      sync.Mutex
	moving  *sync.Cond
	paused  bool
	line    *line
	replica int
	node    string // another one on each stream
	opened  int
	probes  int
	ended   chan struct{} // closed when the reader is

	want map[string]*wanted
	has  map[string]map[string]taken // by type and name

	// Of this stream: what was sent last under a name, or told of at its beginning; what
	// must be sent although that is current; and what was refused and not taken since.
	story   []string
	told    map[string]map[string]string
	owed    map[string]map[string]bool
	refused map[string]map[string]bool
	nonces  map[string]bool
	warming map[string]bool // clusters
	last    map[string]answered
}

// taken is a resource that a proxy uses.
type taken struct{ version, body string }

// answered is what a SotW proxy repeats in its next request.
type answered struct{ nonce, version string }

func newPlayer(t *rapid.T, s *stage, name string, sotw bool) *player {
	p := &player{t: t, stage: s, sotw: sotw, name: name, want: map[string]*wanted{}, has: map[string]map[string]taken{}, last: map[string]answered{}}
	for _, typeURL := range playedTypes {
		p.has[typeURL] = map[string]taken{}
	}
	p.moving = sync.NewCond(&p.mu)
	t.Cleanup(p.hangUp)
	p.connect(0, playedTypes)
	return p
}

func (p *player) hangUp() {
	if p.line == nil {
		return
	}
	p.line.close()
	p.pause(false)
	<-p.ended
}

func (p *player) pause(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = on
	p.moving.Broadcast()
}

// connect begins a stream with what the proxy has kept, asking for types in some order.
func (p *player) connect(replica int, order []string) {
	p.hangUp()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opened++
	p.replica, p.node, p.ended = replica, fmt.Sprintf("%s-%d", p.name, p.opened), make(chan struct{})
	p.told, p.owed, p.refused, p.nonces = map[string]map[string]string{}, map[string]map[string]bool{}, map[string]map[string]bool{}, map[string]bool{}
	p.warming = map[string]bool{}
	for _, typeURL := range playedTypes {
		p.told[typeURL], p.owed[typeURL], p.refused[typeURL] = map[string]string{}, map[string]bool{}, map[string]bool{}
		p.last[typeURL] = answered{version: p.last[typeURL].version}
	}
	p.line = openLine(p.t, p.stage.ours[replica], p.sotw)
	p.send(request{typeURL: "type.googleapis.com/envoy.test.Hello", subscribe: []string{"x"}, names: []string{"x"}, node: p.node})
	for _, typeURL := range order {
		w := p.want[typeURL]
		if w == nil || !w.all && len(w.names) == 0 {
			delete(p.want, typeURL)
			clear(p.has[typeURL])
			continue
		}
		initial := map[string]string{}
		for name, r := range p.has[typeURL] {
			initial[name], p.told[typeURL][name] = r.version, r.version
		}
		p.send(request{typeURL: typeURL, subscribe: w.list(), initial: initial, names: w.list(), version: p.last[typeURL].version})
	}
	go p.listen(p.line, p.ended)
}

// listen reads and answers.
func (p *player) listen(l *line, ended chan struct{}) {
	defer close(ended)
	for {
		p.mu.Lock()
		for p.paused {
			p.moving.Wait()
		}
		p.mu.Unlock()
		h, err := l.receive()
		if status.Code(err) == codes.Canceled {
			return // hung up
		}
		if err != nil {
			p.t.Errorf("%s: %v", p.name, err)
			return
		}
		p.mu.Lock()
		p.hear(h)
		p.mu.Unlock()
	}
}

// change begins or ends to want a name, or everything.
func (p *player) change(typeURL, name string, on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.want[typeURL]
	if w == nil {
		if !on {
			return // there is nothing that could be ended
		}
		w = &wanted{names: map[string]bool{}}
		p.want[typeURL] = w
	}
	covered := w.covers(name)
	r := request{typeURL: typeURL, nonce: p.last[typeURL].nonce, version: p.last[typeURL].version}
	switch {
	case name == "*":
		w.all = on
	case on:
		w.names[name] = true
	default:
		delete(w.names, name)
	}
	if on {
		r.subscribe = []string{name}
	} else {
		r.unsubscribe = []string{name}
	}
	for _, n := range playedNames {
		if !w.covers(n) {
			if _, ok := p.has[typeURL][n]; ok { // what it has is no version any more
				r.version, p.last[typeURL] = "", answered{nonce: p.last[typeURL].nonce}
			}
			delete(p.has[typeURL], n)
			delete(p.told[typeURL], n)
			delete(p.refused[typeURL], n)
		} else if n == name || name == "*" && on {
			p.owed[typeURL][n] = on || covered
			if on && !p.sotw {
				delete(p.has[typeURL], n) // D2: whoever asks again may have forgotten
			}
		}
	}
	r.names = w.list()
	if !p.sotw {
		r.nonce = "" // a question, not an answer
	}
	p.send(r)
}

// send leaves it to the reader to see that a stream has ended.
func (p *player) send(r request) {
	what := fmt.Sprintf("asks for %s: %q, +%q -%q, has %d", letters[r.typeURL], r.names, r.subscribe, r.unsubscribe, len(r.initial))
	if r.nonce != "" {
		what += fmt.Sprintf(", answers %s, refuses %q", r.nonce, r.refuse)
	}
	p.remember(what)
	_ = p.line.send(r)
}

// remember keeps what happened lately, to be told when something is wrong.
func (p *player) remember(what string) {
	if p.story = append(p.story, what); len(p.story) > 60 {
		p.story = p.story[1:]
	}
}

// wrong fails the test.
func (p *player) wrong(format string, args ...any) {
	p.t.Errorf("%s: %s\n\t%s", p.node, fmt.Sprintf(format, args...), strings.Join(p.story, "\n\t"))
}

// hear takes a response in, and answers it.
func (p *player) hear(h heard) {
	what := fmt.Sprintf("gets %s %s:", letters[h.typeURL], h.nonce)
	for _, r := range h.resources {
		what += fmt.Sprintf(" %s=%.9q", r.name, r.body[2+len(r.name):])
	}
	p.remember(fmt.Sprintf("%s, without %q", what, h.removed))
	if p.nonces[h.nonce] || h.nonce == "" {
		p.wrong("nonce %q has been there before", h.nonce)
	}
	p.nonces[h.nonce] = true
	w := p.want[h.typeURL]
	if w == nil {
		w = &wanted{}
	}
	answer := request{typeURL: h.typeURL, nonce: h.nonce, version: h.version, names: w.list()}
	kept, seen := map[string]taken{}, map[string]bool{}
	for _, r := range h.resources {
		if seen[r.name] {
			p.wrong("W8, D8: %s %s is twice in one response", h.typeURL, r.name)
		}
		seen[r.name] = true
		if h.typeURL == xds.ClusterType {
			p.warming[r.name] = true
		}
		if !w.covers(r.name) {
			continue // asked for once, not wanted any more
		}
		p.judge(h.typeURL, r)
		if p.stage.unusable(h.typeURL, r.body) {
			answer.refuse = append(answer.refuse, r.name)
			p.refused[h.typeURL][r.name] = true
			if old, ok := p.has[h.typeURL][r.name]; ok {
				kept[r.name] = old
			}
			continue
		}
		delete(p.refused[h.typeURL], r.name)
		kept[r.name] = taken{r.version, r.body}
	}
	if p.sotw && fullAnswers(h.typeURL) {
		clear(p.has[h.typeURL])
	}
	maps.Copy(p.has[h.typeURL], kept)
	for _, name := range h.removed {
		if seen[name] {
			p.wrong("D8: %s %s is sent and removed in one response", h.typeURL, name)
		}
		delete(p.has[h.typeURL], name)
		delete(p.told[h.typeURL], name)
	}
	p.last[h.typeURL] = answered{h.nonce, h.version}
	if len(answer.refuse) > 0 {
		// What was usable is in use (gRFC A46): the proxy has no version any more.
		p.last[h.typeURL] = answered{nonce: h.nonce}
		answer.version = ""
	}
	p.send(answer)
}

// judge sees that nothing is sent that the proxy has already, unless it asked again, or a
// cluster that was sent waits for it.
func (p *player) judge(typeURL string, r sent) {
	if p.sotw {
		return
	}
	warming := typeURL == xds.EndpointType && p.warming[r.name]
	if p.told[typeURL][r.name] == r.version && !p.owed[typeURL][r.name] && !warming {
		p.wrong("D6: %s %s is sent again in version %s", typeURL, r.name, r.version)
	}
	p.told[typeURL][r.name] = r.version
}

// rest waits until the server has nothing to say and has heard all that the proxy said.
func (p *player) rest() xdsserver.ProxyStatus {
	p.pause(false)
	p.mu.Lock()
	p.probes++
	probe := fmt.Sprintf("%s%d", probeType, p.probes)
	p.send(request{typeURL: probe, subscribe: []string{"x"}, names: []string{"x"}})
	p.mu.Unlock()
	var found xdsserver.ProxyStatus
	eventually(p.t, func() bool {
		for _, s := range p.stage.servers[p.replica].Proxies() {
			if found = s; s.Node == p.node && s.Synced {
				return slices.ContainsFunc(s.Types, func(t xdsserver.TypeStatus) bool { return t.TypeURL == probe })
			}
		}
		return false
	}, func() string { return fmt.Sprintf("%s does not come to rest: %+v", p.node, found) })
	return found
}

// compare wants the proxy to have what the replicas say there is.
func (p *player) compare(status xdsserver.ProxyStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, typeURL := range playedTypes {
		clear(p.owed[typeURL])
		w := p.want[typeURL]
		if w == nil {
			continue
		}
		there := p.stage.there(typeURL, w)
		for name := range there {
			if p.stage.unusable(typeURL, there[name]) {
				p.blamed(status, typeURL, name)
				delete(there, name)
				continue
			}
			if got := p.has[typeURL][name]; got.body != there[name] {
				p.wrong("%s %s is %.40q, should be %.40q", typeURL, name, got.body, there[name])
			}
		}
		for name, got := range p.has[typeURL] {
			_, exists := p.stage.world[typeURL][name]
			if _, ok := there[name]; !ok && !exists && !(p.sotw && !fullAnswers(typeURL)) {
				p.wrong("still has %s %s, %.40q", typeURL, name, got.body)
			}
		}
	}
}

// blamed wants a resource that the proxy could not use to be named.
func (p *player) blamed(status xdsserver.ProxyStatus, typeURL, name string) {
	if !p.refused[typeURL][name] {
		p.wrong("was never sent %s %s", typeURL, name)
	}
	for _, of := range status.Types {
		if of.TypeURL == typeURL && slices.ContainsFunc(of.Refused, func(r xdsserver.Refusal) bool { return slices.Contains(r.Resources, name) }) {
			return
		}
	}
	p.wrong("D10: nothing is known of the refused %s %s: %+v", typeURL, name, status.Types)
}

// request of either variant.
type request struct {
	typeURL, nonce, node   string
	refuse                 []string          // names of what is wrong
	subscribe, unsubscribe []string          // delta
	initial                map[string]string // delta
	names                  []string          // SotW
	version                string            // SotW
}

func (r request) problem() *statuspb.Status {
	if len(r.refuse) == 0 {
		return nil
	}
	return &statuspb.Status{Message: "cannot use " + strings.Join(r.refuse, ", ")}
}

// heard is a response of either variant.
type heard struct {
	typeURL, nonce, version string
	resources               []sent
	removed                 []string
}

type sent struct{ name, version, body string }

// line is a stream of either variant.
type line struct {
	sotw  discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	delta discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	close func()
}

func openLine(t *rapid.T, conn *grpc.ClientConn, sotw bool) *line {
	ctx, cancel := context.WithCancel(context.Background())
	l, client, err := &line{close: cancel}, discoveryv3.NewAggregatedDiscoveryServiceClient(conn), error(nil)
	if sotw {
		l.sotw, err = client.StreamAggregatedResources(ctx)
	} else {
		l.delta, err = client.DeltaAggregatedResources(ctx)
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	return l
}

func (l *line) must(t *rapid.T, r request) {
	if err := l.send(r); err != nil {
		t.Fatal(err)
	}
}

func (l *line) send(r request) error {
	var node *corev3.Node
	if r.node != "" {
		node = &corev3.Node{Id: r.node}
	}
	if l.sotw != nil {
		return l.sotw.Send(&discoveryv3.DiscoveryRequest{
			Node: node, TypeUrl: r.typeURL, ResponseNonce: r.nonce, VersionInfo: r.version, ResourceNames: r.names, ErrorDetail: r.problem(),
		})
	}
	return l.delta.Send(&discoveryv3.DeltaDiscoveryRequest{
		Node: node, TypeUrl: r.typeURL, ResponseNonce: r.nonce, ErrorDetail: r.problem(),
		ResourceNamesSubscribe: r.subscribe, ResourceNamesUnsubscribe: r.unsubscribe, InitialResourceVersions: r.initial,
	})
}

func (l *line) receive() (h heard, err error) {
	if l.sotw != nil {
		r, err := l.sotw.Recv()
		if err != nil {
			return h, err
		}
		h = heard{typeURL: r.TypeUrl, nonce: r.Nonce, version: r.VersionInfo}
		for _, res := range r.Resources {
			if r.TypeUrl == xds.NameTableType {
				h.resources = append(h.resources, parts(res)...)
				continue
			}
			h.resources = append(h.resources, sent{name: nameOf(res), body: string(res.Value)})
		}
		return h, nil
	}
	r, err := l.delta.Recv()
	if err != nil {
		return h, err
	}
	h = heard{typeURL: r.TypeUrl, nonce: r.Nonce, removed: r.RemovedResources}
	for _, res := range r.Resources {
		h.resources = append(h.resources, sent{res.Name, res.Version, string(res.Resource.GetValue())})
	}
	return h, nil
}

// parts are the name tables of which one consists.
func parts(a *anypb.Any) (out []sent) {
	table := &api.NameTable{}
	if err := a.UnmarshalTo(table); err != nil {
		return []sent{{name: err.Error()}}
	}
	for text, info := range table.Table {
		name, _, _ := strings.Cut(text, "-")
		body, _ := proto.Marshal(&api.NameTable{Table: map[string]*api.NameTable_NameInfo{text: info}})
		out = append(out, sent{name: name, body: string(body)})
	}
	return out
}

// nameOf finds the name of a resource in its body.
func nameOf(a *anypb.Any) string {
	m, err := a.UnmarshalNew()
	if err != nil {
		return err.Error()
	}
	return cachev3.GetResourceName(m)
}
