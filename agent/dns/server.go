// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/isthmus-mesh/isthmus/api"
)

// Server answers queries. Namespace is required; fields must not change once
// it serves.
type Server struct {
	// Namespace of the workload.
	Namespace string
	// Domain of the cluster; empty means cluster.local.
	Domain string
	// ResolvConf is the file that names resolvers and search domains; it is
	// read again when it changes. Empty means none: other names fail.
	ResolvConf string
	// Authoritative says that nobody else knows names of the mesh, which is so
	// outside Kubernetes: an unknown one gets NXDOMAIN at once.
	Authoritative bool
	// Dial reaches resolvers past our own redirection; nil uses the network as
	// it is.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Port of the resolvers; 0 means 53.
	Port uint16
	// Metrics may be nil.
	Metrics *Metrics
	// Log gets failures of resolvers; nil discards.
	Log *slog.Logger

	table    atomic.Pointer[Table]
	upstream upstream
	last     atomic.Pointer[api.NameTable]
}

// pendingLimit bounds concurrent queries, since each may wait for a resolver.
const pendingLimit = 1024

// idleTCP is how long a TCP client may be silent.
const idleTCP = 10 * time.Second

// SetNames replaces the table.
func (s *Server) SetNames(in *api.NameTable) {
	s.last.Store(in)
	s.index()
}

// Names returns the number of hosts known, and whether a table was received.
func (s *Server) Names() (int, bool) {
	t := s.table.Load()
	if t == nil {
		return 0, false
	}
	return t.Len(), true
}

func (s *Server) index() {
	in := s.last.Load()
	if in == nil {
		return
	}
	domain := s.Domain
	if domain == "" {
		domain = "cluster.local"
	}
	s.table.Store(NewTable(in, s.Namespace, domain, s.upstream.config().Search))
}

// Serve answers on the given sockets until ctx ends, and closes them.
func (s *Server) Serve(ctx context.Context, packets []net.PacketConn, listeners []net.Listener) error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	s.reload()
	pending := make(chan struct{}, pendingLimit)
	var serving sync.WaitGroup
	for _, conn := range packets {
		serving.Go(func() { s.servePackets(ctx, conn, pending) })
	}
	for _, l := range listeners {
		serving.Go(func() { s.serveTCP(ctx, l, pending) })
	}
	serving.Go(func() { s.watch(ctx) })
	<-ctx.Done()
	for _, conn := range packets {
		conn.Close()
	}
	for _, l := range listeners {
		l.Close()
	}
	serving.Wait()
	return nil
}

// watch follows resolv.conf, which a DHCP client may rewrite.
func (s *Server) watch(ctx context.Context) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.reload()
		}
	}
}

func (s *Server) reload() {
	if s.ResolvConf == "" {
		return
	}
	config, err := ReadResolvConf(s.ResolvConf)
	if err != nil {
		s.Log.Warn("resolvers not read", "file", s.ResolvConf, "error", err)
		return
	}
	if s.upstream.set(config) {
		s.index()
	}
}

func (s *Server) servePackets(ctx context.Context, conn net.PacketConn, pending chan struct{}) {
	buffer := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error of an earlier answer
		}
		packet := append([]byte(nil), buffer[:n]...)
		select {
		case pending <- struct{}{}:
		default:
			s.Metrics.count("dropped")
			continue // the client asks again
		}
		go func() {
			defer func() { <-pending }()
			if out := s.answer(ctx, packet, "udp"); out != nil {
				_, _ = conn.WriteTo(out, from) // a client that went away asks nobody
			}
		}()
	}
}

func (s *Server) serveTCP(ctx context.Context, l net.Listener, pending chan struct{}) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			select { // out of descriptors, most likely: let some close
			case <-ctx.Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
			continue
		}
		select {
		case pending <- struct{}{}:
		default:
			s.Metrics.count("dropped")
			conn.Close()
			continue
		}
		go func() {
			defer func() { <-pending }()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			s.converse(ctx, conn)
		}()
	}
}

// converse answers the queries of one TCP connection, in order.
func (s *Server) converse(ctx context.Context, conn net.Conn) {
	for {
		if conn.SetDeadline(time.Now().Add(idleTCP)) != nil {
			return
		}
		packet, err := readFramed(conn)
		if err != nil {
			return
		}
		out := s.answer(ctx, packet, "tcp")
		if out == nil || writeFramed(conn, out) != nil {
			return
		}
	}
}

func readFramed(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	packet := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, packet)
	return packet, err
}

func writeFramed(w io.Writer, packet []byte) error {
	if len(packet) > 0xffff {
		return errors.New("message of more than 65535 bytes")
	}
	framed := binary.BigEndian.AppendUint16(make([]byte, 0, len(packet)+2), uint16(len(packet)))
	_, err := w.Write(append(framed, packet...))
	return err
}

// answer decides about one query. Nil means that nothing is to be said.
func (s *Server) answer(ctx context.Context, packet []byte, network string) []byte {
	q, err := parse(packet)
	if err != nil {
		return s.malformed(q, packet, network)
	}
	if q.header.OpCode != 0 {
		return s.local(q, dnsmessage.RCodeNotImplemented, entry{}, network)
	}
	if q.question.Class == dnsmessage.ClassINET {
		if out := s.fromTable(ctx, q, packet, network); out != nil {
			return out
		}
	}
	return s.forward(ctx, q, packet, network, false)
}

// fromTable answers what the mesh knows; nil means that it does not.
func (s *Server) fromTable(ctx context.Context, q query, packet []byte, network string) []byte {
	table, name := s.table.Load(), q.question.Name.String()
	if table == nil {
		return nil
	}
	e, found := table.find(name)
	if !found {
		if s.Authoritative && table.inMesh(name) {
			return s.local(q, dnsmessage.RCodeNameError, entry{}, network)
		}
		return nil
	}
	switch q.question.Type {
	case dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeALL:
		return s.local(q, dnsmessage.RCodeSuccess, e, network)
	}
	if s.Authoritative {
		return s.local(q, dnsmessage.RCodeSuccess, entry{}, network)
	}
	return s.forward(ctx, q, packet, network, true)
}

func (s *Server) local(q query, code dnsmessage.RCode, e entry, network string) []byte {
	limit := q.size
	if network == "tcp" {
		limit = 0xffff
	}
	out, err := q.reply(code, q.addresses(e), limit)
	if err != nil {
		s.Log.Warn("query not answered", "name", q.question.Name.String(), "error", err)
		return nil
	}
	s.Metrics.count("mesh")
	return out
}

func (s *Server) malformed(q query, packet []byte, network string) []byte {
	s.Metrics.count("malformed")
	if len(packet) < 12 || packet[2]&0x80 != 0 {
		return nil // not even an ID, or a response: answering could go in circles
	}
	q.header.ID = binary.BigEndian.Uint16(packet)
	q.question = dnsmessage.Question{}
	out, err := q.reply(dnsmessage.RCodeFormatError, nil, smallest)
	if err != nil {
		return nil
	}
	return out
}
