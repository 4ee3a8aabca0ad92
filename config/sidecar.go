// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/federation"
)

// sidecars by namespace.
type sidecars struct {
	selecting map[string][]*sidecar // oldest first
	defaults  map[string]*sidecar
}

type sidecar struct {
	namespace, name string
	selector        map[string]string
	egress          []egress
	registryOnly    bool
}

// egress is one entry of an egress listener's hosts.
type egress struct {
	exclude   bool
	namespace string // "*", "." (the client's), or a name
	host      string
	port      uint32 // 0: all
}

// add is called oldest first.
func (s *sidecars) add(o *Object, spec *networking.Sidecar, x *Index) {
	if s.selecting == nil {
		s.selecting, s.defaults = map[string][]*sidecar{}, map[string]*sidecar{}
	}
	c := &sidecar{namespace: o.Namespace, name: o.Name, selector: spec.WorkloadSelector.GetLabels()}
	if p := spec.OutboundTrafficPolicy; p != nil {
		c.registryOnly = p.Mode == networking.OutboundTrafficPolicy_REGISTRY_ONLY
	}
	for _, l := range spec.Egress {
		for _, h := range l.Hosts {
			c.egress = append(c.egress, parseEgress(h, l.Port.GetNumber()))
		}
	}
	switch {
	case len(c.selector) > 0:
		s.selecting[o.Namespace] = append(s.selecting[o.Namespace], c)
	case s.defaults[o.Namespace] == nil:
		s.defaults[o.Namespace] = c
	default:
		x.note(o, "NoEffect: spec: the older Sidecar %s is the default of the namespace", s.defaults[o.Namespace].name)
	}
}

func parseEgress(entry string, port uint32) egress {
	ns, host, _ := strings.Cut(entry, "/")
	e := egress{namespace: ns, host: host, port: port}
	if rest, ok := strings.CutPrefix(ns, "~"); ok {
		e.exclude, e.namespace = true, rest
		if rest == "" {
			e.namespace = "*"
		}
	}
	return e
}

// of is the Sidecar of a workload: one that selects it, else its namespace's, else the
// root namespace's; nil if there is none.
func (s *sidecars) of(namespace string, labels map[string]string) *sidecar {
	for _, c := range s.selecting[namespace] {
		if matches(c.selector, labels) {
			return c
		}
	}
	if c := s.defaults[namespace]; c != nil {
		return c
	}
	return s.defaults[RootNamespace]
}

// imports tells whether a host of a namespace is among what the Sidecar lets the client
// call. A port of 0 asks for any.
func (c *sidecar) imports(client, namespace, host string, port uint32) bool {
	included := len(c.egress) == 0
	for _, e := range c.egress {
		in := e.namespace == "*" || e.namespace == namespace || e.namespace == "." && client == namespace
		if !in || !covers(e.host, host) || e.port != 0 && port != 0 && e.port != port {
			continue
		}
		if e.exclude {
			return false
		}
		included = true
	}
	return included
}

// Imports tells whether a workload's Sidecar lets it call a service's port; a port of 0
// asks for any. Without a Sidecar it may call all. Whether the service is exported to the
// namespace is another question (federation.Service.VisibleTo).
func (x *Index) Imports(namespace string, labels map[string]string, service federation.ServiceName, port uint32) bool {
	if x == nil {
		return true
	}
	c := x.sidecars.of(namespace, labels)
	return c == nil || c.imports(namespace, service.Namespace, service.Host(), port)
}

// RegistryOnly tells whether a workload may call nothing but services of the mesh.
func (x *Index) RegistryOnly(namespace string, labels map[string]string) bool {
	if x == nil {
		return false
	}
	c := x.sidecars.of(namespace, labels)
	return c != nil && c.registryOnly
}
