// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"fmt"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
)

const (
	// NameTableType is the type URL under which meshd sends the name table.
	NameTableType = "type.googleapis.com/istio.networking.nds.v1.NameTable"

	listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
)

// dialect is what differs between the two variants of the protocol.
type dialect struct {
	method       string
	requestType  protowire.Number
	requestNonce protowire.Number
	requestError protowire.Number
	// subscribe is the request for the name table, given what is held.
	subscribe func(held map[string]string) proto.Message
	// tell is a request that asks for nothing and names the node once more; nil if the
	// variant has none.
	tell func(n *corev3.Node) proto.Message
	// answer decodes a name table response.
	answer func(data []byte) (namesAnswer, error)
	// confirm acknowledges an answer, or refuses it when problem is set.
	confirm func(a namesAnswer, problem error) proto.Message
}

var incremental = dialect{
	method:       "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
	requestType:  fieldDeltaRequestType,
	requestNonce: fieldDeltaRequestNonce,
	requestError: fieldDeltaRequestError,
	subscribe: func(held map[string]string) proto.Message {
		return &discoveryv3.DeltaDiscoveryRequest{TypeUrl: NameTableType, InitialResourceVersions: held}
	},
	tell: func(n *corev3.Node) proto.Message {
		return &discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerType, Node: n}
	},
	answer: func(data []byte) (namesAnswer, error) {
		var response discoveryv3.DeltaDiscoveryResponse
		if err := proto.Unmarshal(data, &response); err != nil {
			return namesAnswer{}, err
		}
		a := namesAnswer{
			nonce: response.GetNonce(), removed: response.GetRemovedResources(),
			fresh: names{map[string]*api.NameTable{}, map[string]string{}},
		}
		for _, resource := range response.GetResources() {
			part := &api.NameTable{}
			if err := resource.GetResource().UnmarshalTo(part); err != nil {
				return a, fmt.Errorf("%q: %w", resource.GetName(), err)
			}
			a.fresh.parts[resource.GetName()], a.fresh.versions[resource.GetName()] = part, resource.GetVersion()
		}
		return a, nil
	},
	confirm: func(a namesAnswer, problem error) proto.Message {
		return &discoveryv3.DeltaDiscoveryRequest{TypeUrl: NameTableType, ResponseNonce: a.nonce, ErrorDetail: detail(problem)}
	},
}

var stateOfTheWorld = dialect{
	method:       "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
	requestType:  fieldRequestType,
	requestNonce: fieldRequestNonce,
	requestError: fieldRequestError,
	subscribe: func(map[string]string) proto.Message {
		return &discoveryv3.DiscoveryRequest{TypeUrl: NameTableType}
	},
	answer: func(data []byte) (namesAnswer, error) {
		var response discoveryv3.DiscoveryResponse
		if err := proto.Unmarshal(data, &response); err != nil {
			return namesAnswer{}, err
		}
		a := namesAnswer{nonce: response.GetNonce(), version: response.GetVersionInfo(), whole: true, fresh: names{parts: map[string]*api.NameTable{}}}
		for i, resource := range response.GetResources() {
			part := &api.NameTable{}
			if err := resource.UnmarshalTo(part); err != nil {
				return a, err
			}
			a.fresh.parts[fmt.Sprintf("%08d", i)] = part
		}
		return a, nil
	},
	confirm: func(a namesAnswer, problem error) proto.Message {
		return &discoveryv3.DiscoveryRequest{TypeUrl: NameTableType, VersionInfo: a.version, ResponseNonce: a.nonce, ErrorDetail: detail(problem)}
	},
}

func detail(problem error) *statuspb.Status {
	if problem == nil {
		return nil
	}
	return &statuspb.Status{Code: int32(codes.InvalidArgument), Message: problem.Error()}
}
