// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// The gRPC service is described by hand, and its messages are the same lines of JSON as
// everywhere else: a stranger needs no generated code to read what crossed.
var echoService = grpc.ServiceDesc{
	ServiceName: "isthmus.e2e.Echo",
	HandlerType: (*any)(nil),
	Methods:     []grpc.MethodDesc{{MethodName: "Call", Handler: unary}},
	Streams:     []grpc.StreamDesc{{StreamName: "Stream", Handler: stream, ServerStreams: true, ClientStreams: true}},
}

const (
	callMethod   = "/isthmus.e2e.Echo/Call"
	streamMethod = "/isthmus.e2e.Echo/Stream"
)

// lines is a codec whose messages are *[]byte, passed as they are.
type lines struct{}

func (lines) Name() string { return "lines" }

func (lines) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("message is a %T, want *[]byte", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(*b)}, nil
}

func (lines) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("message is a %T, want *[]byte", v)
	}
	*b = data.Materialize()
	return nil
}

func unary(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	s := srv.(*server)
	var in []byte
	if err := decode(&in); err != nil {
		return nil, err
	}
	s.control.count("grpc")
	if s.control.failing() {
		return nil, status.Error(codes.Unavailable, "told to fail")
	}
	out := s.grpcAnswer(ctx, in)
	return &out, nil
}

// stream answers every message until the client has sent its last.
func stream(srv any, ss grpc.ServerStream) error {
	s := srv.(*server)
	s.control.count("grpc")
	for {
		var in []byte
		if err := ss.RecvMsg(&in); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		out := s.grpcAnswer(ss.Context(), in)
		if err := ss.SendMsg(&out); err != nil {
			return err
		}
	}
}

func (s *server) grpcAnswer(ctx context.Context, body []byte) []byte {
	md, _ := metadata.FromIncomingContext(ctx)
	a := Answer{Place: s.place, Protocol: "grpc", Headers: md, Body: string(body)}
	if p, ok := peer.FromContext(ctx); ok {
		a.Remote = p.Addr.String()
	}
	if xfcc := md.Get("x-forwarded-client-cert"); len(xfcc) > 0 {
		a.Peer = peerOf(map[string][]string{"X-Forwarded-Client-Cert": xfcc})
	}
	return a.line()
}
