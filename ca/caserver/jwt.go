// SPDX-License-Identifier: Apache-2.0

package caserver

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// How many JWT-SVIDs one workload gets: many at once, for many audiences, and then one each second. Its agent keeps
// each for half of its life.
const (
	tokensEvery = time.Second
	tokensBurst = 100
)

// errTooManyTokens: the workload asks too often.
var errTooManyTokens = errors.New("too many JWT-SVIDs for one workload")

// CreateJWTSVID issues a JWT-SVID to the workload whose certificate the connection has.
func (s *Server) CreateJWTSVID(ctx context.Context, in *api.CreateJWTSVIDRequest) (out *api.CreateJWTSVIDResponse, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Log.Error("panic while issuing a JWT-SVID", "panic", p, "stack", string(debug.Stack()))
			out, err = nil, status.Error(codes.Internal, "internal error")
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	who, err := s.certified(ctx)
	req := ca.JWTRequest{Subject: who.Subject, Credential: who.Credential, Audience: in.GetAudience(), NotAfter: who.Expires}
	if err != nil {
		return nil, s.status(s.refuseToken(req, err))
	}
	if !s.tokens.allow(string(who.Source) + "/" + who.Instance) {
		return nil, s.status(s.refuseToken(req, fmt.Errorf("%w: %s of %s", errTooManyTokens, who.Instance, who.Source)))
	}
	issued, err := s.cfg.JWT.Issue(ctx, req)
	if err != nil {
		return nil, s.status(err)
	}
	return &api.CreateJWTSVIDResponse{Token: issued.Token}, nil
}

// WatchJWTBundle sends the keys of JWT-SVIDs now and whenever they change.
func (s *Server) WatchJWTBundle(_ *api.WatchJWTBundleRequest, stream grpc.ServerStreamingServer[api.JWTBundle]) error {
	ctx := stream.Context()
	who, err := s.certified(ctx)
	if err != nil {
		return s.status(err)
	}
	for {
		changed := s.cfg.JWT.Changed()
		if err := s.cfg.Authority.Revoked(who.Source, who.Instance); err != nil {
			return s.status(err)
		}
		if err := stream.Send(&api.JWTBundle{Jwks: s.cfg.JWT.Bundle()}); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-changed:
		}
	}
}

// certified says who calls, by certificate and by nothing else.
func (s *Server) certified(ctx context.Context) (attest.Identity, error) {
	evidence, err := Evidence(ctx)
	if err == nil && evidence.Bearer != "" {
		err = fmt.Errorf("%w: a bearer token; want a client certificate", attest.ErrCredential)
	}
	if err != nil {
		return attest.Identity{Credential: ca.Credential{Peer: evidence.Peer}}, err
	}
	return s.cfg.Attestor.Authenticate(ctx, evidence)
}

// refuseToken records a refusal, unless there are too many of them.
func (s *Server) refuseToken(req ca.JWTRequest, cause error) error {
	skipped, ok := s.recordRefusal(req.Subject)
	if !ok {
		return cause
	}
	if skipped > 0 {
		req.Credential.Note = fmt.Sprintf("after %d more refusals that are not recorded one by one", skipped)
	}
	return s.cfg.JWT.Refuse(req, cause)
}

// recordRefusal tells whether one more refusal belongs into the audit log, and how many before it were left out.
func (s *Server) recordRefusal(subject ca.Subject) (skipped int, ok bool) {
	kind := "stranger"
	if subject.Source != "" {
		kind = string(subject.Source)
	}
	return s.refusals.allowCounting(kind)
}
