// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// ProxyStatus is what is known about one connected proxy.
type ProxyStatus struct {
	Proxy     xds.Proxy
	Node      string // as the proxy calls itself
	Class     string
	Variant   string // "delta" or "sotw"
	Connected time.Time

	// What its agent and its Envoy say of themselves; empty where they do not.
	AgentVersion, EnvoyVersion string
	CertificateExpires         time.Time

	Revision federation.Revision // of what it is to have

	// Synced tells that it has acknowledged all of that. Behind is since when it has not.
	Synced bool
	Behind time.Time

	Types []TypeStatus // ordered by type URL
}

// TypeStatus is the state of one type on one stream.
type TypeStatus struct {
	TypeURL   string
	Resources int    // that the proxy has been sent and should have
	Version   string // of all of them together; equal versions mean equal resources
	Pending   bool   // sent, not answered
	Acked     time.Time
	Refused   []Refusal // not accepted since, oldest first
}

// Refusal is a response that the proxy did not accept. It keeps what it had before.
type Refusal struct {
	At        time.Time
	Resources []string
	Message   string
}

// Proxies lists the connected proxies, ordered by node.
func (s *Server) Proxies() []ProxyStatus {
	list := s.list()
	out := make([]ProxyStatus, 0, len(list))
	for _, st := range list {
		out = append(out, st.status())
	}
	slices.SortFunc(out, func(a, b ProxyStatus) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), a.Connected.Compare(b.Connected))
	})
	return out
}

func (st *stream) status() ProxyStatus {
	now := st.feed.Current()
	st.mu.Lock()
	defer st.mu.Unlock()
	out := ProxyStatus{
		Proxy: now.Proxy, Node: st.node.id, Class: now.Class, Variant: "delta",
		AgentVersion: st.node.agentVersion, EnvoyVersion: st.node.envoyVersion, CertificateExpires: st.node.expires,
		Connected: st.opened, Revision: now.Revision,
		// A revision that changed nothing for the proxy did not wake its stream.
		Synced: sameResources(st.frame.Resources, now.Resources) && st.machine.settled(), Behind: st.behind,
	}
	if st.wire.sotw() {
		out.Variant = "sotw"
	}
	for _, sub := range st.machine.subs {
		out.Types = append(out.Types, sub.status())
	}
	slices.SortFunc(out.Types, func(a, b TypeStatus) int { return strings.Compare(a.TypeURL, b.TypeURL) })
	return out
}

func (s *subscription) status() TypeStatus {
	list := s.held.among(s.wants)
	out := TypeStatus{
		TypeURL: s.typeURL, Resources: len(list), Version: setVersion(list),
		Pending: s.inFlight != "", Acked: s.ackedAt,
	}
	for _, f := range s.refusals {
		out.Refused = append(out.Refused, Refusal{At: f.at, Resources: slices.Clone(f.names), Message: f.message})
	}
	return out
}

// settled tells whether everything was sent and answered.
func (m *machine) settled() bool {
	for _, s := range m.all {
		if s.inFlight != "" || s.dirty && served(s.typeURL) || len(s.fresh) > 0 || len(s.gone) > 0 {
			return false
		}
	}
	return true
}

// Settled implements Holdings. A proxy asks for listeners once it has its first clusters.
func (m *machine) Settled() bool { return m.subs[xds.ListenerType] != nil && m.settled() }

// Held implements Holdings.
func (m *machine) Held(typeURL, name string) (version string, ok bool) {
	s := m.subs[typeURL]
	if s == nil {
		return "", false
	}
	r, ok := s.has(name)
	if !ok || slices.Contains(s.sentNames, name) {
		return "", false
	}
	for _, f := range s.refusals {
		if slices.Contains(f.names, name) {
			return "", false
		}
	}
	return r.Version, true
}

// waiting tells whether anything was sent that was not answered.
func (m *machine) waiting() bool {
	for _, s := range m.all {
		if s.inFlight != "" {
			return true
		}
	}
	return false
}

// kind is the last word of a type URL.
func kind(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }
