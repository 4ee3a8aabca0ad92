// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1alpha3"
)

// trafficFor is the policy of a port: what the port says replaces, field by field, what
// the whole says; a subset's policy replaces the rule's in the same way.
func trafficFor(rule, subset *networking.TrafficPolicy, port uint32) *networking.TrafficPolicy {
	out := &networking.TrafficPolicy{}
	for _, t := range []*networking.TrafficPolicy{rule, subset} {
		if t == nil {
			continue
		}
		overlay(out, t.LoadBalancer, t.ConnectionPool, t.OutlierDetection, t.Tls)
		for _, p := range t.PortLevelSettings {
			if p.Port.GetNumber() == port {
				overlay(out, p.LoadBalancer, p.ConnectionPool, p.OutlierDetection, p.Tls)
			}
		}
	}
	return out
}

func overlay(out *networking.TrafficPolicy, lb *networking.LoadBalancerSettings, pool *networking.ConnectionPoolSettings,
	outlier *networking.OutlierDetection, tls *networking.ClientTLSSettings) {
	if lb != nil {
		out.LoadBalancer = lb
	}
	if pool != nil {
		out.ConnectionPool = pool
	}
	if outlier != nil {
		out.OutlierDetection = outlier
	}
	if tls != nil {
		out.Tls = tls
	}
}

// applyTraffic changes a cluster as a DestinationRule asks.
func (p *packer) applyTraffic(c *clusterv3.Cluster, t target, policy *networking.TrafficPolicy) error {
	if err := balance(c, policy.GetLoadBalancer()); err != nil {
		return fmt.Errorf("loadBalancer: %w", err)
	}
	if err := p.limitConnections(c, policy.GetConnectionPool()); err != nil {
		return fmt.Errorf("connectionPool: %w", err)
	}
	judge(c, policy.GetOutlierDetection())
	if err := p.clientTLS(c, t, policy.GetTls()); err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	return nil
}

func balance(c *clusterv3.Cluster, lb *networking.LoadBalancerSettings) error {
	if w := lb.GetWarmupDurationSecs(); w != nil {
		slow := &clusterv3.Cluster_SlowStartConfig{SlowStartWindow: w}
		c.LbConfig = &clusterv3.Cluster_LeastRequestLbConfig_{LeastRequestLbConfig: &clusterv3.Cluster_LeastRequestLbConfig{SlowStartConfig: slow}}
	}
	switch {
	case lb == nil:
	case lb.GetConsistentHash() != nil:
		return hashRing(c, lb.GetConsistentHash())
	default:
		switch lb.GetSimple() {
		case networking.LoadBalancerSettings_ROUND_ROBIN:
			c.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
			c.LbConfig = nil
		case networking.LoadBalancerSettings_RANDOM:
			c.LbPolicy = clusterv3.Cluster_RANDOM
			c.LbConfig = nil
		case networking.LoadBalancerSettings_PASSTHROUGH:
			c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
			c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST}
			c.EdsClusterConfig, c.LbSubsetConfig, c.LbConfig = nil, nil, nil
		}
	}
	return nil
}

func hashRing(c *clusterv3.Cluster, h *networking.LoadBalancerSettings_ConsistentHashLB) error {
	if h.GetHashKey() == nil {
		return fmt.Errorf("consistentHash: names no key; give httpHeaderName, httpCookie, useSourceIp or httpQueryParameterName")
	}
	if h.GetMaglev() != nil {
		c.LbPolicy = clusterv3.Cluster_MAGLEV
		if size := h.GetMaglev().GetTableSize(); size != 0 {
			c.LbConfig = &clusterv3.Cluster_MaglevLbConfig_{MaglevLbConfig: &clusterv3.Cluster_MaglevLbConfig{TableSize: wrapperspb.UInt64(size)}}
		}
		return nil
	}
	c.LbPolicy = clusterv3.Cluster_RING_HASH
	size := h.GetRingHash().GetMinimumRingSize()
	if size == 0 {
		//lint:ignore SA1019 users still write it
		size = h.GetMinimumRingSize()
	}
	if size == 0 {
		size = 1024
	}
	c.LbConfig = &clusterv3.Cluster_RingHashLbConfig_{RingHashLbConfig: &clusterv3.Cluster_RingHashLbConfig{MinimumRingSize: wrapperspb.UInt64(min(size, 8<<20))}}
	return nil
}

// limitConnections applies limits; what is not said stays unlimited.
func (p *packer) limitConnections(c *clusterv3.Cluster, pool *networking.ConnectionPoolSettings) error {
	if pool == nil {
		return nil
	}
	limit := c.CircuitBreakers.Thresholds[0]
	set := func(to **wrapperspb.UInt32Value, n int32) {
		if n > 0 {
			*to = wrapperspb.UInt32(uint32(n))
		}
	}
	if tcp := pool.Tcp; tcp != nil {
		set(&limit.MaxConnections, tcp.MaxConnections)
		if tcp.ConnectTimeout.AsDuration() > 0 {
			c.ConnectTimeout = tcp.ConnectTimeout
		}
		if k := tcp.TcpKeepalive; k != nil {
			keep := &corev3.TcpKeepalive{}
			if k.Probes > 0 {
				keep.KeepaliveProbes = wrapperspb.UInt32(k.Probes)
			}
			if k.Time != nil {
				keep.KeepaliveTime = wrapperspb.UInt32(uint32(k.Time.Seconds))
			}
			if k.Interval != nil {
				keep.KeepaliveInterval = wrapperspb.UInt32(uint32(k.Interval.Seconds))
			}
			c.UpstreamConnectionOptions = &clusterv3.UpstreamConnectionOptions{TcpKeepalive: keep}
		}
	}
	h := pool.Http
	if h == nil {
		return nil
	}
	set(&limit.MaxPendingRequests, h.Http1MaxPendingRequests)
	set(&limit.MaxRequests, h.Http2MaxRequests)
	set(&limit.MaxRetries, h.MaxRetries)
	return p.changeHTTPOptions(c, func(o *httpv3.HttpProtocolOptions) {
		common := o.CommonHttpProtocolOptions
		if h.IdleTimeout != nil {
			common.IdleTimeout = h.IdleTimeout
		}
		if h.MaxRequestsPerConnection > 0 {
			common.MaxRequestsPerConnection = wrapperspb.UInt32(uint32(h.MaxRequestsPerConnection))
		}
		if h.H2UpgradePolicy == networking.ConnectionPoolSettings_HTTPSettings_UPGRADE {
			o.UpstreamProtocolOptions = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
				},
			}
		}
	})
}

// changeHTTPOptions edits the options of a cluster that has any.
func (p *packer) changeHTTPOptions(c *clusterv3.Cluster, change func(*httpv3.HttpProtocolOptions)) error {
	packed := c.TypedExtensionProtocolOptions[httpOptionsKey]
	if packed == nil {
		return nil
	}
	options := &httpv3.HttpProtocolOptions{}
	if err := packed.UnmarshalTo(options); err != nil {
		return err
	}
	change(options)
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: p.any(options)}
	return nil
}

// judge adds the user's outlier detection to the mesh's own, which keeps judging connects.
func judge(c *clusterv3.Cluster, o *networking.OutlierDetection) {
	if o == nil {
		return
	}
	d := connectJudge()
	if o.Consecutive_5XxErrors != nil {
		d.Consecutive_5Xx = o.Consecutive_5XxErrors
		d.EnforcingConsecutive_5Xx = enforced(o.Consecutive_5XxErrors.Value)
	}
	if o.ConsecutiveGatewayErrors != nil {
		d.ConsecutiveGatewayFailure = o.ConsecutiveGatewayErrors
		d.EnforcingConsecutiveGatewayFailure = enforced(o.ConsecutiveGatewayErrors.Value)
	}
	if o.Consecutive_5XxErrors == nil && o.ConsecutiveGatewayErrors == nil {
		d.Consecutive_5Xx, d.EnforcingConsecutive_5Xx = wrapperspb.UInt32(5), wrapperspb.UInt32(100) // Istio's default
	}
	if o.SplitExternalLocalOriginErrors && o.ConsecutiveLocalOriginFailures != nil {
		d.ConsecutiveLocalOriginFailure = o.ConsecutiveLocalOriginFailures
		d.EnforcingConsecutiveLocalOriginFailure = enforced(o.ConsecutiveLocalOriginFailures.Value)
	}
	if o.Interval != nil {
		d.Interval = o.Interval
	}
	if o.BaseEjectionTime != nil {
		d.BaseEjectionTime = o.BaseEjectionTime
		d.MaxEjectionTime = durationpb.New(max(d.MaxEjectionTime.AsDuration(), o.BaseEjectionTime.AsDuration()))
	}
	if o.MaxEjectionPercent > 0 {
		d.MaxEjectionPercent = wrapperspb.UInt32(uint32(o.MaxEjectionPercent))
	}
	if o.MinHealthPercent > 0 {
		c.CommonLbConfig = &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: float64(o.MinHealthPercent)}}
	}
	c.OutlierDetection = d
}

func enforced(threshold uint32) *wrapperspb.UInt32Value {
	if threshold == 0 {
		return wrapperspb.UInt32(0)
	}
	return wrapperspb.UInt32(100)
}

// clientTLS replaces automatic mutual TLS by what the user asks for.
func (p *packer) clientTLS(c *clusterv3.Cluster, t target, tls *networking.ClientTLSSettings) error {
	if tls == nil {
		return nil
	}
	switch tls.Mode {
	case networking.ClientTLSSettings_DISABLE:
		c.TransportSocketMatches, c.TransportSocket = nil, p.plain()
	case networking.ClientTLSSettings_ISTIO_MUTUAL:
		sni, identities := t.sni, t.identities
		if tls.Sni != "" {
			sni = tls.Sni
		}
		if len(tls.SubjectAltNames) > 0 {
			identities = tls.SubjectAltNames
		}
		c.TransportSocketMatches, c.TransportSocket = nil, p.meshClient(sni, identities, t.protocol)
	case networking.ClientTLSSettings_SIMPLE, networking.ClientTLSSettings_MUTUAL:
		socket, err := p.ownTLS(tls)
		if err != nil {
			return err
		}
		c.TransportSocketMatches, c.TransportSocket = nil, socket
	}
	return nil
}

// ownTLS is TLS with files of the workload's own.
func (p *packer) ownTLS(tls *networking.ClientTLSSettings) (*corev3.TransportSocket, error) {
	if tls.CredentialName != "" {
		return nil, fmt.Errorf("credentialName %q: secrets are not handed to sidecars; mount the files and name them", tls.CredentialName)
	}
	common := &tlsv3.CommonTlsContext{}
	if tls.Mode == networking.ClientTLSSettings_MUTUAL {
		if tls.ClientCertificate == "" || tls.PrivateKey == "" {
			return nil, fmt.Errorf("mode MUTUAL needs clientCertificate and privateKey")
		}
		common.TlsCertificates = []*tlsv3.TlsCertificate{{
			CertificateChain: file(tls.ClientCertificate), PrivateKey: file(tls.PrivateKey),
		}}
	}
	validation := &tlsv3.CertificateValidationContext{}
	for _, san := range tls.SubjectAltNames {
		for _, kind := range []tlsv3.SubjectAltNameMatcher_SanType{tlsv3.SubjectAltNameMatcher_DNS, tlsv3.SubjectAltNameMatcher_URI} {
			validation.MatchTypedSubjectAltNames = append(validation.MatchTypedSubjectAltNames, &tlsv3.SubjectAltNameMatcher{SanType: kind, Matcher: exactly(san)})
		}
	}
	switch {
	case tls.InsecureSkipVerify.GetValue():
	case tls.CaCertificates != "":
		validation.TrustedCa = file(tls.CaCertificates)
	default:
		validation.TrustedCa = file("/etc/ssl/certs/ca-certificates.crt")
	}
	if validation.TrustedCa != nil {
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: validation}
	}
	return p.tlsSocket(&tlsv3.UpstreamTlsContext{CommonTlsContext: common, Sni: tls.Sni, AutoHostSni: tls.Sni == ""}), nil
}

func file(name string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: name}}
}
