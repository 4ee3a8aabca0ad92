// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"sync/atomic"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/xds"
)

// Field numbers of envoy.service.discovery.v3.
const (
	fieldVersion      = 1 // DiscoveryResponse.version_info
	fieldTypeURL      = 4 // of both responses
	fieldNonce        = 5 // of both responses
	fieldRemoved      = 6 // DeltaDiscoveryResponse.removed_resources
	fieldControlPlane = 6 // DiscoveryResponse.control_plane
	fieldDeltaControl = 7 // DeltaDiscoveryResponse.control_plane

	fieldDeltaRequestType  = 2
	fieldDeltaRequestNonce = 6
)

// wire is one stream of either variant.
type wire interface {
	// receive returns the next request, and what the node that sends it says of itself.
	receive() (request, node, error)
	send(*response) error
	sotw() bool
}

// controlPlane is who answers, encoded; it stands in every response.
type controlPlane []byte

func newControlPlane(identifier string) controlPlane {
	if identifier == "" {
		return nil
	}
	b, err := proto.Marshal(&corev3.ControlPlane{Identifier: identifier})
	if err != nil {
		return nil // not UTF-8: it is for people only
	}
	return b
}

func (c controlPlane) append(b []byte, field protowire.Number) []byte {
	if c == nil {
		return b
	}
	return appendBytes(b, field, c)
}

func appendBytes[T ~[]byte | ~string](b []byte, field protowire.Number, v T) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(len(v)))
	return append(b, v...)
}

type deltaWire struct {
	stream grpc.ServerStream
	who    controlPlane
	nonces *recentNonce
	in     message // what is being received
}

func (w *deltaWire) sotw() bool { return false }

func (w *deltaWire) receive() (request, node, error) {
	if err := w.stream.RecvMsg(&w.in); err != nil {
		return request{}, node{}, err
	}
	defer w.in.data.Free()
	data := w.in.data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer data.Free()
	if r, ok := w.nonces.acknowledgement(data.ReadOnlyData()); ok {
		return r, node{}, nil
	}
	r := &discoveryv3.DeltaDiscoveryRequest{}
	if err := proto.Unmarshal(data.ReadOnlyData(), r); err != nil {
		return request{}, node{}, status.Errorf(codes.InvalidArgument, "no DeltaDiscoveryRequest: %v", err)
	}
	return deltaRequest(r), nodeOf(r.GetNode()), nil
}

// recentNonce is the nonce that was acknowledged last on any stream. Most others are about
// to acknowledge the same, and need no copy of their own.
type recentNonce struct{ last atomic.Pointer[string] }

func (n *recentNonce) text(b []byte) string {
	if last := n.last.Load(); last != nil && *last == string(b) {
		return *last
	}
	text := string(b)
	n.last.Store(&text)
	return text
}

// acknowledgement reads a request that says nothing but that a response was taken, which
// most do. False if it says more, or is no message.
func (n *recentNonce) acknowledgement(b []byte) (r request, ok bool) {
	for len(b) > 0 {
		number, kind, tag := protowire.ConsumeTag(b)
		if tag < 0 || kind != protowire.BytesType {
			return request{}, false
		}
		value, size := protowire.ConsumeBytes(b[tag:])
		if size < 0 {
			return request{}, false
		}
		switch number {
		case fieldDeltaRequestType:
			if r.typeURL = wellKnown(value); r.typeURL == "" {
				return request{}, false
			}
		case fieldDeltaRequestNonce:
			r.nonce = n.text(value)
		default:
			return request{}, false
		}
		b = b[tag+size:]
	}
	return r, r.nonce != ""
}

// wellKnown is one of the type URLs that are sent often, without a copy.
func wellKnown(b []byte) string {
	switch string(b) {
	case xds.EndpointType:
		return xds.EndpointType
	case xds.ClusterType:
		return xds.ClusterType
	case xds.RouteType:
		return xds.RouteType
	case xds.ListenerType:
		return xds.ListenerType
	case xds.NameTableType:
		return xds.NameTableType
	}
	return ""
}

func deltaRequest(r *discoveryv3.DeltaDiscoveryRequest) request {
	return request{
		typeURL: r.GetTypeUrl(), nonce: r.GetResponseNonce(),
		isNACK: r.GetErrorDetail() != nil, refused: r.GetErrorDetail().GetMessage(),
		subscribe: r.GetResourceNamesSubscribe(), unsubscribe: r.GetResourceNamesUnsubscribe(),
		initial: r.GetInitialResourceVersions(),
	}
}

func (w *deltaWire) send(r *response) error {
	if r.whole == nil {
		return w.stream.SendMsg(&message{w.encode(r)})
	}
	r.whole.encode.Do(func() { r.whole.message = &message{w.encode(r)} })
	return w.stream.SendMsg(r.whole.message)
}

// smallResponse is up to how many bytes a response is copied together; a larger one stays
// a list of the fragments that it consists of.
const smallResponse = 16 << 10

func (w *deltaWire) encode(r *response) mem.BufferSlice {
	size := 0
	fragments := make([][]byte, len(r.resources))
	for i, res := range r.resources {
		fragments[i] = res.Fragment(r.typeURL)
		size += len(fragments[i])
	}
	rest := appendBytes(appendBytes(nil, fieldTypeURL, r.typeURL), fieldNonce, r.nonce)
	for _, name := range r.removed {
		rest = appendBytes(rest, fieldRemoved, name)
	}
	return assemble(fragments, size, w.who.append(rest, fieldDeltaControl))
}

func assemble(fragments [][]byte, size int, rest []byte) mem.BufferSlice {
	if size <= smallResponse {
		out := make([]byte, 0, size+len(rest))
		for _, f := range fragments {
			out = append(out, f...)
		}
		return mem.BufferSlice{mem.SliceBuffer(append(out, rest...))}
	}
	out := make(mem.BufferSlice, 0, len(fragments)+1)
	for _, f := range fragments {
		out = append(out, mem.SliceBuffer(f))
	}
	return append(out, mem.SliceBuffer(rest))
}

// oneTable is a response with all name tables in one resource, which is all that Istio's
// agent looks at.
func oneTable(r *response) *response {
	var body []byte
	for _, part := range r.resources {
		body = append(body, part.Body...)
	}
	one := *r
	one.resources = []xds.Resource{{Name: "nametable", Body: body}}
	return &one
}

type sotwWire struct {
	stream grpc.ServerStream
	who    controlPlane
}

func (w sotwWire) sotw() bool { return true }

func (w sotwWire) receive() (request, node, error) {
	r := &discoveryv3.DiscoveryRequest{}
	if err := w.stream.RecvMsg(r); err != nil {
		return request{}, node{}, err
	}
	return sotwRequest(r), nodeOf(r.GetNode()), nil
}

func sotwRequest(r *discoveryv3.DiscoveryRequest) request {
	return request{
		typeURL: r.GetTypeUrl(), nonce: r.GetResponseNonce(),
		isNACK: r.GetErrorDetail() != nil, refused: r.GetErrorDetail().GetMessage(),
		names: r.GetResourceNames(), version: r.GetVersionInfo(),
	}
}

func (w sotwWire) send(r *response) error {
	if r.typeURL == xds.NameTableType {
		r = oneTable(r)
	}
	size := 0
	fragments := make([][]byte, len(r.resources))
	for i, res := range r.resources {
		fragments[i] = res.WholeFragment(r.typeURL)
		size += len(fragments[i])
	}
	rest := appendBytes(appendBytes(nil, fieldTypeURL, r.typeURL), fieldNonce, r.nonce)
	rest = w.who.append(appendBytes(rest, fieldVersion, r.version), fieldControlPlane)
	return w.stream.SendMsg(&message{assemble(fragments, size, rest)})
}
