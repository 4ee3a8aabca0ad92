// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
)

// caller is who makes a call of the admin API.
type caller struct {
	id   ca.Identity
	addr string
}

// peer tells that another replica of meshd is asking.
func (c caller) peer() bool { return isMeshd(c.id) }

type callerKey struct{}

// callerOf is the caller that was let in.
func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// admit lets administrators in, and other replicas of meshd. There is no other
// way in, from whatever address.
func (s *Server) admit(state *tls.ConnectionState, addr string) (caller, error) {
	refuse := func(why string) (caller, error) {
		// Whoever reaches the port can cause this line.
		s.refused.Do(func() { s.cfg.Log.Warn("admin call refused", "peer", addr, "reason", why) })
		return caller{}, api.Problem{
			Status: codes.Unauthenticated, Code: api.NotAnAdministrator, Message: why,
			Try: "use the admin.conf in meshd's data directory",
		}
	}
	if state == nil {
		return refuse("the connection has no TLS")
	}
	if len(state.PeerCertificates) == 0 {
		return refuse("the call shows no client certificate")
	}
	id, err := s.cfg.Authority.Verify(state.PeerCertificates)
	if err == nil {
		err = s.cfg.Authority.RevokedIdentity(id)
	}
	if err != nil {
		return refuse("client certificate: " + err.Error())
	}
	if !id.IsAdmin() && !isMeshd(id) {
		return refuse(fmt.Sprintf("the client certificate is that of %s, not an administrator's", id.ID))
	}
	return caller{id: id, addr: addr}, nil
}

func isMeshd(id ca.Identity) bool {
	return id.Source == ca.SourceMeshd && id.Namespace == ca.ControlNamespace && id.ServiceAccount == ca.ControlAccount
}

// admitRPC is admit for gRPC.
func (s *Server) admitRPC(ctx context.Context) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("no connection")
	}
	var state *tls.ConnectionState
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
		state = &info.State
	}
	c, err := s.admit(state, p.Addr.String())
	if err != nil {
		return nil, err
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

func (s *Server) unaryAdmin(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := s.admitRPC(ctx)
	if err != nil {
		return nil, err
	}
	answer, err := handler(ctx, req)
	return answer, explain(err)
}

func (s *Server) streamAdmin(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := s.admitRPC(stream.Context())
	if err != nil {
		return err
	}
	return explain(handler(srv, admittedStream{stream, ctx}))
}

// admittedStream is a stream that knows its caller.
type admittedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s admittedStream) Context() context.Context { return s.ctx }

// adminOnly is admit for JSON.
func (s *Server) adminOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := s.admit(r.TLS, r.RemoteAddr)
		if err != nil {
			writeProblem(w, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
	})
}

// record writes to the audit log who did what. What cannot be recorded is not
// done.
func (s *Server) record(ctx context.Context, verb, object string, source ca.Source) error {
	c := callerOf(ctx)
	entry := ca.AuditEntry{
		Event: auditAdmin, Method: verb, Reason: object, Source: source, Peer: c.addr,
		Credential: c.id.Serial, Instance: c.id.Instance,
	}
	if !c.id.ID.IsZero() {
		entry.SPIFFEID = c.id.ID.String()
	}
	if err := s.cfg.Audit.Append(entry); err != nil {
		return api.Problem{Status: codes.Unavailable, Message: "the audit log cannot be written, so nothing is changed: " + err.Error()}
	}
	return nil
}

// auditAdmin is the event of audit lines about changes by administrators.
const auditAdmin = "admin"
