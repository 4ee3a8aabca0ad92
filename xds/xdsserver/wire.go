// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

// wire is one stream of either variant.
type wire interface {
	// receive returns the next request, and the id of the node that sends it if it says so.
	receive() (request, string, error)
	send(*response) error
	sotw() bool
}

type deltaStream interface {
	Send(*discoveryv3.DeltaDiscoveryResponse) error
	Recv() (*discoveryv3.DeltaDiscoveryRequest, error)
}

type sotwStream interface {
	Send(*discoveryv3.DiscoveryResponse) error
	Recv() (*discoveryv3.DiscoveryRequest, error)
}

// controlPlane names who answers, in every response.
type controlPlane struct{ identifier string }

func (c controlPlane) proto() *corev3.ControlPlane {
	if c.identifier == "" {
		return nil
	}
	return &corev3.ControlPlane{Identifier: c.identifier}
}

type deltaWire struct {
	stream deltaStream
	who    controlPlane
}

func (w deltaWire) sotw() bool { return false }

func (w deltaWire) receive() (request, string, error) {
	r, err := w.stream.Recv()
	if err != nil {
		return request{}, "", err
	}
	return deltaRequest(r), r.GetNode().GetId(), nil
}

func deltaRequest(r *discoveryv3.DeltaDiscoveryRequest) request {
	return request{
		typeURL: r.GetTypeUrl(), nonce: r.GetResponseNonce(),
		isNACK: r.GetErrorDetail() != nil, refused: r.GetErrorDetail().GetMessage(),
		subscribe: r.GetResourceNamesSubscribe(), unsubscribe: r.GetResourceNamesUnsubscribe(),
		initial: r.GetInitialResourceVersions(),
	}
}

func (w deltaWire) send(r *response) error {
	out := &discoveryv3.DeltaDiscoveryResponse{
		TypeUrl: r.typeURL, Nonce: r.nonce, RemovedResources: r.removed, ControlPlane: w.who.proto(),
		Resources: make([]*discoveryv3.Resource, 0, len(r.resources)),
	}
	for _, res := range r.resources {
		out.Resources = append(out.Resources, &discoveryv3.Resource{
			Name: res.Name, Version: res.Version, Resource: &anypb.Any{TypeUrl: r.typeURL, Value: res.Body},
		})
	}
	return w.stream.Send(out)
}

type sotwWire struct {
	stream sotwStream
	who    controlPlane
}

func (w sotwWire) sotw() bool { return true }

func (w sotwWire) receive() (request, string, error) {
	r, err := w.stream.Recv()
	if err != nil {
		return request{}, "", err
	}
	return sotwRequest(r), r.GetNode().GetId(), nil
}

func sotwRequest(r *discoveryv3.DiscoveryRequest) request {
	return request{
		typeURL: r.GetTypeUrl(), nonce: r.GetResponseNonce(),
		isNACK: r.GetErrorDetail() != nil, refused: r.GetErrorDetail().GetMessage(),
		names: r.GetResourceNames(), version: r.GetVersionInfo(),
	}
}

func (w sotwWire) send(r *response) error {
	out := &discoveryv3.DiscoveryResponse{
		TypeUrl: r.typeURL, Nonce: r.nonce, VersionInfo: r.version, ControlPlane: w.who.proto(),
		Resources: make([]*anypb.Any, 0, len(r.resources)),
	}
	for _, res := range r.resources {
		out.Resources = append(out.Resources, &anypb.Any{TypeUrl: r.typeURL, Value: res.Body})
	}
	return w.stream.Send(out)
}
