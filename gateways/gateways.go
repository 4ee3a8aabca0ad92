// SPDX-License-Identifier: Apache-2.0

// Package gateways makes the resources of east-west gateways and finds their addresses.
//
// A gateway has one listener with one filter chain. It passes mutual TLS through without
// ending it: the caller's SNI names the service, the workload behind it checks the caller.
// What an SNI can name is bounded three times. The chain takes only connections that
// offer the mesh's ALPN, and only names under svc.cluster.local or svc.clusterset.local,
// so no other cluster of that Envoy (its way to the control service, for one) can be
// named. Clusters exist only for exported services. And they hold only endpoints of the
// gateway's own network that speak mutual TLS themselves, so that no caller hops twice.
// One reserved name leads to the agent beside this Envoy, which speaks mutual TLS as any
// workload does and answers nothing but who called: join and check prove the path by it.
//
// Envoy reads an SNI without regard to case, as RFC 6066 says of names. A name in upper
// case is therefore the same name, and opens nothing that the name in lower case does not.
//
// What was refused is counted: listener.eastwest.no_filter_chain_match for a missing
// ALPN or a foreign name, tcp.eastwest.downstream_cx_no_route for services that are not
// exported, and per service cluster.<sni>.upstream_cx_* and …_bytes_total for what passed.
package gateways

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsinspectv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	sniv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/sni_cluster/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// Names of the gateway's listener and of its statistics.
const (
	Listener   = "eastwest"
	StatPrefix = "eastwest"
)

// The suffixes that an SNI may have.
var suffixes = []string{"*.svc." + federation.ClusterDomain, "*.svc." + federation.ClustersetDomain}

// Build makes everything an east-west gateway is told, as xds.Build does for sidecars.
// view must be that of the proxy's scope.
func Build(view *federation.View, index *config.Index, proxy xds.Proxy) (xds.Resources, []federation.Finding) {
	b := &Builder{}
	return b.BuildClass(view, index, b.Class(view, index, proxy))
}

// Builder is Build with a memory: it makes again only the services that have changed. It
// is not safe for concurrent use.
type Builder struct {
	// LogFormat of access logs; empty means xds.AccessLogFormat.
	LogFormat string

	view  *federation.View
	index *config.Index
	parts map[*federation.Service]*part
	doors doors
}

// part is what one service contributes.
type part struct {
	resources map[string]map[string]xds.Resource // by type URL, then name
	findings  []federation.Finding
	doors     map[string]bool // its open ones
}

// Class is what gateways of one network have in common.
func (b *Builder) Class(_ *federation.View, _ *config.Index, proxy xds.Proxy) xds.Class {
	return xds.GatewayClass(proxy)
}

// Moved names nobody: a gateway's class depends on itself alone.
func (b *Builder) Moved(*federation.View, *config.Index) ([]federation.WorkloadKey, bool) {
	return nil, false
}

// Forget does nothing: a gateway has no weights of other networks.
func (b *Builder) Forget(...federation.ServiceName) {}

// BuildClass makes everything the gateways of a class are told.
func (b *Builder) BuildClass(view *federation.View, index *config.Index, class xds.Class) (xds.Resources, []federation.Finding) {
	if b.view != nil && b.view.Scope != view.Scope {
		*b = Builder{LogFormat: b.LogFormat}
	}
	parts := make(map[*federation.Service]*part, len(view.Services))
	all := map[string]map[string]xds.Resource{}
	var findings []federation.Finding
	add := func(p *part) {
		findings = append(findings, p.findings...)
		for typeURL, byName := range p.resources {
			if all[typeURL] == nil {
				all[typeURL] = map[string]xds.Resource{}
			}
			maps.Copy(all[typeURL], byName)
		}
	}
	frame := &part{}
	frame.put("Listener "+Listener, xds.ListenerType, Listener, func() (validatable, error) { return listener(class.V6, b.LogFormat) })
	frame.put("the probe of the path", xds.ClusterType, api.ProbeName, func() (validatable, error) { return probeCluster(), nil })
	add(frame)
	for _, s := range view.Services {
		p := b.parts[s]
		if p == nil || b.index != index {
			p = servicePart(index, s)
		}
		parts[s] = p
		add(p)
	}
	b.doors.turn(b.view, b.parts, view, parts)
	b.doors.keep(all)
	b.view, b.index, b.parts = view, index, parts
	resources := xds.Resources{}
	for typeURL, byName := range all {
		for _, name := range slices.Sorted(maps.Keys(byName)) {
			resources[typeURL] = append(resources[typeURL], byName[name])
		}
	}
	return resources, findings
}

type validatable interface {
	proto.Message
	ValidateAll() error
}

func (p *part) put(object, typeURL, name string, make func() (validatable, error)) {
	m, err := make()
	if err == nil {
		err = m.ValidateAll()
	}
	var r xds.Resource
	if err == nil {
		r, err = xds.NewResource(name, m)
	}
	if err != nil {
		p.findings = append(p.findings, federation.Finding{
			Code: xds.CodeNotBuilt, Severity: federation.SeverityError, Object: object,
			Message: fmt.Sprintf("%s cannot be built for the gateway and is left out: %v", name, err),
		})
		return
	}
	if p.resources == nil {
		p.resources = map[string]map[string]xds.Resource{}
	}
	if p.resources[typeURL] == nil {
		p.resources[typeURL] = map[string]xds.Resource{}
	}
	p.resources[typeURL][name] = r
}

// build makes the part of one service.
type build struct {
	part
	index *config.Index
	svc   *federation.Service
}

func servicePart(index *config.Index, s *federation.Service) *part {
	b := &build{index: index, svc: s}
	b.service()
	return &b.part
}

// service makes a cluster for each port, subset and named pod.
func (b *build) service() {
	s := b.svc
	if s.Type == federation.ExternalName || slices.Contains(s.ExportTo, "~") || s.Name == probeService {
		return
	}
	rule, _ := b.index.DestinationRule(s.Name.Namespace, nil, s.Name)
	subsets := make(map[string]map[string]string, len(rule.GetSubsets()))
	for _, subset := range rule.GetSubsets() {
		subsets[subset.Name] = subset.Labels
	}
	for _, port := range s.Ports {
		b.cluster(federation.SNI(port.Number, "", s.Host), b.hosts(s.Endpoints, port.Number, nil))
		for name, labels := range subsets {
			b.cluster(federation.SNI(port.Number, name, s.Host), b.hosts(s.Endpoints, port.Number, labels))
		}
		for i := range s.Pods {
			pod := &s.Pods[i]
			if pod.Host == pod.SNIHost {
				own := []federation.ServiceEndpoint{pod.Endpoint}
				b.cluster(federation.SNI(port.Number, "", pod.SNIHost), b.hosts(own, port.Number, nil))
			}
		}
	}
}

// behind is what an SNI leads to.
type behind struct {
	hosts   []*endpointv3.LbEndpoint
	present bool // there are endpoints, of whatever health
	open    bool // some of them take calls
}

// hosts are the endpoints that other networks may reach here: those that are ready, or if
// there are none those that still serve while they terminate, or else those that are not
// ready. Callers know themselves that none is ready, and come only in the moment in which
// they or the gateway have heard of a change and the other has not: who comes too early or
// too late is let through, because callers take a gateway that turns them away for dead.
func (b *build) hosts(list []federation.ServiceEndpoint, port uint32, labels map[string]string) (out behind) {
	var ready, terminating, unready []*endpointv3.LbEndpoint
	for i := range list {
		e := &list[i]
		target, ok := e.TargetPorts[port]
		if !ok || !e.Direct || !e.Mesh || len(e.Addresses) == 0 || !covers(labels, e.Labels) {
			continue
		}
		if b.index.MutualTLS(b.svc.Name.Namespace, e.Labels, target) == config.Disable {
			continue
		}
		out.present = true
		host := lbEndpoint(e.Addresses[0], target)
		switch e.Health {
		case federation.Ready:
			ready = append(ready, host)
		case federation.Terminating:
			terminating = append(terminating, host)
		default:
			unready = append(unready, host)
		}
	}
	out.open = len(ready)+len(terminating) > 0
	for _, hosts := range [][]*endpointv3.LbEndpoint{ready, terminating, unready} {
		if len(hosts) > 0 {
			out.hosts = hosts
			break
		}
	}
	return out
}

func covers(want, labels map[string]string) bool {
	for k, v := range want {
		if labels[k] != v {
			return false
		}
	}
	return true
}

func lbEndpoint(ip netip.Addr, port uint32) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
		Endpoint: &endpointv3.Endpoint{Address: socketAddress(ip.String(), port)},
	}}
}

// cluster is made for services that have endpoints here, of whatever health: it must not
// come and go with their readiness. Its name is the SNI in lower case, as Envoy compares
// it.
func (b *build) cluster(sni string, to behind) {
	if !to.present {
		return
	}
	name, object := strings.ToLower(sni), "Service "+b.svc.Name.String()
	if to.open {
		if b.doors == nil {
			b.doors = map[string]bool{}
		}
		b.doors[name] = true
	}
	b.put(object, xds.ClusterType, name, func() (validatable, error) { return cluster(name), nil })
	b.put(object, xds.EndpointType, name, func() (validatable, error) {
		cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
		if len(to.hosts) > 0 {
			cla.Endpoints = []*endpointv3.LocalityLbEndpoints{{LbEndpoints: to.hosts}}
		}
		return cla, nil
	})
}

func cluster(name string) *clusterv3.Cluster {
	most, never := wrapperspb.UInt32(math.MaxUint32), wrapperspb.UInt32(0)
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
		ConnectTimeout:       durationpb.New(time.Second),
		LbPolicy:             clusterv3.Cluster_LEAST_REQUEST,
		// A network that lost its way must not lose all: where every pod was taken out, each
		// is tried again.
		CommonLbConfig: &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 1}},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections: most, MaxPendingRequests: most, MaxRequests: most, MaxRetries: most,
		}}},
		OutlierDetection: &clusterv3.OutlierDetection{
			// One failure is enough, and any number of pods may go: who cannot be connected to
			// inside its own network has probably vanished before the gateway was told, and a
			// caller that cannot be connected takes the gateway for dead.
			SplitExternalLocalOriginErrors: true, ConsecutiveLocalOriginFailure: wrapperspb.UInt32(1),
			EnforcingConsecutiveLocalOriginFailure: wrapperspb.UInt32(100),
			Interval:                               durationpb.New(time.Second),
			BaseEjectionTime:                       durationpb.New(time.Second),
			MaxEjectionTime:                        durationpb.New(10 * time.Second),
			MaxEjectionPercent:                     wrapperspb.UInt32(100),
			EnforcingConsecutive_5Xx:               never, EnforcingConsecutiveGatewayFailure: never,
			EnforcingSuccessRate: never, EnforcingLocalOriginSuccessRate: never,
		},
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{TcpKeepalive: keepalive()},
	}
}

func keepalive() *corev3.TcpKeepalive {
	return &corev3.TcpKeepalive{
		KeepaliveProbes: wrapperspb.UInt32(3), KeepaliveTime: wrapperspb.UInt32(10), KeepaliveInterval: wrapperspb.UInt32(5),
	}
}

// listener has the one chain. There is no default chain: what it does not take is closed.
func listener(v6 bool, logFormat string) (validatable, error) {
	inspector, err := pack(&tlsinspectv3.TlsInspector{})
	if err != nil {
		return nil, err
	}
	sni, err := pack(&sniv3.SniCluster{})
	if err != nil {
		return nil, err
	}
	log, err := xds.AccessLog(logFormat)
	if err != nil {
		return nil, err
	}
	tcp, err := pack(&tcpv3.TcpProxy{
		StatPrefix: StatPrefix,
		AccessLog:  log,
		// The SNI names the cluster. This one does not exist.
		ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: "BlackHoleCluster"},
		// Pods that are no longer there are taken out one by one, a second each if they do not
		// even refuse; a caller gives up after four.
		MaxConnectAttempts: wrapperspb.UInt32(5),
		// The next attempt waits until the one that failed was taken out, which takes a moment.
		BackoffOptions: &corev3.BackoffStrategy{
			BaseInterval: durationpb.New(10 * time.Millisecond), MaxInterval: durationpb.New(100 * time.Millisecond),
		},
		IdleTimeout: durationpb.New(time.Hour),
	})
	if err != nil {
		return nil, err
	}
	l := &listenerv3.Listener{
		Name:                   Listener,
		Address:                socketAddress("0.0.0.0", xds.GatewayPort),
		ListenerFiltersTimeout: durationpb.New(5 * time.Second),
		ListenerFilters: []*listenerv3.ListenerFilter{{
			Name: "envoy.filters.listener.tls_inspector", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: inspector},
		}},
		FilterChains: []*listenerv3.FilterChain{{
			Name: "passthrough",
			FilterChainMatch: &listenerv3.FilterChainMatch{
				TransportProtocol: "tls", ApplicationProtocols: xds.ALPN, ServerNames: suffixes,
			},
			Filters: []*listenerv3.Filter{
				{Name: "envoy.filters.network.sni_cluster", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: sni}},
				{Name: "envoy.filters.network.tcp_proxy", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: tcp}},
			},
		}},
		TrafficDirection: corev3.TrafficDirection_INBOUND,
		StatPrefix:       Listener,
	}
	if v6 {
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: socketAddress("::", xds.GatewayPort)}}
	}
	return l, nil
}

func pack(m proto.Message) (*anypb.Any, error) {
	out := &anypb.Any{}
	return out, anypb.MarshalFrom(out, m, proto.MarshalOptions{Deterministic: true})
}

func socketAddress(host string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3,
	}
}
