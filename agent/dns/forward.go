// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// perResolver and allResolvers bound the wait for answers of others; the
	// latter is what a C library waits before it asks again.
	perResolver  = 2 * time.Second
	allResolvers = 5 * time.Second
)

var errNoResolver = errors.New("no resolver configured")

// upstream is the resolvers of the machine.
type upstream struct {
	mu      sync.Mutex
	current ResolvConf
}

// set returns whether it changed anything.
func (u *upstream) set(c ResolvConf) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if slices.Equal(u.current.Servers, c.Servers) && slices.Equal(u.current.Search, c.Search) {
		return false
	}
	u.current = c
	return true
}

func (u *upstream) config() ResolvConf {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.current
}

// forward asks the machine's own resolvers, one after another. Known says that
// the mesh has the name, though not in the asked type: then "no such name"
// becomes "no such data".
func (s *Server) forward(ctx context.Context, q query, packet []byte, network string, known bool) []byte {
	ctx, cancel := context.WithTimeout(ctx, allResolvers)
	defer cancel()
	err := errNoResolver
	for _, server := range s.upstream.config().Servers {
		var out []byte
		if out, err = s.ask(ctx, server, packet, network); err == nil {
			s.Metrics.count("forwarded")
			if known && len(out) > 3 && dnsmessage.RCode(out[3]&0xf) == dnsmessage.RCodeNameError {
				return s.local(q, dnsmessage.RCodeSuccess, entry{}, network)
			}
			return out
		}
		s.Log.Debug("resolver failed", "resolver", server, "name", q.question.Name.String(), "error", err)
	}
	s.Metrics.count("failed")
	s.Log.Debug("query failed", "name", q.question.Name.String(), "error", err)
	if known {
		return s.local(q, dnsmessage.RCodeSuccess, entry{}, network)
	}
	out, err := q.reply(dnsmessage.RCodeServerFailure, nil, smallest)
	if err != nil {
		return nil
	}
	return out
}

func (s *Server) ask(ctx context.Context, server netip.Addr, packet []byte, network string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, perResolver)
	defer cancel()
	dial := s.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	conn, err := dial(ctx, network, netip.AddrPortFrom(server, s.resolverPort()).String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	if network == "tcp" {
		if err := writeFramed(conn, packet); err != nil {
			return nil, err
		}
		return readFramed(conn)
	}
	if _, err := conn.Write(packet); err != nil {
		return nil, err
	}
	return readMatching(conn, packet)
}

// readMatching waits for the answer to this very query: on an open socket
// anybody may write. The connected socket lets only the resolver's address in;
// number and question must be ours too.
func readMatching(conn io.Reader, packet []byte) ([]byte, error) {
	want, err := parse(packet)
	if err != nil {
		return nil, err
	}
	buffer := make([]byte, 64<<10)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			return nil, fmt.Errorf("wait for answer: %w", err)
		}
		var p dnsmessage.Parser
		header, err := p.Start(buffer[:n])
		if err != nil || !header.Response || header.ID != want.header.ID {
			continue
		}
		if question, err := p.Question(); err == nil && (question.Type != want.question.Type || clean(question.Name.String()) != clean(want.question.Name.String())) {
			continue
		}
		return buffer[:n], nil
	}
}

func (s *Server) resolverPort() uint16 {
	if s.Port == 0 {
		return 53
	}
	return s.Port
}
