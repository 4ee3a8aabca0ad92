// SPDX-License-Identifier: Apache-2.0

package xds

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/federation"
)

// podAddressKey selects one endpoint of a headless service by the address that was
// dialled, in the metadata namespace of Envoy's subset load balancer.
const podAddressKey = "isthmus-mesh.io/pod-address"

func lbEndpoint(hop *federation.Hop, weight uint32, perPod bool) *endpointv3.LbEndpoint {
	e := &endpointv3.LbEndpoint{
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
			Endpoint: &endpointv3.Endpoint{Address: socketAddress(hop.Host, hop.Port)},
		},
		LoadBalancingWeight: wrapperspb.UInt32(weight),
	}
	if hop.Health != federation.Ready && hop.Health != "" {
		e.HealthStatus = corev3.HealthStatus_UNHEALTHY
	}
	if metadata := metadataOf(hop, perPod); len(metadata) > 0 {
		e.Metadata = metadataMessage(metadata)
	}
	return e
}

func metadataOf(hop *federation.Hop, perPod bool) map[string]*structpb.Struct {
	metadata := map[string]*structpb.Struct{}
	if hop.Mesh {
		metadata["envoy.transport_socket_match"] = labelled(tlsModeKey, tlsModeMesh)
	}
	if perPod {
		metadata["envoy.lb"] = labelled(podAddressKey, hop.Host)
	}
	return metadata
}

func metadataMessage(filters map[string]*structpb.Struct) *corev3.Metadata {
	return &corev3.Metadata{FilterMetadata: filters}
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
