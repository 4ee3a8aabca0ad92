// SPDX-License-Identifier: Apache-2.0

// Package caserver offers the authority over gRPC, as Istio's agent and ours ask for it, and keeps meshd's own
// certificate and its administrator's.
package caserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	security "istio.io/api/security/v1alpha1"
)

// Defaults of Config: how many certificates one workload gets. A pod that restarts again and again needs a few;
// one that asks for a thousand is up to something.
const (
	DefaultEvery = 10 * time.Second
	DefaultBurst = 10
)

// Of refusals of strangers, this many are recorded one by one; the rest are counted in a later line. Otherwise
// anybody who can reach the port could fill the disk.
const (
	refusalsPerSecond = 10
	refusalsBurst     = 100
)

// answerWithin bounds one call, waiting for the registry included.
const answerWithin = 20 * time.Second

// Config of a Server.
type Config struct {
	// Authority issues. Required.
	Authority *ca.Authority
	// Attestor finds out for whom. Required.
	Attestor *attest.Attestor
	// JWT issues JWT-SVIDs, for the service isthmus.v1.Identity. Without it that service is not there.
	JWT *ca.JWTAuthority
	// Every and Burst limit how often one workload gets a certificate: Burst at once, then one each Every.
	// The defaults if zero.
	Every time.Duration
	Burst int
	// Log takes what goes wrong here, as opposed to what is refused; slog.Default() if nil.
	Log *slog.Logger
}

// Server is the certificate service (istio.v1.auth.IstioCertificateService), and where it has JWT-SVIDs also the
// service for those.
type Server struct {
	security.UnimplementedIstioCertificateServiceServer
	api.UnimplementedIdentityServer
	cfg      Config
	tokens   *limiter
	issues   *limiter
	refusals *limiter
}

var _ security.IstioCertificateServiceServer = (*Server)(nil)

// New makes a server. Register puts it on a gRPC server.
func New(cfg Config) (*Server, error) {
	if cfg.Authority == nil || cfg.Attestor == nil {
		return nil, errors.New("caserver: Config.Authority and Attestor are required")
	}
	if cfg.Every == 0 {
		cfg.Every = DefaultEvery
	}
	if cfg.Burst == 0 {
		cfg.Burst = DefaultBurst
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Server{
		cfg:      cfg,
		issues:   newLimiter(cfg.Every, cfg.Burst),
		tokens:   newLimiter(tokensEvery, tokensBurst),
		refusals: newLimiter(time.Second/refusalsPerSecond, refusalsBurst),
	}, nil
}

// Register adds the service to a gRPC server, which must speak TLS and ask for client certificates without
// requiring them; see Serving.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	security.RegisterIstioCertificateServiceServer(r, s)
	if s.cfg.JWT != nil {
		api.RegisterIdentityServer(r, s)
	}
}

// CreateCertificate answers with the leaf, its intermediate, and the root last, one PEM certificate each.
func (s *Server) CreateCertificate(ctx context.Context, in *security.IstioCertificateRequest) (out *security.IstioCertificateResponse, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Log.Error("panic while issuing", "panic", p, "stack", string(debug.Stack()))
			out, err = nil, status.Error(codes.Internal, "internal error")
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	issued, err := s.issue(ctx, in)
	if err != nil {
		return nil, s.status(err)
	}
	return &security.IstioCertificateResponse{CertChain: issued.PEM()}, nil
}

// errTooMany: the workload asks too often.
var errTooMany = errors.New("too many certificates for one workload")

// errImpersonation: the caller wants a certificate for somebody else.
var errImpersonation = fmt.Errorf("%w: impersonation is not supported", ca.ErrForeignName)

// issue is the way of a request: who asks, may it have that, use the credential up, sign.
func (s *Server) issue(ctx context.Context, in *security.IstioCertificateRequest) (ca.Issued, error) {
	evidence, err := Evidence(ctx)
	req := ca.Request{Credential: ca.Credential{Peer: evidence.Peer}}
	if err != nil {
		return ca.Issued{}, s.refuseStranger(req, err)
	}
	if len(in.GetCsr()) > ca.MaxCSR {
		return ca.Issued{}, s.refuseStranger(req, fmt.Errorf("%w: %d bytes, at most %d", ca.ErrRequest, len(in.GetCsr()), ca.MaxCSR))
	}
	who, err := s.cfg.Attestor.Attest(ctx, evidence)
	req = ca.Request{
		Subject: who.Subject, Credential: who.Credential, CSR: []byte(in.GetCsr()), Lifetime: seconds(in.GetValidityDuration()),
		LifetimeLimit: who.LifetimeLimit, AllowRSA: who.IstioAgent,
	}
	if err != nil {
		return ca.Issued{}, s.refuseStranger(req, err)
	}
	if !s.issues.allow(string(who.Source) + "/" + who.Instance) {
		return ca.Issued{}, s.refuseStranger(req, fmt.Errorf("%w: %s of %s", errTooMany, who.Instance, who.Source))
	}
	if in.GetMetadata().GetFields()["ImpersonatedIdentity"] != nil {
		return ca.Issued{}, s.cfg.Authority.Refuse(req, errImpersonation)
	}
	prepared, err := s.cfg.Authority.Prepare(ctx, req)
	if err != nil {
		return ca.Issued{}, err
	}
	if err := who.Commit(ctx, prepared.KeyThumbprint()); err != nil {
		return ca.Issued{}, s.cfg.Authority.Refuse(req, err)
	}
	return s.cfg.Authority.Sign(ctx, prepared)
}

// refuseStranger records a refusal, unless there are too many of them.
func (s *Server) refuseStranger(req ca.Request, cause error) error {
	skipped, ok := s.recordRefusal(req.Subject)
	if !ok {
		return cause
	}
	if skipped > 0 {
		req.Credential.Note = fmt.Sprintf("after %d more refusals that are not recorded one by one", skipped)
	}
	return s.cfg.Authority.Refuse(req, cause)
}

// status says outwards what helps an honest caller, and no more.
func (s *Server) status(err error) error {
	switch {
	case errors.Is(err, ca.ErrAudit) && errors.Is(err, syscall.ENOSPC):
		s.cfg.Log.Error("nothing is issued: the disk of the audit log is full", "error", err)
		return status.Error(codes.Unavailable, "the disk of meshd's audit log is full, so nothing is issued; make room in its data directory")
	case errors.Is(err, ca.ErrAudit):
		s.cfg.Log.Error("nothing is issued", "error", err)
		return status.Error(codes.Unavailable, "the audit log cannot be written, so nothing is issued; see meshd's log")
	case errors.Is(err, attest.ErrReplayed):
		return status.Error(codes.Unauthenticated, attest.ErrReplayed.Error()+": keep the key across restarts, or wait for a new token")
	case errors.Is(err, attest.ErrCredential):
		return status.Error(codes.Unauthenticated, "credential not accepted; the reason is in meshd's audit log")
	case errors.Is(err, attest.ErrUnknown):
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, attest.ErrGone), errors.Is(err, ca.ErrRevoked), errors.Is(err, ca.ErrNotGranted),
		errors.Is(err, ca.ErrForeignName), errors.Is(err, ca.ErrSubject):
		return status.Error(codes.PermissionDenied, err.Error())
	case errors.Is(err, ca.ErrRequest), errors.Is(err, ca.ErrAudience):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, errTooMany), errors.Is(err, errTooManyTokens):
		return status.Error(codes.ResourceExhausted, err.Error())
	case errors.Is(err, ca.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		s.cfg.Log.Warn("authority not available", "error", err)
		return status.Error(codes.Unavailable, "the authority is not available at the moment; try again")
	}
	s.cfg.Log.Error("issuing failed", "error", err)
	return status.Error(codes.Internal, "internal error")
}

// seconds is a duration that a caller gave, without overflow.
func seconds(n int64) time.Duration {
	if n < 0 {
		return 0
	}
	return time.Duration(min(n, math.MaxInt64/int64(time.Second))) * time.Second
}
