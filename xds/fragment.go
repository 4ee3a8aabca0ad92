// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Field numbers of envoy.service.discovery.v3 and of google.protobuf.Any.
const (
	fieldResources       = 2 // DeltaDiscoveryResponse.resources, DiscoveryResponse.resources
	fieldResourceVersion = 1 // Resource.version
	fieldResourceAny     = 2 // Resource.resource
	fieldResourceName    = 3 // Resource.name
	fieldAnyType         = 1
	fieldAnyValue        = 2
)

// A fragment is a resource as it stands in an incremental response. Repeated fields of
// protobuf messages concatenate, so a response is fragments one after the other and a
// short rest, and nobody encodes a resource twice.
//
// The same bytes hold what stands in a state-of-the-world response: an Any has the same
// field number there.

// Fragment is the resource in its field of a DeltaDiscoveryResponse. It is shared: nobody
// changes it.
func (r Resource) Fragment(typeURL string) []byte {
	if r.fragment != nil {
		return r.fragment
	}
	return encodeFragment(r.Name, r.Version, typeURL, r.Body)
}

// WholeFragment is the resource in its field of a DiscoveryResponse, shared too.
func (r Resource) WholeFragment(typeURL string) []byte {
	inner, _ := protowire.ConsumeBytes(skipTag(r.Fragment(typeURL)))
	_, _, n := protowire.ConsumeField(inner) // the version
	_, _, end := protowire.ConsumeField(inner[n:])
	return inner[n : n+end : n+end]
}

func skipTag(b []byte) []byte {
	_, _, n := protowire.ConsumeTag(b)
	return b[n:]
}

// encodeFragment puts the body of a resource into its envelopes.
func encodeFragment(name, version, typeURL string, body []byte) []byte {
	anySize := bytesSize(fieldAnyType, len(typeURL)) + bytesSize(fieldAnyValue, len(body))
	size := bytesSize(fieldResourceVersion, len(version)) + bytesSize(fieldResourceAny, anySize) + bytesSize(fieldResourceName, len(name))
	b := make([]byte, 0, bytesSize(fieldResources, size))
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldResources, protowire.BytesType), uint64(size))
	b = protowire.AppendString(protowire.AppendTag(b, fieldResourceVersion, protowire.BytesType), version)
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldResourceAny, protowire.BytesType), uint64(anySize))
	b = protowire.AppendString(protowire.AppendTag(b, fieldAnyType, protowire.BytesType), typeURL)
	b = protowire.AppendBytes(protowire.AppendTag(b, fieldAnyValue, protowire.BytesType), body)
	return protowire.AppendString(protowire.AppendTag(b, fieldResourceName, protowire.BytesType), name)
}

func bytesSize(field protowire.Number, n int) int {
	return protowire.SizeTag(field) + protowire.SizeBytes(n)
}

// within finds the body inside its fragment, so that its bytes are kept once.
func within(fragment []byte, name string, body []byte) []byte {
	end := len(fragment) - bytesSize(fieldResourceName, len(name))
	return fragment[end-len(body) : end : end]
}

func typeOf(m proto.Message) string {
	return "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())
}
