// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	commonstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	statev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	inspectv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	dstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Names of the listeners that connections arrive at.
const (
	VirtualOutbound = "virtualOutbound"
	VirtualInbound  = "virtualInbound"
)

// How long a listener waits for the first bytes before it decides without them. The
// caller of an outbound listener is in the same pod; that of the inbound one may be a
// continent away and lose a packet, and a TLS hello that is taken for plaintext is a
// failed connection, so it is given longer.
const (
	outboundSniff = 100 * time.Millisecond
	inboundSniff  = time.Second
)

// sniffedHTTP are the application protocols that Envoy's HTTP inspector finds.
var sniffedHTTP = []string{"http/1.0", "http/1.1", "h2c"}

// httpALPN is offered before ALPN by a client that knows, or found on a port of unknown
// protocol, that it speaks HTTP, so that the server need not find it again behind the
// encryption.
const httpALPN = "isthmus-http"

var offeredHTTP = slices.Concat([]string{httpALPN}, ALPN)

// outboundListener is the listener of one address of one service port. route is the
// route configuration for HTTP, cluster the destination of everything else.
func (p *packer) outboundListener(ip string, port uint32, protocol federation.Protocol, http *hcmv3.HttpConnectionManager, tcp *tcpv3.TcpProxy) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name:             listenerName(ip, port),
		Address:          socketAddress(ip, port),
		BindToPort:       wrapperspb.Bool(false),
		TrafficDirection: corev3.TrafficDirection_OUTBOUND,
	}
	switch {
	case protocol.IsHTTP():
		l.DefaultFilterChain = chain("http", p.httpFilter(http))
	case protocol == federation.Unknown:
		l.ListenerFilters = []*listenerv3.ListenerFilter{p.httpInspector()}
		l.ListenerFiltersTimeout = durationpb.New(outboundSniff)
		l.ContinueOnListenerFiltersTimeout = true
		sniffed := chain("http", p.httpFilter(http))
		sniffed.FilterChainMatch = &listenerv3.FilterChainMatch{ApplicationProtocols: sniffedHTTP}
		l.FilterChains = []*listenerv3.FilterChain{sniffed}
		l.DefaultFilterChain = chain("tcp", p.tcpFilter(tcp))
	default:
		l.DefaultFilterChain = chain("tcp", p.tcpFilter(tcp))
	}
	return l
}

// listenerName is Istio's: address, underscore, port.
func listenerName(ip string, port uint32) string { return fmt.Sprintf("%s_%d", ip, port) }

// virtualOutbound takes every outbound connection and hands it to the listener of its
// original destination. What has none goes where it was meant to, or nowhere if the
// workload may call only what is registered.
func (p *packer) virtualOutbound(f families, registryOnly bool) *listenerv3.Listener {
	l := f.bind(VirtualOutbound, OutboundPort)
	l.TrafficDirection = corev3.TrafficDirection_OUTBOUND
	l.UseOriginalDst = wrapperspb.Bool(true)
	rest := PassthroughCluster
	if registryOnly {
		rest = BlackHoleCluster
	}
	// A connection made to the port itself would come back to it for ever.
	trap := chain("virtualOutbound-trap", p.tcpFilter(tcpTo(BlackHoleCluster, BlackHoleCluster)))
	trap.FilterChainMatch = &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(OutboundPort)}
	l.FilterChains = []*listenerv3.FilterChain{trap}
	l.DefaultFilterChain = chain("virtualOutbound-rest", p.tcpFilter(tcpTo(rest, rest)))
	return l
}

// bind is a listener on a port of every family the proxy has.
func (f families) bind(name string, port uint32) *listenerv3.Listener {
	l := &listenerv3.Listener{Name: name, Address: socketAddress("0.0.0.0", port)}
	switch {
	case f.v4 && f.v6:
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: socketAddress("::", port)}}
	case f.v6:
		l.Address = socketAddress("::", port)
	}
	return l
}

func chain(name string, filters ...*listenerv3.Filter) *listenerv3.FilterChain {
	return &listenerv3.FilterChain{Name: name, Filters: filters}
}

// tcpTo is a TCP proxy to a cluster. It tries a second and third host before it gives up,
// and never cuts a connection for its age.
func tcpTo(statPrefix, cluster string) *tcpv3.TcpProxy {
	return &tcpv3.TcpProxy{
		StatPrefix:         statPrefix,
		ClusterSpecifier:   &tcpv3.TcpProxy_Cluster{Cluster: cluster},
		MaxConnectAttempts: wrapperspb.UInt32(3),
		IdleTimeout:        durationpb.New(time.Hour),
	}
}

func (p *packer) tcpFilter(t *tcpv3.TcpProxy) *listenerv3.Filter {
	t.AccessLog = p.accessLog()
	return p.networkFilter("envoy.filters.network.tcp_proxy", t)
}

func (p *packer) httpFilter(h *hcmv3.HttpConnectionManager) *listenerv3.Filter {
	return p.networkFilter("envoy.filters.network.http_connection_manager", h)
}

func (p *packer) networkFilter(name string, config proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: p.any(config)}}
}

func (p *packer) listenerFilter(name string, config proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: p.any(config)}}
}

func (p *packer) httpInspector() *listenerv3.ListenerFilter {
	return p.listenerFilter("envoy.filters.listener.http_inspector", &inspectv3.HttpInspector{})
}

func (p *packer) tlsInspector() *listenerv3.ListenerFilter {
	return p.listenerFilter("envoy.filters.listener.tls_inspector", &tlsinspectv3.TlsInspector{})
}

func (p *packer) originalDstFilter() *listenerv3.ListenerFilter {
	return p.listenerFilter("envoy.filters.listener.original_dst", &dstv3.OriginalDst{})
}

// httpManager has what outbound and inbound HTTP have in common: no time limit that the
// user did not ask for, WebSocket, HTTP/1.0, and headers left as they are.
func (p *packer) httpManager(statPrefix string, filters ...*hcmv3.HttpFilter) *hcmv3.HttpConnectionManager {
	filters = append(filters, &hcmv3.HttpFilter{
		Name:       "envoy.filters.http.router",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: p.any(&routerv3.Router{})},
	})
	return &hcmv3.HttpConnectionManager{
		StatPrefix:                 statPrefix,
		CodecType:                  hcmv3.HttpConnectionManager_AUTO,
		HttpFilters:                filters,
		HttpProtocolOptions:        &corev3.Http1ProtocolOptions{AcceptHttp_10: true},
		StreamIdleTimeout:          durationpb.New(0),
		UpgradeConfigs:             []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		NormalizePath:              wrapperspb.Bool(true),
		ServerHeaderTransformation: hcmv3.HttpConnectionManager_PASS_THROUGH,
		UseRemoteAddress:           wrapperspb.Bool(false),
		AccessLog:                  p.accessLog(),
	}
}

// outboundHTTP serves the routes of a route configuration that comes by itself, so that a
// change of routes closes no connection. X-Forwarded-Client-Cert of the application is
// dropped: identities are for proxies to state.
func (p *packer) outboundHTTP(route string, sniffed bool, filters ...*hcmv3.HttpFilter) *hcmv3.HttpConnectionManager {
	if sniffed {
		filters = append(filters, p.offerHTTP())
	}
	h := p.httpManager("outbound_"+route, filters...)
	h.RouteSpecifier = &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: ads(), RouteConfigName: route}}
	return h
}

// inboundHTTP leads to the workload. secure tells that mutual TLS ends here: then the
// peer's identity replaces whatever the header said.
func (p *packer) inboundHTTP(name, cluster string, secure bool) *hcmv3.HttpConnectionManager {
	h := p.httpManager("inbound_" + name)
	h.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: inboundRoute(cluster)}
	if secure {
		h.ForwardClientCertDetails = hcmv3.HttpConnectionManager_SANITIZE_SET
		h.SetCurrentClientCertDetails = &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{
			Subject: wrapperspb.Bool(true), Uri: true,
		}
	}
	return h
}

func inboundRoute(cluster string) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{
		Name: cluster,
		VirtualHosts: []*routev3.VirtualHost{{
			Name:    "inbound|http",
			Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Name:  "default",
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster},
					Timeout:          durationpb.New(0),
					MaxStreamDuration: &routev3.RouteAction_MaxStreamDuration{
						MaxStreamDuration:    durationpb.New(0),
						GrpcTimeoutHeaderMax: durationpb.New(0),
					},
					RetryPolicy: &routev3.RetryPolicy{RetryOn: "reset-before-request", NumRetries: wrapperspb.UInt32(2)},
				}},
			}},
		}},
		ValidateClusters: wrapperspb.Bool(false),
	}
}

// offerHTTP makes the connections to the upstream offer httpALPN first.
func (p *packer) offerHTTP() *hcmv3.HttpFilter {
	value := strings.Join(offeredHTTP, ",")
	state := &statev3.Config{OnRequestHeaders: []*commonstatev3.FilterStateValue{{
		Key: &commonstatev3.FilterStateValue_ObjectKey{ObjectKey: "envoy.network.application_protocols"},
		Value: &commonstatev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
			Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
				Specifier: &corev3.DataSource_InlineString{InlineString: value},
			}},
		}},
		SharedWithUpstream: commonstatev3.FilterStateValue_ONCE,
	}}}
	return &hcmv3.HttpFilter{
		Name:       "envoy.filters.http.set_filter_state",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: p.any(state)},
	}
}
