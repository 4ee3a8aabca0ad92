// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// The metadata that every call carries (SPIFFE Workload Endpoint, 3).
const (
	securityHeader = "workload.spiffe.io"
	securityValue  = "true"
)

// Caller is the other end of a Unix socket, as the kernel knew it when it connected.
type Caller struct {
	credentials.CommonAuthInfo
	UID, GID uint32
	PID      int32
}

// AuthType implements credentials.AuthInfo.
func (Caller) AuthType() string { return "unix" }

// handshake finds out who connects. There is no TLS: the specification forbids to require it.
type handshake struct{ server *Server }

var _ credentials.TransportCredentials = (*handshake)(nil)

// ServerHandshake implements credentials.TransportCredentials.
func (h *handshake) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	caller, err := callerOf(conn)
	if err != nil {
		return nil, nil, err
	}
	if !h.server.connect(caller.UID) {
		return nil, nil, fmt.Errorf("user %d has %d connections already", caller.UID, h.server.connectionLimit())
	}
	return &counted{Conn: conn, done: sync.OnceFunc(func() { h.server.disconnect(caller.UID) })}, caller, nil
}

// ClientHandshake implements credentials.TransportCredentials; there is no client here.
func (*handshake) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("workloadapi: credentials of a server only")
}

// Info implements credentials.TransportCredentials.
func (*handshake) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (h *handshake) Clone() credentials.TransportCredentials { return &handshake{h.server} }

// OverrideServerName implements credentials.TransportCredentials.
func (*handshake) OverrideServerName(string) error { return nil }

// callerOf asks the kernel (SO_PEERCRED).
func callerOf(conn net.Conn) (Caller, error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return Caller{}, fmt.Errorf("connection of type %T: want a Unix socket", conn)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var credential *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		credential, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || failed != nil {
		return Caller{}, fmt.Errorf("credentials of the peer: %w", errors.Join(err, failed))
	}
	return Caller{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		UID:            credential.Uid, GID: credential.Gid, PID: credential.Pid,
	}, nil
}

// counted gives its place back when it is closed.
type counted struct {
	net.Conn
	done func()
}

func (c *counted) Close() error {
	c.done()
	return c.Conn.Close()
}

// admit checks one call: its header, its user, and how much that user has open. Whoever is admitted leaves.
func (s *Server) admit(ctx context.Context) (Caller, error) {
	from, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}, status.Error(codes.PermissionDenied, "no connection")
	}
	caller, ok := from.AuthInfo.(Caller)
	if !ok {
		return Caller{}, status.Error(codes.PermissionDenied, "not a Unix socket")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if values := md.Get(securityHeader); len(values) != 1 || values[0] != securityValue {
		return caller, status.Error(codes.InvalidArgument, "security header missing from request: want metadata "+securityHeader+": "+securityValue)
	}
	if s.Users != nil && !slices.Contains(s.Users, caller.UID) {
		return caller, status.Errorf(codes.PermissionDenied, "user %d may not ask for this workload's identity", caller.UID)
	}
	if !s.enter(caller.UID) {
		return caller, status.Errorf(codes.Unavailable, "user %d has %d calls open already", caller.UID, s.streamLimit())
	}
	return caller, nil
}

func (s *Server) connectionLimit() int { return orDefault(s.Connections, DefaultConnections) }
func (s *Server) streamLimit() int     { return orDefault(s.Streams, DefaultStreams) }

func orDefault(n, standard int) int {
	if n == 0 {
		return standard
	}
	return n
}

func (s *Server) connect(uid uint32) bool {
	return s.take(uid, s.connectionLimit(), func(u *usage) *int { return &u.connections })
}
func (s *Server) disconnect(uid uint32) {
	s.giveBack(uid, func(u *usage) *int { return &u.connections })
}
func (s *Server) enter(uid uint32) bool {
	return s.take(uid, s.streamLimit(), func(u *usage) *int { return &u.streams })
}
func (s *Server) leave(uid uint32) { s.giveBack(uid, func(u *usage) *int { return &u.streams }) }

// take counts one more of what one user has open, unless it has too much.
func (s *Server) take(uid uint32, limit int, of func(*usage) *int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.users[uid]
	if u == nil {
		u = new(usage)
	}
	if *of(u) >= limit {
		return false
	}
	*of(u)++
	if s.users == nil {
		s.users = make(map[uint32]*usage)
	}
	s.users[uid] = u
	return true
}

func (s *Server) giveBack(uid uint32, of func(*usage) *int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.users[uid]
	*of(u)--
	if *u == (usage{}) {
		delete(s.users, uid)
	}
}
