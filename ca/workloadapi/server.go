// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/ca"
)

var (
	// ErrStarting: there is no identity yet, or none that is still good. Callers come again.
	ErrStarting = errors.New("no identity yet")
	// ErrNoIdentity: the authority refuses an identity to this workload.
	ErrNoIdentity = errors.New("no identity issued")
)

// Limits of what callers may use. A workload needs a handful of each.
const (
	DefaultConnections = 64  // of one user at once
	DefaultStreams     = 256 // calls of one user at once
	maxRequest         = 64 << 10
	maxHeaders         = 16 << 10
)

// SVID is an X.509-SVID and what its holder verifies others with. It is immutable.
type SVID struct {
	// ID is the workload's SPIFFE ID.
	ID string
	// Chain is the leaf and its intermediates, DER.
	Chain [][]byte
	// Key is the private key, PKCS #8 in DER.
	Key []byte
	// Roots of the trust domain, DER.
	Roots [][]byte
}

// Source is whose identity is served.
type Source interface {
	// SVID is the present one. Errors that wrap ErrNoIdentity are final as far as anybody knows; after all others
	// the caller comes again.
	SVID() (SVID, error)
	// Changed is closed at the next change. Take the channel first, then look, then wait.
	Changed() <-chan struct{}
}

// Server is the SPIFFE Workload API. Fields must not change once it serves.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	// Source is asked at every call and every change. Required.
	Source Source
	// Tokens of the JWT profile; without them its calls are not implemented.
	Tokens Tokens
	// Users are the user IDs that may ask; nil lets everybody in who can open the socket.
	Users []uint32
	// Connections and Streams limit one user; the defaults if zero.
	Connections, Streams int
	// Log takes refusals; nil discards.
	Log *slog.Logger

	mu    sync.Mutex
	users map[uint32]*usage
}

// usage is what one user has open.
type usage struct{ connections, streams int }

// Serve answers on a Unix socket until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	server := grpc.NewServer(
		grpc.Creds(&handshake{s}),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxRequest), grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(uint32(s.streamLimit())),
		grpc.ConnectionTimeout(5*time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	workload.RegisterSpiffeWorkloadAPIServer(server, s)
	reflection.Register(server)
	defer context.AfterFunc(ctx, server.Stop)()
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve workloads: %w", err)
	}
	return nil
}

// FetchX509SVID sends the identity, its key and the roots, now and at every change.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(stream.Context(), s.Source.Changed, s.x509SVID, stream.Send)
}

func (s *Server) x509SVID() (*workload.X509SVIDResponse, error) {
	svid, _, err := s.svid()
	if err != nil {
		return nil, err
	}
	return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: svid.ID, X509Svid: bytes.Join(svid.Chain, nil), X509SvidKey: svid.Key, Bundle: bytes.Join(svid.Roots, nil),
	}}}, nil
}

// FetchX509Bundles sends the roots of the workload's trust domain, now and at every change.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(stream.Context(), s.Source.Changed, s.x509Bundles, stream.Send)
}

func (s *Server) x509Bundles() (*workload.X509BundlesResponse, error) {
	svid, id, err := s.svid()
	if err != nil {
		return nil, err
	}
	return &workload.X509BundlesResponse{Bundles: map[string][]byte{id.TrustDomain().IDString(): bytes.Join(svid.Roots, nil)}}, nil
}

// svid is what the source has, if it is whole: a field that is missing means to a client that it was taken away.
func (s *Server) svid() (SVID, spiffeid.ID, error) {
	svid, err := s.Source.SVID()
	if err == nil && (svid.ID == "" || len(svid.Chain) == 0 || len(svid.Key) == 0 || len(svid.Roots) == 0) {
		err = ErrStarting
	}
	if err != nil {
		return SVID{}, spiffeid.ID{}, err
	}
	id, err := ca.ParseID(svid.ID)
	if err != nil {
		return SVID{}, spiffeid.ID{}, fmt.Errorf("%w: %w", ErrNoIdentity, err)
	}
	return svid, id, nil
}

// follow sends what is there now, and again whenever that has changed.
func follow[M proto.Message](ctx context.Context, changed func() <-chan struct{}, now func() (M, error), send func(M) error) error {
	var sent proto.Message
	for {
		next := changed()
		m, err := now()
		if err != nil {
			return statusOf(err)
		}
		if sent == nil || !proto.Equal(sent, m) {
			if err := send(m); err != nil {
				return err
			}
			sent = m
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-next:
		}
	}
}

// statusOf says outwards whether trying again can help.
func statusOf(err error) error {
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	if errors.Is(err, ErrNoIdentity) {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	return status.Error(codes.Unavailable, err.Error())
}

func (s *Server) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (answer any, err error) {
	err = s.admitted(ctx, info.FullMethod, func() error {
		answer, err = handler(ctx, request)
		return err
	})
	return answer, err
}

func (s *Server) stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return s.admitted(stream.Context(), info.FullMethod, func() error { return handler(server, stream) })
}

// admitted runs a call if its caller may make it.
func (s *Server) admitted(ctx context.Context, method string, call func() error) (err error) {
	caller, err := s.admit(ctx)
	if err != nil {
		s.Log.Warn("a call of the workload API was refused", "method", method, "uid", caller.UID, "pid", caller.PID, "error", err)
		return err
	}
	defer s.leave(caller.UID)
	defer func() {
		if p := recover(); p != nil {
			s.Log.Error("panic in the workload API", "method", method, "panic", p, "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
	}()
	return call()
}
