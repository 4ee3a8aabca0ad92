// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"
	"net/netip"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/federation"
)

// podAddressKey selects one endpoint of a headless service by the address that was
// dialled, in the metadata namespace of Envoy's subset load balancer.
const podAddressKey = "isthmus-mesh.io/pod-address"

// assignment renders groups. Without any it is empty: Envoy must learn that a cluster has
// no endpoints. Gateways that are known by host name only are skipped and returned: their
// names are to be resolved before the view is computed (see gateways.Resolver).
func assignment(name string, groups []federation.Group, perPod bool) (*endpointv3.ClusterLoadAssignment, []string) {
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	var unresolved []string
	type place struct {
		priority uint32
		locality federation.Locality
	}
	places := map[place]*endpointv3.LocalityLbEndpoints{}
	seen := map[string]hopAt{}
	for _, g := range groups {
		for _, hop := range g.Hops {
			if _, err := netip.ParseAddr(hop.Host); err != nil {
				unresolved = append(unresolved, hop.Host)
				continue
			}
			// Envoy keeps only the first of two hosts with one address.
			key := fmt.Sprintf("%s|%d", hop.Host, hop.Port)
			if first, ok := seen[key]; ok {
				if first.priority == g.Priority {
					first.host.LoadBalancingWeight.Value += hop.Weight
				}
				continue
			}
			at := place{g.Priority, g.Locality}
			l := places[at]
			if l == nil {
				l = &endpointv3.LocalityLbEndpoints{Priority: g.Priority, Locality: locality(g.Locality)}
				places[at] = l
				cla.Endpoints = append(cla.Endpoints, l)
			}
			host := lbEndpoint(hop, perPod)
			l.LbEndpoints = append(l.LbEndpoints, host)
			seen[key] = hopAt{host, g.Priority}
		}
	}
	return cla, unresolved
}

type hopAt struct {
	host     *endpointv3.LbEndpoint
	priority uint32
}

func lbEndpoint(hop federation.Hop, perPod bool) *endpointv3.LbEndpoint {
	e := &endpointv3.LbEndpoint{
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
			Endpoint: &endpointv3.Endpoint{Address: socketAddress(hop.Host, hop.Port)},
		},
		LoadBalancingWeight: wrapperspb.UInt32(max(1, hop.Weight)),
	}
	if hop.Health != federation.Ready && hop.Health != "" {
		e.HealthStatus = corev3.HealthStatus_UNHEALTHY
	}
	metadata := map[string]*structpb.Struct{}
	if hop.Mesh {
		metadata["envoy.transport_socket_match"] = labelled(tlsModeKey, tlsModeMesh)
	}
	if perPod {
		metadata["envoy.lb"] = labelled(podAddressKey, hop.Host)
	}
	if len(metadata) > 0 {
		e.Metadata = &corev3.Metadata{FilterMetadata: metadata}
	}
	return e
}

func labelled(key, value string) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{key: structpb.NewStringValue(value)}}
}

func locality(l federation.Locality) *corev3.Locality {
	if l == (federation.Locality{}) {
		return nil
	}
	return &corev3.Locality{Region: l.Region, Zone: l.Zone, SubZone: l.Subzone}
}
