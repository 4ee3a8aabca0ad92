// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// idle is how long a TCP connection may be silent.
const idle = 10 * time.Second

// Server answers queries for a zone.
type Server struct {
	// Zone has the answers.
	Zone *Zone
	// Log gets what goes wrong; nil discards it.
	Log *slog.Logger
}

// Serve answers on both sockets, either of which may be nil, until ctx ends or one of
// them fails. It closes them.
func (s *Server) Serve(ctx context.Context, packets net.PacketConn, streams net.Listener) error {
	both, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	var packetErr, streamErr error
	if packets != nil {
		defer context.AfterFunc(both, func() { packets.Close() })()
		all.Go(func() {
			defer cancel()
			packetErr = s.servePackets(packets)
		})
	}
	if streams != nil {
		defer context.AfterFunc(both, func() { streams.Close() })()
		all.Go(func() {
			defer cancel()
			streamErr = s.serveStreams(both, streams)
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return errors.Join(packetErr, streamErr)
}

// servePackets answers UDP queries one after the other: each takes microseconds.
func (s *Server) servePackets(packets net.PacketConn) error {
	defer packets.Close()
	buffer := make([]byte, streamSize)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("dns: read a packet: %w", err)
		}
		reply := s.Zone.Answer(buffer[:n], false)
		if reply == nil {
			continue
		}
		if _, err := packets.WriteTo(reply, from); err != nil && !errors.Is(err, net.ErrClosed) {
			s.debug("answer is not sent", "to", from, "error", err)
		}
	}
}

// serveStreams accepts TCP connections, and ends them with ctx.
func (s *Server) serveStreams(ctx context.Context, streams net.Listener) error {
	var open sync.WaitGroup
	defer open.Wait()
	defer streams.Close()
	for {
		conn, err := streams.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("dns: accept: %w", err)
		}
		open.Go(func() {
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			defer conn.Close()
			if err := s.serveStream(conn); err != nil && ctx.Err() == nil {
				s.debug("connection ends", "from", conn.RemoteAddr(), "error", err)
			}
		})
	}
}

// serveStream answers the queries of one TCP connection in order.
func (s *Server) serveStream(conn net.Conn) error {
	var length [2]byte
	for {
		if err := conn.SetDeadline(time.Now().Add(idle)); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, length[:]); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		query := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(conn, query); err != nil {
			return err
		}
		reply := s.Zone.Answer(query, true)
		if reply == nil {
			return errNoQuery
		}
		framed := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(reply)), uint16(len(reply)))
		if _, err := conn.Write(append(framed, reply...)); err != nil {
			return err
		}
	}
}

func (s *Server) debug(message string, args ...any) {
	if s.Log != nil {
		s.Log.Debug(message, args...)
	}
}
