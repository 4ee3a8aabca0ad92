// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_metadata/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/structpb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/federation"
)

// podListeners bounds the listeners of one headless port: each pod has one, and a proxy
// pays for each. Pods beyond are called directly, without the mesh.
const podListeners = 1000

// built is what one service contributes to the resources of a class.
type built struct {
	resources map[string][]Resource
	findings  []federation.Finding

	// pods are the listeners of headless pods. They yield to those of services: whoever
	// may write an endpoint could otherwise put a listener on somebody else's address.
	pods []Resource

	// routed tells that it depends on other services too: those that it asked for.
	routed bool
	asked  []federation.ServiceName
}

// put adds a resource, or the finding that it cannot be built.
func (b *built) put(object, typeURL, name string, m validatable, p *packer) {
	if r, ok := b.encode(object, typeURL, name, m, p); ok {
		b.add(typeURL, r)
	}
}

func (b *built) add(typeURL string, r Resource) {
	if b.resources == nil {
		b.resources = map[string][]Resource{}
	}
	b.resources[typeURL] = append(b.resources[typeURL], r)
}

func (b *built) encode(object, typeURL, name string, m validatable, p *packer) (Resource, bool) {
	err := p.err
	if err == nil {
		err = m.ValidateAll()
	}
	var r Resource
	if err == nil {
		r, err = NewResource(name, m)
	}
	if err != nil {
		b.note(object, federation.SeverityError, "%s %s cannot be built and is left out: %v", kindOf(typeURL), name, err)
		return Resource{}, false
	}
	return r, true
}

func (b *built) note(object, severity, format string, args ...any) {
	code := CodeNotBuilt
	if severity != federation.SeverityError {
		code = CodeNotTranslated
	}
	b.findings = append(b.findings, federation.Finding{
		Code: code, Severity: severity, Object: object, Message: fmt.Sprintf(format, args...),
	})
}

// serviceBuild makes what one service needs in one class.
type serviceBuild struct {
	*build
	built
	svc    *federation.Service
	object string
	rule   *networking.DestinationRule
	ruleID string // the rule's object, for findings
}

func (b *build) service(s *federation.Service) built {
	sb := &serviceBuild{build: b, svc: s, object: "Service " + s.Name.String()}
	if s.Type == federation.ExternalName {
		return sb.built
	}
	sb.rule, sb.ruleID = b.destinationRule(s)
	for _, port := range s.Ports {
		sb.port(port)
	}
	for i := range s.Pods {
		for _, port := range s.Ports {
			sb.pod(&s.Pods[i], port)
		}
	}
	return sb.built
}

// port makes listeners, routes, clusters and endpoints of one port.
func (b *serviceBuild) port(port federation.Port) {
	var groups []federation.Group // of the service, not of a subset
	targets := b.targets(port)
	for _, t := range targets {
		list := b.groups(t, port)
		var policy *networking.TrafficPolicy
		if t.subset == nil {
			groups = list
		} else {
			policy = t.subset.TrafficPolicy
		}
		b.cluster(t, trafficFor(b.rule.GetTrafficPolicy(), policy, port.Number), list)
	}
	t := targets[0]
	if port.Protocol.IsHTTP() || port.Protocol == federation.Unknown {
		b.routes(t, port)
	}
	if t.perPod {
		b.podListeners(t, port, groups)
		return
	}
	for _, ip := range slices.Concat(b.svc.Addresses, b.svc.AlsoAt) {
		b.listen(ip, t, port)
	}
}

// targets are what there is a cluster for: the service's port, and its subsets.
func (b *serviceBuild) targets(port federation.Port) []target {
	s := b.svc
	t := target{
		host: s.Host, name: federation.OutboundCluster(port.Number, "", s.Host), sni: federation.SNI(port.Number, "", s.Host),
		identities: b.identities(s.Accounts), protocol: port.Protocol,
		gateways: b.gateways, perPod: s.HeadlessHere(),
	}
	out := []target{t}
	for _, subset := range b.rule.GetSubsets() {
		t.name = federation.OutboundCluster(port.Number, subset.Name, s.Host)
		t.sni = federation.SNI(port.Number, subset.Name, s.Host)
		t.perPod, t.subset = false, subset
		out = append(out, t)
	}
	return out
}

// groups are the hops of a target.
func (b *serviceBuild) groups(t target, port federation.Port) []federation.Group {
	switch {
	case t.perPod:
		return podGroups(b.svc, port.Number)
	case t.subset == nil:
		return b.split(b.svc, port.Number, "", nil)
	}
	match := func(labels map[string]string) bool { return covers(t.subset.Labels, labels) }
	return b.split(b.svc, port.Number, t.subset.Name, match)
}

// covers tells whether labels have all that is wanted.
func covers(want, labels map[string]string) bool {
	for k, v := range want {
		if labels[k] != v {
			return false
		}
	}
	return true
}

// cluster makes a cluster and its assignment.
func (b *serviceBuild) cluster(t target, policy *networking.TrafficPolicy, groups []federation.Group) {
	p := &packer{}
	c := p.edsCluster(t)
	if err := p.applyTraffic(c, t, policy); err != nil {
		b.note(b.ruleID, federation.SeverityError, "spec.trafficPolicy.%v; cluster %s has the mesh's defaults instead", err, t.name)
		c = p.edsCluster(t)
	}
	b.put(b.object, ClusterType, t.name, c, p)
	if c.EdsClusterConfig == nil {
		return
	}
	b.assign(t, groups)
}

// assign makes the assignment of a cluster.
func (b *serviceBuild) assign(t target, groups []federation.Group) {
	b.trustPlaintext(groups)
	places, unresolved := placed(groups)
	for _, host := range unresolved {
		b.note(b.object, federation.SeverityWarning, "gateway host name %q has no address yet, so it gets no traffic; check its DNS record", host)
	}
	if !sound(t.name, places) {
		b.put(b.object, EndpointType, t.name, assignment(t.name, places, t.perPod), &packer{})
		return
	}
	b.add(EndpointType, newResource(t.name, EndpointType, appendAssignment(nil, t.name, places, t.perPod)))
}

// trustPlaintext sends plaintext to endpoints whose own policy refuses the mesh's TLS.
func (b *serviceBuild) trustPlaintext(groups []federation.Group) {
	for _, g := range groups {
		for i := range g.Hops {
			h := &g.Hops[i]
			if h.Mesh && !h.Gateway && b.mode(b.svc.Name.Namespace, h.Labels, h.Port) == disabled {
				h.Mesh = false
			}
		}
	}
}

// identities are the SPIFFE IDs that may answer.
func (b *build) identities(accounts []string) []string {
	out := make([]string, 0, len(accounts))
	for _, a := range accounts {
		out = append(out, "spiffe://"+b.class.TrustDomain+"/"+a)
	}
	return out
}

// podGroups are the pods of a headless service that is called by their addresses. Whoever
// has an address may use it: health is not asked.
func podGroups(s *federation.Service, port uint32) []federation.Group {
	g := federation.Group{}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		target, ok := e.TargetPorts[port]
		if !ok || !e.Direct {
			continue
		}
		for _, ip := range e.Addresses {
			g.Hops = append(g.Hops, federation.Hop{
				Host: ip.String(), Port: target, Weight: 1, Mesh: e.Mesh, Health: federation.Ready, Labels: e.Labels,
			})
		}
	}
	if len(g.Hops) == 0 {
		return nil
	}
	return []federation.Group{g}
}

// podListeners makes a listener for every pod of a headless service. It stands on the
// port the pod listens on, and on the service's, which callers use as often.
func (b *serviceBuild) podListeners(t target, port federation.Port, groups []federation.Group) {
	for _, g := range groups {
		if len(g.Hops) > podListeners {
			b.note(b.object, federation.SeverityWarning, "port %d is headless with %d pod addresses; the first %d are called through the mesh, the others in plaintext", port.Number, len(g.Hops), podListeners)
		}
		for _, hop := range g.Hops[:min(len(g.Hops), podListeners)] {
			ip, err := netip.ParseAddr(hop.Host)
			if err != nil {
				continue
			}
			b.listenPod(ip, hop.Port, t, port)
			if hop.Port != port.Number {
				b.listenPod(ip, port.Number, t, port)
			}
		}
	}
}

// listen makes the listener of an address of the service.
func (b *serviceBuild) listen(ip netip.Addr, t target, port federation.Port) {
	b.listener(ip, port.Number, port, t, nil)
}

// listenPod makes the listener of one pod's address, which leads to that pod only.
func (b *serviceBuild) listenPod(ip netip.Addr, number uint32, t target, port federation.Port) {
	b.listener(ip, number, port, t, labelled(podAddressKey, ip.String()))
}

func (b *serviceBuild) listener(ip netip.Addr, number uint32, port federation.Port, t target, pod *structpb.Struct) {
	if !b.class.families().has(ip) || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() {
		return // nobody dials it, or it would mean every address
	}
	p := &packer{logFormat: b.logFormat}
	tcp := tcpTo(t.name, t.name)
	var http *hcmv3.HttpConnectionManager
	if port.Protocol.IsHTTP() || port.Protocol == federation.Unknown {
		var filters []*hcmv3.HttpFilter
		if pod != nil {
			filters = append(filters, p.choosePod(pod))
		}
		http = p.outboundHTTP(routeName(t.host, port.Number), port.Protocol == federation.Unknown, filters...)
	}
	if pod != nil {
		tcp.MetadataMatch = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.lb": pod}}
	}
	l := p.outboundListener(ip.String(), number, port.Protocol, http, tcp)
	if pod == nil {
		b.put(b.object, ListenerType, l.Name, l, p)
	} else if r, ok := b.encode(b.object, ListenerType, l.Name, l, p); ok {
		b.pods = append(b.pods, r)
	}
}

// choosePod adds to every request's load balancing the pod whose address was dialled.
func (p *packer) choosePod(pod *structpb.Struct) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{
		Name: "envoy.filters.http.set_metadata",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: p.any(&metadatav3.Config{
			Metadata: []*metadatav3.Metadata{{MetadataNamespace: "envoy.lb", Value: pod}},
		})},
	}
}

// has tells whether addresses of the family of ip can be called.
func (f families) has(ip netip.Addr) bool {
	if ip.Unmap().Is4() {
		return f.v4
	}
	return f.v6
}

// routes makes the route configuration of an HTTP port.
func (b *serviceBuild) routes(t target, port federation.Port) {
	p := &packer{}
	routes, object := b.virtualService(p, b.svc, port.Number, &b.built)
	if len(routes) == 0 {
		routes, object = []*routev3.Route{p.defaultRoute(t.name)}, b.object
	}
	if hash := trafficFor(b.rule.GetTrafficPolicy(), nil, port.Number).GetLoadBalancer().GetConsistentHash(); hash != nil {
		for _, r := range routes {
			if action := r.GetRoute(); action != nil {
				action.HashPolicy = hashPolicies(hash)
			}
		}
	}
	name := routeName(b.svc.Host, port.Number)
	b.put(object, RouteType, name, routeConfiguration(name, routes), p)
}

// pod makes what a pod with a name and a virtual address of its own needs.
func (b *serviceBuild) pod(pod *federation.NamedPod, port federation.Port) {
	if _, ok := pod.Endpoint.TargetPorts[port.Number]; !ok || len(pod.Address) == 0 {
		return
	}
	t := target{
		host: pod.Host, name: federation.OutboundCluster(port.Number, "", pod.Host), sni: federation.SNI(port.Number, "", pod.SNIHost),
		protocol: port.Protocol, gateways: b.gateways,
	}
	if pod.Account != "" {
		t.identities = b.identities([]string{pod.Account})
	}
	b.cluster(t, nil, b.view.Split(federation.Query{Service: b.svc, Port: port.Number, Pod: pod, Closed: b.closed}))
	if port.Protocol.IsHTTP() || port.Protocol == federation.Unknown {
		p := &packer{}
		name := routeName(pod.Host, port.Number)
		b.put(b.object, RouteType, name, routeConfiguration(name, []*routev3.Route{p.defaultRoute(t.name)}), p)
	}
	for _, ip := range pod.Address {
		b.listen(ip, t, port)
	}
}
