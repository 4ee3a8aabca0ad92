// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"slices"

	security "istio.io/api/security/v1beta1"
)

// The modes of mutual TLS, as MutualTLS returns them.
const (
	Permissive = "PERMISSIVE" // mutual TLS and plaintext; the default
	Strict     = "STRICT"
	Disable    = "DISABLE"
)

// peerAuthentications by what they are for, oldest first.
type peerAuthentications struct {
	mesh      *security.PeerAuthentication
	namespace map[string]*security.PeerAuthentication
	workload  map[string][]peerAuthentication
}

type peerAuthentication struct {
	*security.PeerAuthentication
	id string
}

// add is called oldest first: the oldest of a place is the one in effect, as in Istio.
func (p *peerAuthentications) add(o *Object, a *security.PeerAuthentication, x *Index) {
	if p.namespace == nil {
		p.namespace, p.workload = map[string]*security.PeerAuthentication{}, map[string][]peerAuthentication{}
	}
	_, taken := p.namespace[o.Namespace]
	switch selects := len(a.Selector.GetMatchLabels()) > 0; {
	case selects && o.Namespace == RootNamespace:
		x.note(o, "NoEffect: spec.selector: in the root namespace policies apply to the whole mesh only")
	case selects:
		p.workload[o.Namespace] = append(p.workload[o.Namespace], peerAuthentication{a, o.Name})
	case o.Namespace == RootNamespace && p.mesh == nil:
		p.mesh = a
	case o.Namespace != RootNamespace && !taken:
		p.namespace[o.Namespace] = a
	default:
		x.note(o, "NoEffect: spec: an older policy is the one of namespace %s", o.Namespace)
	}
}

// MutualTLS is the mode that a workload's port asks of its callers: one of Permissive,
// Strict, Disable. port is the workload's own, not a service's; 0 stands for ports that
// nothing is said about. The most specific policy that is set wins: port, workload,
// namespace, mesh (https://istio.io/latest/docs/reference/config/security/peer_authentication/).
func (x *Index) MutualTLS(namespace string, labels map[string]string, port uint32) string {
	mode := Permissive
	if x == nil {
		return mode
	}
	mode = modeOf(x.peers.mesh.GetMtls(), mode)
	if namespace != RootNamespace {
		mode = modeOf(x.peers.namespace[namespace].GetMtls(), mode)
	}
	if w, ok := x.peers.of(namespace, labels); ok {
		mode = modeOf(w.Mtls, mode)
		mode = modeOf(w.PortLevelMtls[port], mode)
	}
	return mode
}

// of is the policy that selects the workload: the oldest, where several do.
func (p *peerAuthentications) of(namespace string, labels map[string]string) (peerAuthentication, bool) {
	list := p.workload[namespace]
	i := slices.IndexFunc(list, func(a peerAuthentication) bool { return matches(a.Selector.MatchLabels, labels) })
	if i < 0 {
		return peerAuthentication{}, false
	}
	return list[i], true
}

func modeOf(m *security.PeerAuthentication_MutualTLS, inherited string) string {
	switch m.GetMode() {
	case security.PeerAuthentication_MutualTLS_DISABLE:
		return Disable
	case security.PeerAuthentication_MutualTLS_PERMISSIVE:
		return Permissive
	case security.PeerAuthentication_MutualTLS_STRICT:
		return Strict
	}
	return inherited
}

// ClassKey is what policies make of a workload, as a string that is the same for
// workloads of a namespace that must be configured alike: which Sidecar and which
// PeerAuthentication select it, and the labels that rules and routes may ask for.
func (x *Index) ClassKey(namespace string, labels map[string]string) string {
	if x == nil {
		return namespace
	}
	key := namespace
	if s := x.sidecars.of(namespace, labels); s != nil {
		key += fmt.Sprintf(";sidecar=%s/%s", s.namespace, s.name)
	}
	if p, ok := x.peers.of(namespace, labels); ok {
		key += ";peer=" + p.id
	}
	for _, k := range x.asked() {
		if v, ok := labels[k]; ok {
			key += ";" + k + "=" + v
		}
	}
	return key
}

// asked are the label keys that only destination rules and routes look at.
func (x *Index) asked() []string {
	keys := map[string]bool{}
	for _, r := range x.rules.all {
		addKeys(keys, r.selector)
	}
	for _, v := range x.services.all {
		addSourceLabels(keys, v.spec)
	}
	return slices.DeleteFunc(slices.Clone(x.selected), func(k string) bool { return !keys[k] })
}
