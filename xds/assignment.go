// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"net/netip"
	"slices"
	"unicode/utf8"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/federation"
)

// An assignment is the one resource that changes often, and with a thousand endpoints it is
// large. So it is not made as a message: the bytes of its endpoints, a fragment each, are
// written one after the other, as protobuf would write them (a test compares). To write
// one takes less time than to find it among those that were written before.

// Field numbers of envoy.config.endpoint.v3 and envoy.config.core.v3.
const (
	fieldAssignmentName      = 1 // ClusterLoadAssignment.cluster_name
	fieldAssignmentEndpoints = 2 // ClusterLoadAssignment.endpoints
	fieldPlaceLocality       = 1 // LocalityLbEndpoints.locality
	fieldPlaceHosts          = 2 // LocalityLbEndpoints.lb_endpoints
	fieldPlacePriority       = 5 // LocalityLbEndpoints.priority
	fieldHostEndpoint        = 1 // LbEndpoint.endpoint
	fieldHostHealth          = 2 // LbEndpoint.health_status
	fieldHostMetadata        = 3 // LbEndpoint.metadata
	fieldHostWeight          = 4 // LbEndpoint.load_balancing_weight
	fieldEndpointAddress     = 1 // Endpoint.address
	fieldAddressSocket       = 1 // Address.socket_address
	fieldSocketAddress       = 2 // SocketAddress.address
	fieldSocketPort          = 3 // SocketAddress.port_value
	fieldWrappedValue        = 1 // UInt32Value.value
	unhealthy                = 2 // HealthStatus.UNHEALTHY
)

// place is the hops of one priority and locality.
type place struct {
	priority uint32
	locality federation.Locality
	hops     []host
}

// host is a hop with the weight of all that it stands for.
type host struct {
	*federation.Hop
	weight uint32
}

// placed sorts hops into places, both in the order in which they come. Of two hops with
// one address Envoy keeps only the first: it stands for both. Gateways that are known by
// host name only are left out and returned: their names are to be resolved before the view
// is computed (see gateways.Resolver).
func placed(groups []federation.Group) (places []place, unresolved []string) {
	type address struct {
		host string
		port uint32
	}
	type found struct{ place, hop int }
	n := 0
	for i := range groups {
		n += len(groups[i].Hops)
	}
	seen := make(map[address]found, n)
	for i := range groups {
		g, at := &groups[i], -1
		for j := range places {
			if places[j].priority == g.Priority && places[j].locality == g.Locality {
				at = j
			}
		}
		for j := range g.Hops {
			hop := &g.Hops[j]
			if _, err := netip.ParseAddr(hop.Host); err != nil {
				unresolved = append(unresolved, hop.Host)
				continue
			}
			key := address{hop.Host, hop.Port}
			if one, ok := seen[key]; ok {
				if p := &places[one.place]; p.priority == g.Priority {
					p.hops[one.hop].weight += hop.Weight
				}
				continue
			}
			if at < 0 {
				at = len(places)
				places = append(places, place{priority: g.Priority, locality: g.Locality, hops: make([]host, 0, len(g.Hops)-j)})
			}
			seen[key] = found{at, len(places[at].hops)}
			places[at].hops = append(places[at].hops, host{hop, max(1, hop.Weight)})
		}
	}
	return places, unresolved
}

// sound tells whether Envoy's API allows the assignment, as far as what it is made of can
// break a rule; who is told no makes it as a message, to learn which.
func sound(name string, places []place) bool {
	if name == "" || !utf8.ValidString(name) {
		return false
	}
	for i := range places {
		l := &places[i].locality
		if places[i].priority > 128 || !utf8.ValidString(l.Region) || !utf8.ValidString(l.Zone) || !utf8.ValidString(l.Subzone) {
			return false
		}
		for _, hop := range places[i].hops {
			if hop.weight == 0 || hop.Port > 65535 || !utf8.ValidString(hop.Host) {
				return false
			}
		}
	}
	return true
}

// appendAssignment writes a ClusterLoadAssignment. Without places it is empty: Envoy must
// learn that a cluster has no endpoints.
func appendAssignment(b []byte, name string, places []place, perPod bool) []byte {
	const usual = 112 // bytes of an endpoint
	size := len(name)
	for i := range places {
		size += (len(places[i].hops) + 1) * usual
	}
	b = slices.Grow(b, size)
	b = appendText(b, fieldAssignmentName, name)
	for i := range places {
		b = appendNested(b, fieldAssignmentEndpoints, func(b []byte) []byte { return appendPlace(b, &places[i], perPod) })
	}
	return b
}

func appendPlace(b []byte, p *place, perPod bool) []byte {
	if p.locality != (federation.Locality{}) {
		b = appendNested(b, fieldPlaceLocality, func(b []byte) []byte {
			return appendText(appendText(appendText(b, 1, p.locality.Region), 2, p.locality.Zone), 3, p.locality.Subzone)
		})
	}
	for i := range p.hops {
		b = appendNested(b, fieldPlaceHosts, func(b []byte) []byte { return appendHop(b, &p.hops[i], perPod) })
	}
	if p.priority != 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, fieldPlacePriority, protowire.VarintType), uint64(p.priority))
	}
	return b
}

// appendHop writes an LbEndpoint: choices come last, as protobuf writes them.
func appendHop(b []byte, hop *host, perPod bool) []byte {
	if hop.Health != federation.Ready && hop.Health != "" {
		b = protowire.AppendVarint(protowire.AppendTag(b, fieldHostHealth, protowire.VarintType), unhealthy)
	}
	switch {
	case perPod:
		b = appendMetadata(b, metadataOf(hop.Hop, perPod))
	case hop.Mesh:
		b = append(b, meshMetadata...)
	}
	weight := uint64(hop.weight)
	b = appendSize(b, fieldHostWeight, protowire.SizeTag(fieldWrappedValue)+protowire.SizeVarint(weight))
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldWrappedValue, protowire.VarintType), weight)
	// The protocol of a socket address, TCP, is the default and not written.
	socket := bytesSize(fieldSocketAddress, len(hop.Host)) + protowire.SizeTag(fieldSocketPort) + protowire.SizeVarint(uint64(hop.Port))
	address := bytesSize(fieldAddressSocket, socket)
	b = appendSize(b, fieldHostEndpoint, bytesSize(fieldEndpointAddress, address))
	b = appendSize(b, fieldEndpointAddress, address)
	b = appendSize(b, fieldAddressSocket, socket)
	b = appendText(b, fieldSocketAddress, hop.Host)
	return protowire.AppendVarint(protowire.AppendTag(b, fieldSocketPort, protowire.VarintType), uint64(hop.Port))
}

// meshMetadata is the metadata of most endpoints, encoded.
var meshMetadata = appendMetadata(nil, metadataOf(&federation.Hop{Mesh: true}, false))

func appendMetadata(b []byte, filters map[string]*structpb.Struct) []byte {
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(metadataMessage(filters))
	if err != nil {
		return b // only for text that is not UTF-8, which sound does not let in
	}
	return append(appendSize(b, fieldHostMetadata, len(body)), body...)
}

// assignment is the same as a message.
func assignment(name string, places []place, perPod bool) *endpointv3.ClusterLoadAssignment {
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	for i := range places {
		l := &endpointv3.LocalityLbEndpoints{Priority: places[i].priority, Locality: locality(places[i].locality)}
		for _, hop := range places[i].hops {
			l.LbEndpoints = append(l.LbEndpoints, lbEndpoint(hop.Hop, hop.weight, perPod))
		}
		cla.Endpoints = append(cla.Endpoints, l)
	}
	return cla
}

func appendSize(b []byte, field protowire.Number, n int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.BytesType), uint64(n))
}

func appendText(b []byte, field protowire.Number, text string) []byte {
	if text == "" {
		return b
	}
	return append(appendSize(b, field, len(text)), text...)
}

// appendNested writes a message whose size is known only once it is written.
func appendNested(b []byte, field protowire.Number, body func([]byte) []byte) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	const room = 10 // the most that a size takes
	start := len(b)
	b = append(b, make([]byte, room)...)
	b = body(b)
	size := uint64(len(b) - start - room)
	n := protowire.SizeVarint(size)
	copy(b[start+n:], b[start+room:])
	protowire.AppendVarint(b[:start], size)
	return b[:len(b)-room+n]
}
