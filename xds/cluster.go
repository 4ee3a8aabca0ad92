// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"math"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	networking "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/federation"
)

// The clusters every sidecar has, beside those of services.
const (
	PassthroughCluster        = "PassthroughCluster"        // to the original destination, unchanged
	BlackHoleCluster          = "BlackHoleCluster"          // to nowhere
	InboundPassthroughCluster = "InboundPassthroughCluster" // to the workload's own ports that no service has
)

// Inbound connections reach the workload from these addresses, so that redirection can
// tell them from calls that the workload makes.
const (
	inboundSourceV4 = "127.0.0.6"
	inboundSourceV6 = "::6"
)

// connectTimeout covers TCP and TLS handshakes, also across gateways.
const connectTimeout = 4 * time.Second

// tlsModeKey is the metadata of endpoints that transport sockets are chosen by, spelled
// as Istio does.
const tlsModeKey, tlsModeMesh = "tlsMode", "istio"

// httpOptionsKey is where Envoy looks for a cluster's HTTP options.
const httpOptionsKey = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// target is one Envoy cluster of a service: what its name, identity and hops are.
type target struct {
	host       string
	name       string // outbound|80|v1|host
	sni        string
	identities []string
	protocol   federation.Protocol
	gateways   bool               // may lead to a gateway
	perPod     bool               // callers choose one endpoint by its address
	subset     *networking.Subset // nil for all endpoints
}

// edsCluster is the cluster of a target with the mesh's defaults.
func (p *packer) edsCluster(t target) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                 t.name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LbPolicy:             clusterv3.Cluster_LEAST_REQUEST,
		CommonLbConfig:       exactPriorities(),
		CircuitBreakers:      unlimited(),
		OutlierDetection:     connectJudge(),
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{
			TcpKeepalive: &corev3.TcpKeepalive{
				KeepaliveProbes:   wrapperspb.UInt32(3),
				KeepaliveTime:     wrapperspb.UInt32(10),
				KeepaliveInterval: wrapperspb.UInt32(5),
			},
		},
		UpstreamBindConfig:     giveUp(),
		TransportSocketMatches: p.autoTLS(t),
	}
	if t.protocol.IsHTTP() || t.protocol == federation.Unknown {
		options := &corev3.HttpProtocolOptions{}
		if t.gateways {
			options.MaxConnectionDuration = durationpb.New(GatewayConnectionDuration)
		}
		p.httpOptions(c, t.protocol, options)
	}
	if t.perPod {
		c.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
		c.LbSubsetConfig = &clusterv3.Cluster_LbSubsetConfig{
			FallbackPolicy: clusterv3.Cluster_LbSubsetConfig_NO_FALLBACK,
			SubsetSelectors: []*clusterv3.Cluster_LbSubsetConfig_LbSubsetSelector{{
				Keys: []string{podAddressKey}, SingleHostPerSubset: true,
			}},
		}
		c.OutlierDetection = nil // the caller has chosen: there is no other to take
	}
	return c
}

// giveUp ends connections whose peer has acknowledged nothing for 10 s. Keepalive probes
// only quiet connections; without this, requests on those into a network that was cut
// would hang for a quarter of an hour.
func giveUp() *corev3.BindConfig {
	const tcp, userTimeout = 6, 18 // IPPROTO_TCP, TCP_USER_TIMEOUT
	return &corev3.BindConfig{SocketOptions: []*corev3.SocketOption{{
		Description: "TCP_USER_TIMEOUT", Level: tcp, Name: userTimeout,
		Value: &corev3.SocketOption_IntValue{IntValue: (10 * time.Second).Milliseconds()},
		State: corev3.SocketOption_STATE_PREBIND,
	}}}
}

// exactPriorities makes the next priority take over by the share of unhealthy hosts and
// nothing else.
func exactPriorities() *clusterv3.Cluster_CommonLbConfig {
	return &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}}
}

// unlimited lifts Envoy's defaults of 1024 connections and requests and 3 retries.
func unlimited() *clusterv3.CircuitBreakers {
	most := wrapperspb.UInt32(math.MaxUint32)
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections: most, MaxPendingRequests: most, MaxRequests: most, MaxRetries: most, TrackRemaining: true,
	}}}
}

// connectJudge takes a hop out that cannot be connected to. What the application behind
// it answers does not count.
func connectJudge() *clusterv3.OutlierDetection {
	never := wrapperspb.UInt32(0)
	return &clusterv3.OutlierDetection{
		SplitExternalLocalOriginErrors:         true,
		ConsecutiveLocalOriginFailure:          wrapperspb.UInt32(3),
		EnforcingConsecutiveLocalOriginFailure: wrapperspb.UInt32(100),
		Interval:                               seconds(1),
		BaseEjectionTime:                       seconds(2),
		MaxEjectionTime:                        seconds(30),
		MaxEjectionPercent:                     wrapperspb.UInt32(100),
		EnforcingConsecutive_5Xx:               never,
		EnforcingConsecutiveGatewayFailure:     never,
		EnforcingSuccessRate:                   never,
		EnforcingLocalOriginSuccessRate:        never,
		EnforcingFailurePercentage:             never,
		EnforcingFailurePercentageLocalOrigin:  never,
	}
}

// autoTLS is mutual TLS to hops of the mesh and plaintext to the rest.
func (p *packer) autoTLS(t target) []*clusterv3.Cluster_TransportSocketMatch {
	return []*clusterv3.Cluster_TransportSocketMatch{
		{
			Name:            "tlsMode-istio",
			Match:           &structpb.Struct{Fields: map[string]*structpb.Value{tlsModeKey: structpb.NewStringValue(tlsModeMesh)}},
			TransportSocket: p.meshClient(t.sni, t.identities, t.protocol),
		},
		{
			Name:            "tlsMode-disabled",
			Match:           &structpb.Struct{},
			TransportSocket: p.plain(),
		},
	}
}

func (p *packer) plain() *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name:       "envoy.transport_sockets.raw_buffer",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: p.any(&rawv3.RawBuffer{})},
	}
}

// httpOptions makes a cluster speak HTTP/2 where the protocol says so, and else what the
// caller spoke.
func (p *packer) httpOptions(c *clusterv3.Cluster, protocol federation.Protocol, common *corev3.HttpProtocolOptions) {
	options := &httpv3.HttpProtocolOptions{CommonHttpProtocolOptions: common}
	h2 := &corev3.Http2ProtocolOptions{}
	switch protocol {
	case federation.HTTP2, federation.GRPC, federation.GRPCWeb:
		options.UpstreamProtocolOptions = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: h2},
			},
		}
	default:
		options.UpstreamProtocolOptions = &httpv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &httpv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions:  &corev3.Http1ProtocolOptions{},
				Http2ProtocolOptions: h2,
			},
		}
	}
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: p.any(options)}
}

// originalDst is a cluster that goes where the connection was meant to go.
func (p *packer) originalDst(name string) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		ConnectTimeout:       seconds(10),
		LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
		CircuitBreakers:      unlimited(),
	}
	p.httpOptions(c, federation.Unknown, &corev3.HttpProtocolOptions{})
	return c
}

func blackHole() *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 BlackHoleCluster,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       seconds(1),
	}
}

// inboundCluster leads to the workload itself, at the address that was called, so that
// programs see what they would see without a mesh: one that listens on loopback only
// stays private.
func (p *packer) inboundCluster(name string, families families) *clusterv3.Cluster {
	c := p.originalDst(name)
	c.UpstreamBindConfig = families.inboundSource()
	return c
}

// families are the address families a proxy has.
type families struct{ v4, v6 bool }

func (f families) inboundSource() *corev3.BindConfig {
	source := func(ip string) *corev3.SocketAddress {
		return &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{}}
	}
	if !f.v4 {
		return &corev3.BindConfig{SourceAddress: source(inboundSourceV6)}
	}
	bind := &corev3.BindConfig{SourceAddress: source(inboundSourceV4)}
	if f.v6 {
		bind.ExtraSourceAddresses = []*corev3.ExtraSourceAddress{{Address: source(inboundSourceV6)}}
	}
	return bind
}
