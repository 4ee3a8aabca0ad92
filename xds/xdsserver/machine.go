// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
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
	removed   []string // delta
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
	nonces    uint64

	// recluster are the clusters that were sent on this stream.
	recluster map[string]bool
}

// subscription is what the proxy wants of one type, and what it has.
type subscription struct {
	typeURL  string
	wildcard bool
	named    bool // a name was once given: from then on no name means nothing
	names    map[string]bool
	sent     map[string]xds.Resource // what it has, as far as was sent; bodies may be missing
	force    map[string]bool         // to be sent again, or said to be missing, whatever it has
	answer   bool                    // asked, and not answered at all yet
	dirty    bool                    // may lack something
	fresh    []xds.Resource          // what it lacks, while not dirty
	gone     []string                // what it has and should not, while not dirty

	lastNonce string
	inFlight  string
	sentAt    time.Time
	sentNames []string
	ackedAt   time.Time
	acks      uint64
	refusals  []refusal
}

func newMachine(sotw bool) *machine {
	return &machine{
		sotw: sotw, subs: map[string]*subscription{},
		recluster: map[string]bool{},
	}
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
	for typeURL, sub := range m.subs {
		if !sameList(m.resources[typeURL], r[typeURL]) {
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
		sub = &subscription{typeURL: r.typeURL, names: map[string]bool{}, sent: map[string]xds.Resource{}, force: map[string]bool{}, answer: true}
		m.subs[r.typeURL] = sub
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
		s.refusals = append(s.refusals, refusal{at: now, names: blamed(s.sentNames, r.refused), message: r.refused})
		if len(s.refusals) > keptRefusals {
			s.refusals = slices.Delete(s.refusals, 0, 1)
		}
	} else {
		s.acks++
		s.ackedAt = now
		s.forgive()
	}
	s.inFlight, s.sentNames = "", nil
}

// forgive drops refusals of resources that have been accepted since.
func (s *subscription) forgive() {
	s.refusals = slices.DeleteFunc(s.refusals, func(f refusal) bool {
		return len(f.names) > 0 && !slices.ContainsFunc(f.names, func(n string) bool { return !slices.Contains(s.sentNames, n) })
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
		wanted := make(map[string]bool, len(r.names))
		for _, n := range r.names {
			if n != wildcardName {
				wanted[n] = true
			}
		}
		s.wildcard = slices.Contains(r.names, wildcardName)
		for n := range wanted {
			if !s.names[n] {
				s.force[n] = true
			}
		}
		for n := range s.sent {
			if !wanted[n] && !s.wildcard {
				delete(s.sent, n)
				delete(s.force, n)
			}
		}
		s.names = wanted
	}
	// A proxy that comes back with the very same whole is current. Versions are hashes of
	// content, so a restart cannot make them equal by accident.
	if first && s.wildcard && r.version != "" && r.version == setVersion(m.resources[s.typeURL]) {
		for _, res := range m.resources[s.typeURL] {
			s.sent[res.Name] = res
		}
		s.answer = false
	}
}

// subscribeSome applies a delta request.
func (m *machine) subscribeSome(s *subscription, r request, first bool) {
	if first {
		for name, version := range r.initial {
			s.sent[name] = xds.Resource{Name: name, Version: version}
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
			s.wildcard = true
			s.answer = true
			continue
		}
		s.names[n] = true
		if !first || !m.current(s, n) {
			s.force[n] = true
		}
	}
	for _, n := range r.unsubscribe {
		s.unsubscribe(n)
	}
	if !s.wildcard {
		for n := range s.sent {
			if !s.names[n] {
				delete(s.sent, n)
			}
		}
	}
	if first && len(r.initial) > 0 {
		s.answer = false
	}
}

// current tells whether what a returning proxy says to have needs no sending. Endpoints
// of a cluster that was sent on this stream do: the cluster waits for them.
func (m *machine) current(s *subscription, name string) bool {
	has, ok := s.sent[name]
	if !ok || s.typeURL == xds.EndpointType && m.recluster[name] {
		return false
	}
	r, ok := m.resources.Get(s.typeURL, name)
	return ok && r.Version == has.Version
}

func (m *machine) forgetVersions(s *subscription) {
	for n, r := range s.sent {
		r.Version = ""
		s.sent[n] = r
	}
}

func (s *subscription) unsubscribe(name string) {
	if name == wildcardName {
		s.wildcard, s.named = false, true
		return
	}
	if !s.names[name] {
		return
	}
	delete(s.names, name)
	if s.wildcard {
		s.force[name] = true // still covered: it is told what it has now
		return
	}
	delete(s.sent, name)
	delete(s.force, name)
}

// A phase is one step of the order in which changes go out: what is new before what uses
// it, what is old after. Names come after the listeners that serve them, and before these
// are taken away.
type phase struct {
	typeURL  string
	removals bool

	// open phases do not hold back the next one: Envoy acknowledges clusters only when
	// they are warm, and they warm by their endpoints.
	open bool
}

var phases = []phase{
	{xds.ClusterType, false, true},
	{xds.EndpointType, false, false},
	{xds.ListenerType, false, false},
	{xds.RouteType, false, false},
	{"", false, false}, // every other type
	{xds.ListenerType, true, false},
	{xds.RouteType, true, false},
	{xds.ClusterType, true, false},
	{xds.EndpointType, true, false},
}

// next is the response to send now, if any. Otherwise, if something is held back, again
// is when to ask at the latest.
func (m *machine) next(now time.Time) (out *response, again time.Time) {
	held := false
	for _, ph := range phases {
		for _, sub := range m.subsOf(ph) {
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
			return nil, again
		}
	}
	return nil, again
}

// subsOf are the subscriptions of a phase, ordered.
func (m *machine) subsOf(ph phase) []*subscription {
	if ph.typeURL != "" {
		if s := m.subs[ph.typeURL]; s != nil {
			return []*subscription{s}
		}
		return nil
	}
	var out []*subscription
	for typeURL, s := range m.subs {
		switch typeURL {
		case xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType:
		default:
			if served(typeURL) {
				out = append(out, s)
			}
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].typeURL < out[j].typeURL })
	return out
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
	first := s.answer && !removals && (s.wildcard || m.sotw && wholeSet(s.typeURL) && len(s.names) > 0)
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
	s.dirty, s.fresh, s.gone = false, nil, nil
	consider := func(r xds.Resource) {
		if has, ok := s.sent[r.Name]; !ok || has.Version != r.Version || s.force[r.Name] {
			s.fresh = append(s.fresh, r)
		}
	}
	if s.wildcard {
		for _, r := range m.resources[s.typeURL] {
			consider(r)
		}
	} else {
		for n := range s.names {
			if r, ok := m.resources.Get(s.typeURL, n); ok {
				consider(r)
			}
		}
		sort.Slice(s.fresh, func(i, j int) bool { return s.fresh[i].Name < s.fresh[j].Name })
	}
	for n := range s.sent {
		if _, ok := m.resources.Get(s.typeURL, n); !ok {
			s.gone = append(s.gone, n)
		}
	}
	for n := range s.force {
		if _, ok := s.sent[n]; ok {
			continue
		}
		if _, ok := m.resources.Get(s.typeURL, n); !ok {
			s.gone = append(s.gone, n)
		}
	}
	sort.Strings(s.gone)
}

// missing are names that were asked for and do not exist: that is an answer, not a
// removal, so it does not wait for the others.
func (m *machine) missing(s *subscription) []string {
	var out []string
	for _, n := range s.gone {
		if _, had := s.sent[n]; s.force[n] && !had {
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
		delete(s.sent, n)
		delete(s.force, n)
	}
	s.dirty = true
}

// difference is a delta response.
func (m *machine) difference(s *subscription, fresh []xds.Resource, gone []string, now time.Time) *response {
	size := 0
	for i, r := range fresh {
		if size += len(r.Body); size > responseBytes && i > 0 {
			fresh = fresh[:i]
			break
		}
	}
	m.note(s, fresh)
	s.drop(gone)
	return m.fly(s, &response{typeURL: s.typeURL, resources: fresh, removed: gone}, now)
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
		out = make([]xds.Resource, 0, len(s.sent))
		for _, r := range s.sent {
			out = append(out, r)
		}
		sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	}
	return m.fly(s, &response{typeURL: s.typeURL, resources: out, version: setVersion(out)}, now)
}

// note records what is being sent. A cluster that is sent waits for its endpoints, even
// if these did not change and Envoy does not ask again (envoy#13009).
func (m *machine) note(s *subscription, fresh []xds.Resource) {
	endpoints := m.subs[xds.EndpointType]
	for _, r := range fresh {
		s.sent[r.Name] = r
		delete(s.force, r.Name)
		if s.typeURL == xds.ClusterType {
			m.recluster[r.Name] = true
			if endpoints != nil && (endpoints.wildcard || endpoints.names[r.Name]) {
				endpoints.force[r.Name] = true
				endpoints.dirty = true
			}
		}
	}
	s.dirty = true
}

func (m *machine) fly(s *subscription, r *response, now time.Time) *response {
	m.nonces++
	r.nonce = strconv.FormatUint(m.nonces, 36)
	s.lastNonce, s.inFlight, s.sentAt, s.answer = r.nonce, r.nonce, now, false
	s.sentNames = make([]string, 0, len(r.resources))
	for _, res := range r.resources {
		s.sentNames = append(s.sentNames, res.Name)
	}
	s.sentNames = append(s.sentNames, r.removed...)
	return r
}
