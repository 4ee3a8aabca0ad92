// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
)

// The codes of this package's findings.
const (
	CodeNotBuilt      = "MESH4001" // a resource cannot be built and is left out
	CodeNotTranslated = "MESH4002" // part of an object has no effect, or not the one expected
)

// Build makes everything a proxy is told. It is pure: equal arguments give equal bytes.
// What cannot be built is left out, with a finding that names the object, and stops
// nothing else.
func Build(view *federation.View, index *config.Index, proxy Proxy) (Resources, []federation.Finding) {
	return (&Builder{}).Build(view, index, proxy)
}

// validatable is a message that knows the rules of Envoy's API.
type validatable interface {
	proto.Message
	ValidateAll() error
}

// build is one computation for one class.
type build struct {
	view     *federation.View
	index    *config.Index
	class    Class
	labels   map[string]string // of the class
	gateways bool              // some other network has a way in
	weigh    func(federation.WeightKey, uint32) uint32
	closed   func(federation.WeightKey) bool

	logFormat string // of access logs; see AccessLog

	asked []federation.ServiceName // that some route or alias leads to, or would
}

func newBuild(view *federation.View, index *config.Index, class Class) *build {
	b := &build{view: view, index: index, class: class, labels: class.labels()}
	for network, list := range view.Gateways {
		b.gateways = b.gateways || network != view.Scope.Network && len(list) > 0
	}
	return b
}

// visible tells whether the class is told of a service at all.
func (b *build) visible(s *federation.Service) bool {
	if !s.VisibleTo(b.class.Namespace) {
		return false
	}
	return b.index.Imports(b.class.Namespace, b.labels, s.Name, 0)
}

// split asks the view for hops, and tells weigh also of networks that have none any more:
// a change from or to zero is never held back.
func (b *build) split(s *federation.Service, port uint32, subset string, match func(map[string]string) bool) []federation.Group {
	groups := b.view.Split(federation.Query{Service: s, Port: port, Subset: subset, Match: match, Weigh: b.weigh, Closed: b.closed})
	if b.weigh == nil {
		return groups
	}
	for network := range b.view.Gateways {
		if !slices.ContainsFunc(groups, func(g federation.Group) bool { return g.Network == network }) {
			key := federation.WeightKey{Scope: b.view.Scope, Service: s.Name, Port: port, Subset: subset, Network: network}
			b.weigh(key, 0)
			key.Stale = true
			b.weigh(key, 0)
		}
	}
	return groups
}

// mode is what a workload's port asks of its callers.
func (b *build) mode(namespace string, labels map[string]string, port uint32) mtlsMode {
	return mtlsMode(b.index.MutualTLS(namespace, labels, port))
}

func (b *build) destinationRule(s *federation.Service) (*networking.DestinationRule, string) {
	return b.index.DestinationRule(b.class.Namespace, b.labels, s.Name)
}

// virtualService are the routes that a VirtualService gives a port, none without one.
func (b *build) virtualService(p *packer, s *federation.Service, port uint32, out *built) ([]*routev3.Route, string) {
	vs, object := b.index.VirtualService(b.class.Namespace, b.labels, s.Host)
	if len(vs.GetHttp()) == 0 {
		return nil, ""
	}
	who := caller{namespace: b.class.Namespace, labels: b.labels, port: port}
	routes, notes := p.virtualRoutes(vs.Http, who, func(d *networking.Destination) (string, error) { return b.destination(d, port) })
	for _, n := range notes {
		out.note(object, federation.SeverityWarning, "%s", n)
	}
	return routes, object
}

// destination names the cluster of a VirtualService's destination.
func (b *build) destination(d *networking.Destination, port uint32) (string, error) {
	name, ok := federation.ServiceOfHost(d.GetHost())
	if !ok {
		return "", fmt.Errorf("host %q is no service; give a name, or name.namespace.svc.%s", d.GetHost(), federation.ClusterDomain)
	}
	b.asked = append(b.asked, name)
	s, ok := b.view.Service(name)
	if !ok || !b.visible(s) {
		return "", fmt.Errorf("host %q is no service that namespace %s sees", d.GetHost(), b.class.Namespace)
	}
	number := d.GetPort().GetNumber()
	switch _, same := s.Port(port); {
	case number != 0:
	case len(s.Ports) == 1:
		number = s.Ports[0].Number
	case same:
		number = port
	default:
		return "", fmt.Errorf("host %q has several ports and none is %d; give port.number", d.GetHost(), port)
	}
	if _, ok := s.Port(number); !ok {
		return "", fmt.Errorf("host %q has no port %d", d.GetHost(), number)
	}
	if d.Subset != "" {
		rule, _ := b.destinationRule(s)
		if !slices.ContainsFunc(rule.GetSubsets(), func(x *networking.Subset) bool { return x.Name == d.Subset }) {
			return "", fmt.Errorf("host %q has no subset %q; define it in a DestinationRule", d.GetHost(), d.Subset)
		}
	}
	return federation.OutboundCluster(number, d.Subset, s.Host), nil
}

// frame makes what a sidecar has beside its services.
func (b *build) frame() built {
	var out built
	f := b.class.families()
	object := "Proxy " + b.class.String()
	add := func(typeURL, name string, make func(*packer) validatable) {
		p := &packer{logFormat: b.logFormat}
		out.put(object, typeURL, name, make(p), p)
	}
	ports := b.class.ports()
	for i := range ports {
		ports[i].mode = b.mode(b.class.Namespace, b.labels, ports[i].number)
	}
	rest := b.mode(b.class.Namespace, b.labels, 0)
	registryOnly := b.index.RegistryOnly(b.class.Namespace, b.labels)

	add(ListenerType, VirtualOutbound, func(p *packer) validatable { return p.virtualOutbound(f, registryOnly) })
	add(ListenerType, VirtualInbound, func(p *packer) validatable { return p.virtualInbound(f, ports, rest) })
	add(ClusterType, PassthroughCluster, func(p *packer) validatable { return p.originalDst(PassthroughCluster) })
	add(ClusterType, BlackHoleCluster, func(*packer) validatable { return blackHole() })
	add(ClusterType, InboundPassthroughCluster, func(p *packer) validatable { return p.inboundCluster(InboundPassthroughCluster, f) })
	for _, port := range ports {
		name := federation.InboundCluster(port.number)
		add(ClusterType, name, func(p *packer) validatable {
			c := p.inboundCluster(name, f)
			c.TypedExtensionProtocolOptions = nil
			p.httpOptions(c, port.protocol, nil)
			return c
		})
	}
	return out
}

// kindOf is the last word of a type URL.
func kindOf(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

// gather orders the resources of all parts. Of two with one name the first stays, and the
// other is a finding: two services cannot both have an address and port.
func gather(parts []*built) (Resources, []federation.Finding) {
	out := Resources{}
	var findings []federation.Finding
	for _, part := range parts {
		findings = append(findings, part.findings...)
		for typeURL, list := range part.resources {
			out[typeURL] = append(out[typeURL], list...)
		}
	}
	for _, part := range parts {
		out[ListenerType] = append(out[ListenerType], part.pods...)
	}
	for typeURL, list := range out {
		slices.SortStableFunc(list, func(a, b Resource) int { return cmp.Compare(a.Name, b.Name) })
		kept := list[:0]
		for i, r := range list {
			if i == 0 || list[i-1].Name != r.Name {
				kept = append(kept, r)
				continue
			}
			if list[i-1].Version != r.Version {
				findings = append(findings, federation.Finding{
					Code: CodeNotBuilt, Severity: federation.SeverityWarning, Object: kindOf(typeURL) + " " + r.Name,
					Message: "two services have this address and port; the first by namespace and name gets the calls",
				})
			}
		}
		out[typeURL] = kept
	}
	return out, findings
}
