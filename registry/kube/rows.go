// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// Labels and annotations of users' objects that mean something.
const (
	exportAnnotation   = "isthmus-mesh.io/export"       // "false": seen by its own cluster only
	exportToAnnotation = "networking.istio.io/exportTo" // Istio's, a list of namespaces
	tlsModeLabel       = "security.istio.io/tlsMode"    // Istio's: "istio" where a proxy is beside
	istioGatewayLabel  = "istio"                        // Istio's: "eastwestgateway"
	subzoneLabel       = "topology.istio.io/subzone"    //
	injectionLabel     = "isthmus-mesh.io/injection"    // of namespaces: "enabled"
	istioInjection     = "istio-injection"              // Istio's: "enabled"
	lastApplied        = "kubectl.kubernetes.io/last-applied-configuration"
	annotationBytes    = 1 << 10 // what an annotation of ours may reasonably have
	labelBytes         = 4 << 10 // what all labels of one object may have
	objectBytes        = 256 << 10
)

// serviceRow is what the mesh needs of a Service.
type serviceRow struct {
	name            federation.ServiceName
	created         time.Time
	kind            federation.ServiceType
	externalName    string
	clusterIPs      []netip.Addr
	ports           []federation.Port
	nodePorts       map[uint32]uint32
	labels          map[string]string
	local           bool
	exportTo        []string
	publishNotReady bool

	gateway   gatewayMark
	balancer  bool     // of type LoadBalancer
	addresses []string // of the load balancer, or spec.externalIPs
	explicit  string   // GatewayAddress

	problems []string
}

// sliceRow is what the mesh needs of an EndpointSlice.
type sliceRow struct {
	service   federation.ServiceName
	ports     []slicePort
	endpoints []sliceEndpoint
	problems  []string
}

type slicePort struct {
	name   string
	number uint32
}

type sliceEndpoint struct {
	pod, uid string // empty if its target is no pod
	addr     netip.Addr
	place    *place // shared
	health   health
	ready    bool // what the condition says, terminating or not
}

// health is an index of healths.
type health uint8

const (
	ready health = iota
	terminating
	notReady
)

var healths = [...]federation.Health{ready: federation.Ready, terminating: federation.Terminating, notReady: federation.NotReady}

// place is where an endpoint runs, and which name it has there, as few have.
type place struct{ node, zone, hostname string }

// podRow is what the mesh needs of a Pod. There are many: what pods have in common is
// shared.
type podRow struct {
	name, uid string
	node      string
	account   string
	network   federation.Network
	labels    map[string]string
	role      federation.ProxyRole // empty without a proxy
	istio     bool                 // the proxy is Istio's
	ready     bool                 // of gateways only: others' readiness is in slices
	addresses []netip.Addr
	problems  *[]string // nil without any
}

// gatewayMark tells how a Service says that it is an east-west gateway.
type gatewayMark int8

const (
	noGateway    gatewayMark = iota
	ownGateway               // by our label
	istioGateway             // by Istio's
)

type nodeRow struct {
	locality  federation.Locality
	addresses []string // from outside first
}

type namespaceRow struct {
	network  federation.Network
	injected bool
}

// same compares rows.
func same[T any](a, b T) bool { return reflect.DeepEqual(a, b) }

// reducer makes rows of objects. What rows have in common with others is shared.
type reducer struct {
	names registry.Interner
	pods  func(registry.ObjectName) (*podRow, bool) // those that are known

	mu     sync.Mutex
	places map[place]*place
}

func (d *reducer) place(node, zone, hostname string) *place {
	p := place{d.names.String(node), d.names.String(zone), strings.Clone(hostname)}
	if p == (place{}) {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if shared := d.places[p]; shared != nil {
		return shared
	}
	if d.places == nil || len(d.places) > 1<<14 {
		d.places = map[place]*place{} // what is in use stays in use
	}
	d.places[p] = &p
	return &p
}

// labels leaves out labels that are too much to carry to every proxy.
func (d *reducer) labels(m map[string]string, problems *[]string) map[string]string {
	size := 0
	for k, v := range m {
		size += len(k) + len(v)
	}
	if size > labelBytes {
		*problems = append(*problems, fmt.Sprintf("its labels have %d bytes, more than %d, and are ignored", size, labelBytes))
		return nil
	}
	return d.names.Labels(m)
}

func boundedAnnotation(annotations map[string]string, name string, problems *[]string) string {
	v := annotations[name]
	if len(v) > annotationBytes {
		*problems = append(*problems, fmt.Sprintf("annotation %s has %d bytes, more than %d, and is ignored", name, len(v), annotationBytes))
		return ""
	}
	return v
}

func (d *reducer) service(object any) (*serviceRow, bool) {
	s, ok := object.(*corev1.Service)
	if !ok {
		return nil, false
	}
	r := &serviceRow{
		name:    federation.ServiceName{Namespace: d.names.String(s.Namespace), Name: s.Name},
		created: s.CreationTimestamp.UTC(), kind: federation.ClusterIP,
		publishNotReady: s.Spec.PublishNotReadyAddresses,
	}
	r.labels = d.labels(s.Labels, &r.problems)
	r.takeType(s)
	r.takePorts(&d.names, s.Spec.Ports)
	r.local = boundedAnnotation(s.Annotations, exportAnnotation, &r.problems) == "false" ||
		r.name == federation.ServiceName{Namespace: "default", Name: "kubernetes"}
	for _, to := range strings.Split(boundedAnnotation(s.Annotations, exportToAnnotation, &r.problems), ",") {
		if to = strings.TrimSpace(to); to != "" {
			r.exportTo = append(r.exportTo, to)
		}
	}
	switch {
	case s.Labels[GatewayLabel] == "eastwest":
		r.takeGateway(s, ownGateway)
	case s.Labels[istioGatewayLabel] == "eastwestgateway":
		r.takeGateway(s, istioGateway)
	}
	return r, true
}

func (r *serviceRow) takeType(s *corev1.Service) {
	switch {
	case s.Spec.Type == corev1.ServiceTypeExternalName:
		r.kind, r.externalName = federation.ExternalName, strings.TrimSuffix(s.Spec.ExternalName, ".")
		return
	case s.Spec.ClusterIP == corev1.ClusterIPNone:
		r.kind = federation.Headless
		return
	}
	list := s.Spec.ClusterIPs
	if len(list) == 0 && s.Spec.ClusterIP != "" {
		list = []string{s.Spec.ClusterIP}
	}
	for _, text := range list {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			r.problems = append(r.problems, fmt.Sprintf("clusterIP %q is not an address", cut(text)))
			continue
		}
		r.clusterIPs = append(r.clusterIPs, ip)
	}
}

func (r *serviceRow) takePorts(names *registry.Interner, ports []corev1.ServicePort) {
	seen := map[uint32]bool{}
	for i := range ports {
		p := &ports[i]
		if p.Protocol != corev1.ProtocolTCP && p.Protocol != "" {
			continue // UDP and SCTP are not part of the mesh
		}
		number := uint32(p.Port)
		if p.Port < 1 || p.Port > 65535 || seen[number] {
			r.problems = append(r.problems, fmt.Sprintf("port %d is given twice or out of range", p.Port))
			continue
		}
		seen[number] = true
		protocol, problem := portProtocol(p)
		if problem != "" {
			r.problems = append(r.problems, problem)
		}
		r.ports = append(r.ports, federation.Port{Number: number, Name: names.String(p.Name), Protocol: protocol})
		if p.NodePort > 0 {
			if r.nodePorts == nil {
				r.nodePorts = map[uint32]uint32{}
			}
			r.nodePorts[number] = uint32(p.NodePort)
		}
	}
	slices.SortFunc(r.ports, func(a, b federation.Port) int { return int(a.Number) - int(b.Number) })
}

func (r *serviceRow) takeGateway(s *corev1.Service, mark gatewayMark) {
	r.gateway, r.local = mark, true // a way into the network, not a service that is reached through one
	r.balancer = s.Spec.Type == corev1.ServiceTypeLoadBalancer
	r.explicit = boundedAnnotation(s.Annotations, GatewayAddress, &r.problems)
	for _, in := range s.Status.LoadBalancer.Ingress {
		if in.IP != "" {
			r.addresses = append(r.addresses, in.IP)
		} else if in.Hostname != "" {
			r.addresses = append(r.addresses, in.Hostname)
		}
	}
	if len(r.addresses) == 0 {
		r.addresses = slices.Clone(s.Spec.ExternalIPs)
	}
}

// wellKnown are ports on which the server speaks first or which are never HTTP: they are
// TCP unless their name says otherwise, as in Istio.
var wellKnown = map[int32]bool{25: true, 53: true, 3306: true, 27017: true}

// portProtocol follows Istio: appProtocol, else what the port's name begins with.
func portProtocol(p *corev1.ServicePort) (federation.Protocol, string) {
	named := parseProtocol(p.Name)
	if p.AppProtocol == nil {
		if named == federation.Unknown && wellKnown[p.Port] {
			return federation.TCP, ""
		}
		return named, ""
	}
	declared := federation.Unknown
	switch *p.AppProtocol {
	case "kubernetes.io/h2c":
		declared = federation.HTTP2
	case "kubernetes.io/ws":
		declared = federation.HTTP
	case "kubernetes.io/wss":
		declared = federation.HTTPS
	default:
		declared = parseProtocol(*p.AppProtocol)
	}
	if declared == federation.Unknown && wellKnown[p.Port] {
		declared = federation.TCP
	}
	if named != federation.Unknown && declared != federation.Unknown && named != declared {
		return declared, fmt.Sprintf("port %d is named %q but its appProtocol is %q, which counts; make them agree", p.Port, cut(p.Name), cut(*p.AppProtocol))
	}
	return declared, ""
}

func parseProtocol(name string) federation.Protocol {
	name = strings.ToLower(name)
	if name == "grpc-web" || strings.HasPrefix(name, "grpc-web-") {
		return federation.GRPCWeb
	}
	name, _, _ = strings.Cut(name, "-")
	switch name {
	case "http":
		return federation.HTTP
	case "http2":
		return federation.HTTP2
	case "grpc":
		return federation.GRPC
	case "https":
		return federation.HTTPS
	case "tls":
		return federation.TLS
	case "tcp":
		return federation.TCP
	case "mongo":
		return federation.Mongo
	case "redis":
		return federation.Redis
	case "mysql":
		return federation.MySQL
	}
	return federation.Unknown
}

// endpointSlice reduces a slice; one that belongs to no Service is left out.
func (d *reducer) endpointSlice(object any) (*sliceRow, bool) {
	s, ok := object.(*discoveryv1.EndpointSlice)
	if !ok {
		return nil, false
	}
	service := s.Labels[discoveryv1.LabelServiceName]
	if service == "" || s.AddressType == discoveryv1.AddressTypeFQDN {
		return nil, false
	}
	r := &sliceRow{
		service:   federation.ServiceName{Namespace: d.names.String(s.Namespace), Name: d.names.String(service)},
		endpoints: make([]sliceEndpoint, 0, len(s.Endpoints)),
	}
	for _, p := range s.Ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 || p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP {
			continue
		}
		port := slicePort{number: uint32(*p.Port)}
		if p.Name != nil {
			port.name = d.names.String(*p.Name)
		}
		r.ports = append(r.ports, port)
	}
	bad, example := 0, ""
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		row, problem := d.endpoint(s.Namespace, e)
		if problem != "" {
			bad, example = bad+1, problem
			continue
		}
		r.endpoints = append(r.endpoints, row)
	}
	if bad > 0 {
		r.problems = append(r.problems, fmt.Sprintf("EndpointSlice %s has %d unusable endpoints, for example %s", s.Name, bad, example))
	}
	return r, true
}

func (d *reducer) endpoint(namespace string, e *discoveryv1.Endpoint) (sliceEndpoint, string) {
	var row sliceEndpoint
	if len(e.Addresses) == 0 {
		return row, "one without address"
	}
	addr, err := validAddress(e.Addresses[0]) // further ones mean nothing (see EndpointSlice)
	if err != nil {
		return row, err.Error()
	}
	row.addr = addr
	if t := e.TargetRef; t != nil && t.Kind == "Pod" && (t.Namespace == "" || t.Namespace == namespace) {
		row.pod, row.uid = t.Name, string(t.UID)
		if p, ok := d.pods(registry.ObjectName{Namespace: namespace, Name: t.Name}); ok && p.uid == row.uid {
			row.pod, row.uid = p.name, p.uid // the same strings
		}
	}
	row.place = d.place(deref(e.NodeName), deref(e.Zone), deref(e.Hostname))
	row.ready = e.Conditions.Ready == nil || *e.Conditions.Ready
	serving := row.ready
	if e.Conditions.Serving != nil {
		serving = *e.Conditions.Serving
	}
	ending := e.Conditions.Terminating != nil && *e.Conditions.Terminating
	switch {
	case ending && serving:
		row.health = terminating
	case row.ready && !ending:
		row.health = ready
	default:
		row.health = notReady
	}
	return row, ""
}

// validAddress refuses what cannot be the address of a workload: to send there would mean
// to send to oneself, to everybody, or to the metadata service of a cloud.
func validAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return addr, fmt.Errorf("%q, which is not an address", cut(text))
	case addr.Zone() != "":
		return addr, fmt.Errorf("%q, which has a zone", cut(text))
	}
	addr = addr.Unmap()
	if addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast() || addr.IsLinkLocalUnicast() {
		return addr, fmt.Errorf("%s, which no workload can have", addr)
	}
	return addr, nil
}

func (d *reducer) pod(object any) (*podRow, bool) {
	p, ok := object.(*corev1.Pod)
	if !ok || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil, false
	}
	r := &podRow{
		name: p.Name, uid: string(p.UID), node: d.names.String(p.Spec.NodeName),
		account: d.names.String(first(p.Spec.ServiceAccountName, "default")),
		network: federation.Network(d.names.String(p.Labels[NetworkLabel])),
	}
	var problems []string
	r.labels = d.labels(p.Labels, &problems)
	r.role, r.istio = proxyOf(p.Labels)
	if r.role != "" {
		r.takeAddresses(p, &problems)
	}
	if r.role == federation.GatewayRole {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady {
				r.ready = c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
			}
		}
	}
	if len(problems) > 0 {
		r.problems = &problems
	}
	return r, true
}

// proxyOf tells which proxy a pod has by its labels, and whether it is Istio's.
func proxyOf(labels map[string]string) (role federation.ProxyRole, istio bool) {
	switch labels[ProxyLabel] {
	case "gateway":
		return federation.GatewayRole, false
	case "":
	default:
		return federation.Sidecar, false
	}
	switch {
	case labels[istioGatewayLabel] == "eastwestgateway":
		return federation.GatewayRole, true
	case labels[tlsModeLabel] == "istio":
		return federation.Sidecar, true
	}
	return "", false
}

func (r *podRow) takeAddresses(p *corev1.Pod, problems *[]string) {
	list := p.Status.PodIPs
	if len(list) == 0 && p.Status.PodIP != "" {
		list = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	r.addresses = make([]netip.Addr, 0, len(list))
	for _, ip := range list {
		addr, err := validAddress(ip.IP)
		if err != nil {
			*problems = append(*problems, "its address is "+err.Error())
			continue
		}
		r.addresses = append(r.addresses, addr)
	}
	slices.SortFunc(r.addresses, netip.Addr.Compare)
}

func node(object any) (*nodeRow, bool) {
	n, ok := object.(*corev1.Node)
	if !ok {
		return nil, false
	}
	r := &nodeRow{locality: federation.Locality{
		Region: first(n.Labels[corev1.LabelTopologyRegion], n.Labels[corev1.LabelFailureDomainBetaRegion]),
		Zone:   first(n.Labels[corev1.LabelTopologyZone], n.Labels[corev1.LabelFailureDomainBetaZone]), Subzone: n.Labels[subzoneLabel],
	}}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for _, a := range n.Status.Addresses {
			if a.Type == kind && len(r.addresses) == 0 {
				r.addresses = append(r.addresses, a.Address)
			}
		}
	}
	return r, true
}

func namespace(object any) (*namespaceRow, bool) {
	n, ok := object.(*corev1.Namespace)
	if !ok {
		return nil, false
	}
	return &namespaceRow{
		network:  federation.Network(n.Labels[NetworkLabel]),
		injected: n.Labels[injectionLabel] == "enabled" || n.Labels[istioInjection] == "enabled",
	}, n.DeletionTimestamp == nil
}

// configObject keeps an object of configuration whole, but for what Kubernetes and kubectl
// add to it. One that is too large has no Raw.
func configObject(source federation.SourceID, kind string) func(object any) (*federation.Object, bool) {
	return func(object any) (*federation.Object, bool) {
		u, ok := object.(*unstructured.Unstructured)
		if !ok {
			return nil, false
		}
		o := &federation.Object{
			Source: source, APIVersion: u.GetAPIVersion(), Kind: kind, Namespace: u.GetNamespace(), Name: u.GetName(),
			Created: u.GetCreationTimestamp().UTC(), Generation: u.GetGeneration(),
		}
		content := maps.Clone(u.Object)
		delete(content, "status")
		if meta, ok := content["metadata"].(map[string]any); ok {
			meta = maps.Clone(meta)
			delete(meta, "managedFields")
			delete(meta, "resourceVersion") // changes with every status
			if annotations, ok := meta["annotations"].(map[string]any); ok {
				annotations = maps.Clone(annotations)
				delete(annotations, lastApplied)
				meta["annotations"] = annotations
			}
			content["metadata"] = meta
		}
		raw, err := json.Marshal(content)
		if err == nil && len(raw) <= objectBytes {
			o.Raw = raw
		}
		return o, true
	}
}

// cut bounds what strangers wrote, for messages.
func cut(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func first(list ...string) string {
	for _, s := range list {
		if s != "" {
			return s
		}
	}
	return ""
}
