// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the codec that Codec falls back to
	"google.golang.org/grpc/mem"
)

// frame is one discovery message in its encoded form.
type frame struct{ data []byte }

// Codec passes frames through untouched and leaves every other message to
// protobuf, so that one gRPC server can relay one service and implement
// another.
type Codec struct{}

// Marshal implements encoding.CodecV2.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		return mem.BufferSlice{mem.SliceBuffer(f.data)}, nil
	}
	return protobuf().Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (Codec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		f.data = data.Materialize()
		return nil
	}
	return protobuf().Unmarshal(data, v)
}

// Name is that of protobuf, because that is what is on the wire.
func (Codec) Name() string { return "proto" }

func protobuf() encoding.CodecV2 {
	codec := encoding.GetCodecV2("proto")
	if codec == nil {
		panic(fmt.Sprintf("relay: gRPC lost its %q codec", "proto"))
	}
	return codec
}
