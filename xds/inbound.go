// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
)

// PlaintextRefused prefixes the statistics of connections that a STRICT port refused
// because they were not mutual TLS: tcp.inbound_plaintext_refused.downstream_cx_total.
const PlaintextRefused = "inbound_plaintext_refused"

// inboundPort is a port of the workload that services send to.
type inboundPort struct {
	number   uint32
	protocol federation.Protocol
	mode     mtlsMode
}

// mtlsMode is what an inbound port asks of its callers.
type mtlsMode string

const (
	permissive mtlsMode = config.Permissive // mutual TLS and plaintext
	strict     mtlsMode = config.Strict
	disabled   mtlsMode = config.Disable // plaintext, or the application's own TLS
)

// virtualInbound takes every inbound connection. Its chains are told apart by port, then
// by whether the caller offers the mesh's TLS, then (on ports of unknown protocol) by
// what the first bytes look like.
func (p *packer) virtualInbound(f families, ports []inboundPort, rest mtlsMode) *listenerv3.Listener {
	l := f.bind(VirtualInbound, InboundPort)
	l.TrafficDirection = corev3.TrafficDirection_INBOUND
	l.ListenerFiltersTimeout = durationpb.New(inboundSniff)
	l.ContinueOnListenerFiltersTimeout = true
	l.ListenerFilters = []*listenerv3.ListenerFilter{p.originalDstFilter()}
	l.ListenerFilters = append(l.ListenerFilters, p.inspectors(ports)...)

	// A connection made to the port itself would come back to it for ever.
	trap := chain("virtualInbound-trap", p.tcpFilter(tcpTo(BlackHoleCluster, BlackHoleCluster)))
	trap.FilterChainMatch = &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(InboundPort)}
	l.FilterChains = append(l.FilterChains, trap)
	for _, port := range ports {
		l.FilterChains = append(l.FilterChains, p.portChains(port)...)
	}
	l.FilterChains = append(l.FilterChains, p.restChains(rest)...)
	return l
}

// inspectors look at first bytes only where these decide something: a protocol in which
// the server speaks first would only wait.
func (p *packer) inspectors(ports []inboundPort) []*listenerv3.ListenerFilter {
	tls, http := p.tlsInspector(), p.httpInspector()
	var noTLS, sniff []uint32
	for _, port := range ports {
		if port.mode == disabled {
			noTLS = append(noTLS, port.number)
		}
		if port.protocol == federation.Unknown && port.mode != strict {
			sniff = append(sniff, port.number)
		}
	}
	tls.FilterDisabled = onPorts(noTLS)
	if len(sniff) == 0 {
		return []*listenerv3.ListenerFilter{tls}
	}
	http.FilterDisabled = &listenerv3.ListenerFilterChainMatchPredicate{
		Rule: &listenerv3.ListenerFilterChainMatchPredicate_NotMatch{NotMatch: onPorts(sniff)},
	}
	return []*listenerv3.ListenerFilter{tls, http}
}

// onPorts matches destination ports; nil for none.
func onPorts(ports []uint32) *listenerv3.ListenerFilterChainMatchPredicate {
	rules := make([]*listenerv3.ListenerFilterChainMatchPredicate, 0, len(ports))
	for _, port := range ports {
		rules = append(rules, &listenerv3.ListenerFilterChainMatchPredicate{
			Rule: &listenerv3.ListenerFilterChainMatchPredicate_DestinationPortRange{
				DestinationPortRange: &typev3.Int32Range{Start: int32(port), End: int32(port) + 1},
			},
		})
	}
	switch len(rules) {
	case 0:
		return nil
	case 1:
		return rules[0]
	}
	return &listenerv3.ListenerFilterChainMatchPredicate{
		Rule: &listenerv3.ListenerFilterChainMatchPredicate_OrMatch{
			OrMatch: &listenerv3.ListenerFilterChainMatchPredicate_MatchSet{Rules: rules},
		},
	}
}

// portChains are the chains of one port of the workload.
func (p *packer) portChains(port inboundPort) []*listenerv3.FilterChain {
	cluster := federation.InboundCluster(port.number)
	name := fmt.Sprintf("0.0.0.0_%d", port.number)
	http := func(secure bool) *listenerv3.Filter { return p.httpFilter(p.inboundHTTP(name, cluster, secure)) }
	tcp := p.tcpFilter(tcpTo(cluster, cluster))
	known := port.protocol.IsHTTP()

	var out []*listenerv3.FilterChain
	add := func(kind string, match *listenerv3.FilterChainMatch, filter *listenerv3.Filter, socket *corev3.TransportSocket) {
		match.DestinationPort = wrapperspb.UInt32(port.number)
		out = append(out, &listenerv3.FilterChain{
			Name: name + "-" + kind, FilterChainMatch: match, TransportSocket: socket,
			Filters: []*listenerv3.Filter{filter},
		})
	}
	if port.mode != disabled {
		mesh := p.meshServer()
		secure := tcp
		if known {
			secure = http(true)
		}
		if port.protocol == federation.Unknown {
			add("mesh-http", offeringTLS(httpALPN), http(true), mesh)
		}
		add("mesh", offeringTLS(ALPN...), secure, mesh)
	}
	switch {
	case port.mode == strict:
		add("refused-tls", offeringTLS(), p.refusal(), nil)
		add("refused", raw(), p.refusal(), nil)
		return out
	case port.mode == disabled && known:
		add("plain", &listenerv3.FilterChainMatch{}, http(false), nil)
		return out
	}
	// TLS of the application's own making is not for us to end.
	add("tls", offeringTLS(), tcp, nil)
	switch {
	case known:
		add("plain", raw(), http(false), nil)
	case port.protocol == federation.Unknown:
		add("plain-http", raw(sniffedHTTP...), http(false), nil)
		add("plain", raw(), tcp, nil)
	default:
		add("plain", raw(), tcp, nil)
	}
	return out
}

// restChains take connections to ports that no service has.
func (p *packer) restChains(mode mtlsMode) []*listenerv3.FilterChain {
	tcp := p.tcpFilter(tcpTo(InboundPassthroughCluster, InboundPassthroughCluster))
	var out []*listenerv3.FilterChain
	add := func(kind string, match *listenerv3.FilterChainMatch, filter *listenerv3.Filter, socket *corev3.TransportSocket) {
		out = append(out, &listenerv3.FilterChain{
			Name: VirtualInbound + "-" + kind, FilterChainMatch: match, TransportSocket: socket,
			Filters: []*listenerv3.Filter{filter},
		})
	}
	if mode != disabled {
		add("mesh", offeringTLS(ALPN...), tcp, p.meshServer())
	}
	if mode == strict {
		add("refused-tls", offeringTLS(), p.refusal(), nil)
		add("refused", raw(), p.refusal(), nil)
		return out
	}
	add("tls", offeringTLS(), tcp, nil)
	add("plain", raw(), tcp, nil)
	return out
}

// Envoy descends from port to transport to application protocol and does not come back:
// who fits the first two and no third finds no chain. So both transports are always
// given a chain for any application protocol.

func offeringTLS(alpn ...string) *listenerv3.FilterChainMatch {
	return &listenerv3.FilterChainMatch{TransportProtocol: "tls", ApplicationProtocols: slices.Clone(alpn)}
}

func raw(sniffed ...string) *listenerv3.FilterChainMatch {
	return &listenerv3.FilterChainMatch{TransportProtocol: "raw_buffer", ApplicationProtocols: slices.Clone(sniffed)}
}

// refusal closes at once, under a name of its own in the statistics.
func (p *packer) refusal() *listenerv3.Filter {
	return p.tcpFilter(tcpTo(PlaintextRefused, BlackHoleCluster))
}
