// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/ca"
)

// Tokens are the JWT-SVIDs of the workload, and the keys of its trust domain.
type Tokens interface {
	// JWTSVID is a token for at least one audience. A gRPC status in the error is passed on where it says that
	// the wish was wrong; otherwise the caller comes again.
	JWTSVID(ctx context.Context, audience []string) (token string, err error)
	// JWTKeys is the JWK set with which tokens are verified. It waits until there is one.
	JWTKeys(ctx context.Context) (jwks []byte, err error)
	// JWTKeysChanged is closed at the next change of the keys.
	JWTKeysChanged() <-chan struct{}
}

// How long a call waits for the first keys, and a verification for those that its token names: a key may be newer
// here than what has arrived.
const (
	firstKeys = 5 * time.Second
	newerKeys = 2 * time.Second
)

// FetchJWTSVID gets a token for the workload's identity.
func (s *Server) FetchJWTSVID(ctx context.Context, in *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if s.Tokens == nil {
		return s.UnimplementedSpiffeWorkloadAPIServer.FetchJWTSVID(ctx, in)
	}
	if len(in.GetAudience()) == 0 || slices.Contains(in.GetAudience(), "") {
		return nil, status.Error(codes.InvalidArgument, "audience is missing: want at least one, and none empty")
	}
	svid, _, err := s.svid()
	if err != nil {
		return nil, statusOf(err)
	}
	if wish := in.GetSpiffeId(); wish != "" && wish != svid.ID {
		if _, err := ca.ParseID(wish); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
		return nil, status.Errorf(codes.PermissionDenied, "this workload is %s, and not %s", svid.ID, wish)
	}
	token, err := s.Tokens.JWTSVID(ctx, in.GetAudience())
	if err != nil {
		switch code := status.Code(err); code {
		case codes.InvalidArgument, codes.PermissionDenied, codes.ResourceExhausted:
			return nil, status.Error(code, status.Convert(err).Message())
		}
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: svid.ID, Svid: token}}}, nil
}

// FetchJWTBundles sends the keys of the workload's trust domain, now and at every change.
func (s *Server) FetchJWTBundles(in *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	if s.Tokens == nil {
		return s.UnimplementedSpiffeWorkloadAPIServer.FetchJWTBundles(in, stream)
	}
	return follow(stream.Context(), s.Tokens.JWTKeysChanged, func() (*workload.JWTBundlesResponse, error) {
		_, id, err := s.svid()
		if err != nil {
			return nil, err
		}
		keys, err := s.keys(stream.Context())
		if err != nil {
			return nil, err
		}
		return &workload.JWTBundlesResponse{Bundles: map[string][]byte{id.TrustDomain().IDString(): keys}}, nil
	}, stream.Send)
}

// keys waits for the first keys, within bounds.
func (s *Server) keys(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, firstKeys)
	defer cancel()
	return s.Tokens.JWTKeys(ctx)
}

// ValidateJWTSVID tells whom a token speaks for, if it is meant for the audience.
func (s *Server) ValidateJWTSVID(ctx context.Context, in *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if s.Tokens == nil {
		return s.UnimplementedSpiffeWorkloadAPIServer.ValidateJWTSVID(ctx, in)
	}
	if in.GetAudience() == "" || in.GetSvid() == "" {
		return nil, status.Error(codes.InvalidArgument, "audience and svid: want both")
	}
	_, id, err := s.svid()
	if err != nil {
		return nil, statusOf(err)
	}
	patience, cancel := context.WithTimeout(ctx, newerKeys)
	defer cancel()
	for {
		changed := s.Tokens.JWTKeysChanged()
		keys, err := s.keys(ctx)
		if err != nil {
			return nil, statusOf(err)
		}
		said, err := verify(in, id.TrustDomain(), keys)
		if err == nil {
			return said, nil
		}
		if !errors.Is(err, ca.ErrTokenKey) || !s.newer(patience, changed) {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
}

// newer waits for other keys.
func (s *Server) newer(ctx context.Context, changed <-chan struct{}) bool {
	select {
	case <-ctx.Done():
		return false
	case <-changed:
		return true
	}
}

func verify(in *workload.ValidateJWTSVIDRequest, own spiffeid.TrustDomain, jwks []byte) (*workload.ValidateJWTSVIDResponse, error) {
	keys, err := ca.ParseJWTBundle(jwks)
	if err != nil {
		return nil, err
	}
	foreign := false
	said, err := ca.VerifyJWT(in.GetSvid(), in.GetAudience(), time.Now(), func(td spiffeid.TrustDomain) ca.JWTKeys {
		if td != own {
			foreign = true
			return nil
		}
		return keys
	})
	if foreign {
		return nil, fmt.Errorf("%w: it is of another trust domain than %q, and no bundle of that is known", ca.ErrToken, own)
	}
	if err != nil {
		return nil, err
	}
	claims, err := structpb.NewStruct(said.Claims)
	if err != nil {
		return nil, err
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: said.ID.String(), Claims: claims}, nil
}
