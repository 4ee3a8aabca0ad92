// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"maps"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/xds"
)

// Bounds of the machine.
const (
	// responseBytes is where an incremental response ends and another one begins: clients
	// built on grpc-go refuse messages above 4 MiB unless told otherwise.
	responseBytes = 2 << 20

	// gateTime is how long an unanswered response holds back what comes after it in the
	// order, so that a proxy that is stuck in one type is not frozen in all.
	gateTime = 5 * time.Second

	// keptRefusals is how many refused responses are remembered per type.
	keptRefusals = 8
)

const wildcardName = "*"

// request is a discovery request of either variant.
type request struct {
	typeURL string
	nonce   string
	refused string // error_detail's message; empty for an ACK
	isNACK  bool

	names   []string // SotW: all names
	version string   // SotW: version_info

	subscribe, unsubscribe []string // delta
	initial                map[string]string
}

// response is what is to be sent, not yet in the form of either variant.
type response struct {
	typeURL   string
	nonce     string
	version   string // SotW
	resources []xds.Resource
	removed   []string    // delta
	whole     *difference // delta: it is this, for whoever it is sent to
	size      int         // about how many bytes it has
}

// names are those of what is sent and taken away. They are shared.
func (r *response) names() []string {
	if r.whole != nil {
		return r.whole.names
	}
	out := make([]string, 0, len(r.resources)+len(r.removed))
	for _, res := range r.resources {
		out = append(out, res.Name)
	}
	return append(out, r.removed...)
}

// refusal is a response that the proxy did not accept.
type refusal struct {
	at      time.Time
	names   []string // of the resources that its message names, else of all
	message string
}

// machine is the state of one stream.
type machine struct {
	sotw      bool
	resources xds.Resources
	subs      map[string]*subscription
	all       []*subscription          // the same
	core      [coreTypes]*subscription // those of the core types
	others    []*subscription          // those of no core type that are served, ordered
	nonces    uint64
	diffs     *differences

	// recluster are the clusters that were sent on this stream before it asked for
	// endpoints.
	recluster map[string]bool
}

// subscription is what the proxy wants of one type, and what it has.
type subscription struct {
	typeURL  string
	wildcard bool
	named    bool // a name was once given: from then on no name means nothing
	names    names
	held     holding         // as far as was sent; bodies may be missing
	force    map[string]bool // to be sent again, or said to be missing, whatever it has
	answer   bool            // asked, and not answered at all yet
	dirty    bool            // may lack something
	fresh    []xds.Resource  // what it lacks, while not dirty
	gone     []string        // what it has and should not, while not dirty
	whole    *difference     // what fresh and gone are, while not dirty and if they are all of it

	lastNonce string
	inFlight  string
	inBytes   int // of what is in flight
	sentAt    time.Time
	sentNames []string
	ackedAt   time.Time
	acks      uint64
	refusals  []refusal
}

func newMachine(sotw bool) *machine {
	return &machine{sotw: sotw, subs: map[string]*subscription{}, diffs: &differences{}}
}

// wants tells whether the proxy has asked for a name.
func (s *subscription) wants(name string) bool { return s.wildcard || s.names.has(name) }

// has finds what the proxy has under a name.
func (s *subscription) has(name string) (xds.Resource, bool) {
	if !s.wants(name) {
		return xds.Resource{}, false
	}
	return s.held.get(name)
}

// must makes a name be sent, or be said to be missing.
func (s *subscription) must(name string) {
	if s.force == nil {
		s.force = map[string]bool{}
	}
	s.force[name] = true
	s.dirty = true
}

// want adds a name, of which the proxy has nothing yet.
func (s *subscription) want(name string) {
	if !s.wants(name) {
		s.held.remove(name)
	}
	s.names.put(name, true)
}

// collection tells whether "no name" means all of a type, as it was before "*" existed.
func collection(typeURL string) bool {
	return typeURL != xds.EndpointType && typeURL != xds.RouteType
}

// served tells whether requests of a type are answered at all. Others are remembered:
// agents send reports under type URLs of their own.
func served(typeURL string) bool {
	return typeURL == xds.NameTableType || strings.HasPrefix(typeURL, "type.googleapis.com/envoy.")
}

// update replaces what there is to be had.
func (m *machine) update(r xds.Resources) {
	for _, sub := range m.all {
		if !sameList(m.resources[sub.typeURL], r[sub.typeURL]) {
			sub.dirty = true
		}
	}
	m.resources = r
}

// sameList compares by identity: lists are immutable and shared.
func sameList(a, b []xds.Resource) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// request takes in what the proxy says.
func (m *machine) request(r request, now time.Time) {
	sub, first := m.subs[r.typeURL], false
	if sub == nil {
		first = true
		sub = &subscription{typeURL: r.typeURL, answer: true}
		m.subs[r.typeURL] = sub
		m.all = append(m.all, sub)
		if i := slices.Index(coreOrder[:], r.typeURL); i >= 0 {
			m.core[i] = sub
		} else if served(r.typeURL) {
			m.others = append(m.others, sub)
			sort.Slice(m.others, func(i, j int) bool { return m.others[i].typeURL < m.others[j].typeURL })
		}
	}
	if !first && r.nonce != "" && r.nonce == sub.inFlight {
		sub.acknowledge(r, now)
	}
	if m.sotw {
		m.subscribeAll(sub, r, first)
	} else {
		m.subscribeSome(sub, r, first)
	}
	sub.dirty = true
}

// acknowledge notes how the response in flight was taken. A refused one counts as sent:
// the proxy keeps what it had, and is told again only when there is something new.
func (s *subscription) acknowledge(r request, now time.Time) {
	if r.isNACK {
		names := blamed(s.sentNames, r.refused)
		s.forget(names)
		s.refusals = append(s.refusals, refusal{at: now, names: names, message: r.refused})
		if len(s.refusals) > keptRefusals {
			s.refusals = slices.Delete(s.refusals, 0, 1)
		}
	} else {
		s.acks++
		s.ackedAt = now
		s.forget(s.sentNames)
	}
	s.inFlight, s.inBytes, s.sentNames = "", 0, nil
}

// forget drops refusals of resources about which there is newer word, all of them.
func (s *subscription) forget(names []string) {
	s.refusals = slices.DeleteFunc(s.refusals, func(f refusal) bool {
		return len(f.names) > 0 && !slices.ContainsFunc(f.names, func(n string) bool { return !slices.Contains(names, n) })
	})
}

// blamed are the names that a refusal mentions, else all.
func blamed(names []string, message string) []string {
	var out []string
	for _, n := range names {
		if mentions(message, n) {
			out = append(out, n)
		}
	}
	if len(out) == 0 {
		return names
	}
	return out
}

// mentions tells whether a name stands in a text by itself, not as a part of another.
func mentions(text, name string) bool {
	const inside = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-|"
	for from := 0; name != ""; {
		i := strings.Index(text[from:], name)
		if i < 0 {
			return false
		}
		start, end := from+i, from+i+len(name)
		before := start == 0 || !strings.ContainsRune(inside+".", rune(text[start-1]))
		after := end == len(text) || !strings.ContainsRune(inside, rune(text[end]))
		if before && after {
			return true
		}
		from = start + 1
	}
	return false
}

// subscribeAll applies a SotW request: its names replace those before. They count even if
// its nonce is stale, since they would be lost otherwise (envoy#10363).
func (m *machine) subscribeAll(s *subscription, r request, first bool) {
	if len(r.names) == 0 && !s.named {
		s.wildcard = collection(s.typeURL)
	} else {
		s.named = true
		s.replaceNames(r.names)
	}
	// A proxy that comes back with the very same whole is current. Versions are hashes of
	// content, so a restart cannot make them equal by accident.
	if first && s.wildcard && r.version != "" && r.version == setVersion(m.resources[s.typeURL]) {
		s.held.rebase(m.resources[s.typeURL])
		s.answer = false
	}
}

// replaceNames makes the proxy want these names only.
func (s *subscription) replaceNames(list []string) {
	wanted := make(map[string]bool, len(list))
	for _, n := range list {
		if n != wildcardName {
			wanted[n] = true
		}
	}
	for n := range wanted {
		if !s.names.has(n) {
			s.want(n)
			s.must(n)
		}
	}
	for _, n := range slices.Collect(s.names.each) {
		if !wanted[n] {
			s.names.put(n, false)
			delete(s.force, n)
		}
	}
	s.setWildcard(slices.Contains(list, wildcardName))
}

// setWildcard makes the proxy want everything, or its names only.
func (s *subscription) setWildcard(on bool) {
	if on && !s.wildcard {
		s.held.keep(s.names.has) // it has kept nothing else
	}
	s.wildcard = on
}

// subscribeSome applies a delta request.
func (m *machine) subscribeSome(s *subscription, r request, first bool) {
	if first {
		s.held.claim(r.initial, m.resources[s.typeURL])
		if m.subscribeAtOnce(s, r) {
			return
		}
		if len(r.subscribe) == 0 && len(r.unsubscribe) == 0 {
			s.wildcard = collection(s.typeURL)
		}
	}
	for _, n := range r.subscribe {
		s.named = true
		if n == wildcardName {
			if !first || s.wildcard {
				m.forgetVersions(s)
			}
			if first {
				s.wildcard = true // and what it says to have is part of that
			} else {
				s.setWildcard(true)
			}
			s.answer = true
			continue
		}
		if first {
			s.names.put(n, true) // it may have said that it has it
		} else {
			s.want(n)
		}
		if !first || !m.knows(s, n) {
			s.must(n)
		}
	}
	for _, n := range r.unsubscribe {
		s.unsubscribe(n)
	}
	if first && len(r.initial) > 0 {
		s.answer = false
	}
	if first && s.typeURL == xds.EndpointType {
		m.recluster = nil // from now on clusters say themselves what they need
	}
}

// subscribeAtOnce applies a first request for exactly the names that there are, as Envoy
// asks for the endpoints of all clusters and the routes of all listeners; false if it is
// another one. It does what subscribeSome does, and shares what all who ask so have.
func (m *machine) subscribeAtOnce(s *subscription, r request) bool {
	list := m.resources[s.typeURL]
	if len(r.subscribe) != len(list) || len(list) == 0 || len(r.unsubscribe) > 0 || len(r.initial) > 0 && len(m.recluster) > 0 {
		return false
	}
	asked := make([]bool, len(list))
	for _, name := range r.subscribe {
		i := sort.Search(len(list), func(i int) bool { return list[i].Name >= name })
		if i == len(list) || list[i].Name != name || asked[i] {
			return false
		}
		asked[i] = true
	}
	s.named, s.names = true, names{common: m.diffs.between(nil, list).names}
	if len(r.initial) > 0 {
		s.answer = false
	}
	if s.typeURL == xds.EndpointType {
		m.recluster = nil // from now on clusters say themselves what they need
	}
	return true
}

// knows tells whether a returning proxy says to have a resource, so that only another
// version needs sending. Endpoints of a cluster that was sent on this stream always do: the
// cluster waits for them.
func (m *machine) knows(s *subscription, name string) bool {
	_, ok := s.has(name)
	return ok && !(s.typeURL == xds.EndpointType && m.recluster[name])
}

func (m *machine) forgetVersions(s *subscription) {
	for _, r := range s.held.among(s.wants) {
		r.Version = ""
		s.held.set(r)
	}
}

func (s *subscription) unsubscribe(name string) {
	if name == wildcardName {
		s.setWildcard(false)
		s.named = true
		return
	}
	if !s.names.has(name) {
		return
	}
	s.names.put(name, false)
	if s.wildcard {
		s.must(name) // still covered: it is told what it has now
		return
	}
	delete(s.force, name)
}

// A phase is one step of the order in which changes go out: what is new before what uses
// it, what is old after. Names come after the listeners that serve them, and before these
// are taken away.
type phase struct {
	core     int // which of the core types; coreTypes means every other type
	removals bool

	// open phases do not hold back the next one: Envoy acknowledges clusters only when
	// they are warm, and they warm by their endpoints.
	open bool
}

// coreOrder is the order of the types that depend on each other.
var coreOrder = [coreTypes]string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType}

const (
	coreClusters = iota
	coreEndpoints
	coreListeners
	coreRoutes
	coreTypes
)

var phases = []phase{
	{coreClusters, false, true},
	{coreEndpoints, false, false},
	{coreListeners, false, false},
	{coreRoutes, false, false},
	{coreTypes, false, false},
	{coreListeners, true, false},
	{coreRoutes, true, false},
	{coreClusters, true, false},
	{coreEndpoints, true, false},
}

// next is the response to send now, if any. Otherwise, if something is held back, again
// is when to ask at the latest.
func (m *machine) next(now time.Time) (out *response, again time.Time) {
	held := false
	for i := range phases {
		ph := &phases[i]
		subs := m.others
		if ph.core < coreTypes {
			if subs = m.core[ph.core : ph.core+1]; subs[0] == nil {
				subs = nil
			}
		}
		for _, sub := range subs {
			if sub.inFlight == "" {
				if r := m.respond(sub, ph.removals, now); r != nil {
					return r, time.Time{}
				}
				continue
			}
			if until := sub.sentAt.Add(gateTime); now.Before(until) {
				held = true
				if again.IsZero() || until.Before(again) {
					again = until
				}
			}
		}
		if held && !ph.open {
			if !m.holdsBack() {
				again = time.Time{}
			}
			return nil, again
		}
	}
	return nil, time.Time{}
}

// holdsBack tells whether there is anything that an answer is waited with.
func (m *machine) holdsBack() bool {
	for _, s := range m.all {
		if s.inFlight == "" && (s.dirty || s.answer || len(s.fresh)+len(s.gone)+len(s.force) > 0) {
			return true
		}
	}
	return false
}

// unanswered is how many bytes are in flight.
func (m *machine) unanswered() int {
	n := 0
	for _, s := range m.all {
		n += s.inBytes
	}
	return n
}

// respond makes the response of one phase to one type, nil if it lacks nothing.
func (m *machine) respond(s *subscription, removals bool, now time.Time) *response {
	if s.dirty {
		m.compare(s)
	}
	other := !coreType(s.typeURL)
	fresh, gone := s.fresh, s.gone
	switch {
	case other: // additions and removals at once
	case removals:
		fresh = nil
	default:
		gone = m.missing(s)
	}
	if m.sotw && !wholeSet(s.typeURL) {
		if s.drop(gone); s.dirty {
			m.compare(s)
		}
		gone = nil
	}
	first := s.answer && !removals && (s.wildcard || m.sotw && wholeSet(s.typeURL) && !s.names.empty())
	if len(fresh) == 0 && len(gone) == 0 && !first {
		return nil
	}
	if m.sotw {
		return m.whole(s, fresh, removals || other, now)
	}
	return m.difference(s, fresh, gone, now)
}

func coreType(typeURL string) bool {
	switch typeURL {
	case xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType:
		return true
	}
	return false
}

// wholeSet tells whether a SotW response of the type says what there is altogether.
func wholeSet(typeURL string) bool {
	return typeURL == xds.ClusterType || typeURL == xds.ListenerType || typeURL == xds.NameTableType
}

// compare finds what the proxy lacks, and what it has too much.
func (m *machine) compare(s *subscription) {
	list := m.resources[s.typeURL]
	d := m.diffs.between(s.held.base, list)
	s.dirty, s.fresh, s.gone, s.whole = false, nil, nil, nil
	if len(s.held.over) == 0 && len(s.force) == 0 {
		s.fresh, s.gone = d.changed, d.gone
		if !s.wildcard && !s.names.are(d.names) {
			s.fresh, s.gone = only(d.changed, s.wants), onlyNames(d.gone, s.wants)
		}
		if len(s.gone) == 0 && len(s.fresh) > 0 && sameList(s.fresh, d.changed) {
			s.whole = d
		}
	} else {
		m.compareNames(s, candidates(s, d))
	}
	if len(s.fresh) == 0 && len(s.gone) == 0 {
		s.settle(m.diffs, list)
	}
}

// candidates are the names that may have to be sent or taken away, ordered.
func candidates(s *subscription, d *difference) []string {
	out := make([]string, 0, len(d.changed)+len(d.gone)+len(s.held.over)+len(s.force))
	for _, r := range d.changed {
		out = append(out, r.Name)
	}
	out = append(out, d.gone...)
	out = slices.AppendSeq(out, maps.Keys(s.held.over))
	out = slices.AppendSeq(out, maps.Keys(s.force))
	slices.Sort(out)
	return slices.Compact(out)
}

func (m *machine) compareNames(s *subscription, candidates []string) {
	for _, n := range candidates {
		if !s.wants(n) {
			continue
		}
		r, exists := m.resources.Get(s.typeURL, n)
		has, had := s.held.get(n)
		switch {
		case exists && (!had || has.Version != r.Version || s.force[n]):
			s.fresh = append(s.fresh, r)
		case !exists && (had || s.force[n]):
			s.gone = append(s.gone, n)
		}
	}
}

// only are the resources that are wanted; if these are all, it is the very same list.
func only(list []xds.Resource, wanted func(string) bool) []xds.Resource {
	for i, r := range list {
		if wanted(r.Name) {
			continue
		}
		out := slices.Clone(list[:i])
		for _, r := range list[i+1:] {
			if wanted(r.Name) {
				out = append(out, r)
			}
		}
		return out
	}
	return list
}

func onlyNames(list []string, wanted func(string) bool) []string {
	var out []string
	for _, n := range list {
		if wanted(n) {
			out = append(out, n)
		}
	}
	return out
}

// settle notes that the proxy has all that it wants of a list.
func (s *subscription) settle(d *differences, list []xds.Resource) {
	s.held.rebase(list)
	s.force = nil
	d.share(&s.names)
}

// missing are names that were asked for and do not exist: that is an answer, not a
// removal, so it does not wait for the others.
func (m *machine) missing(s *subscription) []string {
	var out []string
	for _, n := range s.gone {
		if _, had := s.has(n); s.force[n] && !had {
			out = append(out, n)
		}
	}
	return out
}

func (s *subscription) drop(names []string) {
	if len(names) == 0 {
		return
	}
	for _, n := range names {
		s.held.remove(n)
		delete(s.force, n)
	}
	s.dirty = true
}

// difference is a delta response.
func (m *machine) difference(s *subscription, fresh []xds.Resource, gone []string, now time.Time) *response {
	if s.whole != nil && len(fresh) == len(s.fresh) && len(gone) == 0 {
		if r := s.whole.response(s.typeURL); r != nil {
			m.note(s, fresh)
			return m.fly(s, r, now)
		}
	}
	size := 0
	for i, r := range fresh {
		if size+len(r.Body) > responseBytes && i > 0 {
			fresh = fresh[:i]
			break
		}
		size += len(r.Body)
	}
	r := &response{typeURL: s.typeURL, resources: fresh, removed: gone, size: size}
	m.note(s, fresh)
	s.drop(gone)
	return m.fly(s, r, now)
}

// whole is a SotW response. Types that are told as a whole keep what is to be removed
// until its turn comes.
func (m *machine) whole(s *subscription, fresh []xds.Resource, removals bool, now time.Time) *response {
	m.note(s, fresh)
	out := fresh
	if wholeSet(s.typeURL) {
		for _, n := range m.missing(s) {
			delete(s.force, n) // its absence is the answer
		}
		if removals {
			s.drop(slices.Clone(s.gone))
		}
		out = s.held.among(s.wants)
	}
	size := 0
	for i := range out {
		size += len(out[i].Body)
	}
	return m.fly(s, &response{typeURL: s.typeURL, resources: out, version: setVersion(out), size: size}, now)
}

// note records what is being sent. A cluster that is sent waits for its endpoints, even
// if these did not change and Envoy does not ask again (envoy#13009).
func (m *machine) note(s *subscription, fresh []xds.Resource) {
	if s.typeURL == xds.ClusterType {
		m.recluster = m.await(fresh)
	}
	if len(fresh) == len(s.fresh) && len(s.gone) == 0 {
		s.settle(m.diffs, m.resources[s.typeURL])
		s.fresh, s.whole = nil, nil
		return
	}
	for _, r := range fresh {
		s.held.set(r)
		delete(s.force, r.Name)
	}
	s.dirty = true
}

// await makes the endpoints of clusters be sent. Before they are asked for, it returns the
// clusters that will need them.
func (m *machine) await(clusters []xds.Resource) map[string]bool {
	endpoints := m.subs[xds.EndpointType]
	for _, r := range clusters {
		switch {
		case endpoints == nil:
			if m.recluster == nil {
				m.recluster = make(map[string]bool, len(clusters))
			}
			m.recluster[r.Name] = true
		case endpoints.wants(r.Name):
			endpoints.must(r.Name)
		}
	}
	return m.recluster
}

func (m *machine) fly(s *subscription, r *response, now time.Time) *response {
	if r.nonce == "" {
		m.nonces++
		r.nonce = strconv.FormatUint(m.nonces, 36)
	}
	s.lastNonce, s.inFlight, s.inBytes, s.sentAt, s.answer = r.nonce, r.nonce, r.size, now, false
	s.sentNames = r.names()
	return r
}
