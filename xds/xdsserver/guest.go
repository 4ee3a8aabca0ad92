// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/credentials"
)

// errTooLong ends a handshake that had to wait too long for a processor.
var errTooLong = errors.New("no processor was free for the handshake in time")

// Listener bounds the connections of a listener: one too many is closed at once, so that
// the peer can go elsewhere. Credentials does the rest.
func (g *Gate) Listener(l net.Listener) net.Listener { return gateListener{l, g} }

type gateListener struct {
	net.Listener
	gate *Gate
}

// Accept implements net.Listener.
func (l gateListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.gate.admit() {
			return &guest{Conn: conn, gate: l.gate}, nil
		}
		l.gate.metrics.refused.WithLabelValues("connection").Inc()
		conn.Close()
	}
}

// admit counts another connection, if it is not one too many.
func (g *Gate) admit() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.connections >= g.limits.Connections || g.strangers >= g.limits.Strangers {
		return false
	}
	g.connections++
	g.strangers++
	return true
}

// guest is a connection that is counted. While it shakes hands it holds a place among
// those that compute, but not while it waits for its peer. Those that have begun have
// places of their own, so that they end before all others have begun.
type guest struct {
	net.Conn
	gate *Gate

	known   sync.Once
	closing sync.Once
	shaking atomic.Bool
	place   chan struct{} // in which it holds one, nil if it holds none; used by the handshake alone, as are the next
	begun   bool
	until   time.Time // when the handshake must be done, what it waits for a place not counted
}

// SyscallConn lets gRPC set options of the socket.
func (c *guest) SyscallConn() (syscall.RawConn, error) {
	if raw, ok := c.Conn.(syscall.Conn); ok {
		return raw.SyscallConn()
	}
	return nil, fmt.Errorf("a %T is no socket", c.Conn)
}

// Read implements net.Conn.
func (c *guest) Read(b []byte) (int, error) {
	if !c.shaking.Load() {
		return c.Conn.Read(b)
	}
	c.release()
	n, err := c.Conn.Read(b)
	if err != nil {
		return n, err
	}
	return n, c.acquire()
}

// Close implements net.Conn.
func (c *guest) Close() error {
	c.meet()
	c.closing.Do(func() {
		c.gate.mu.Lock()
		defer c.gate.mu.Unlock()
		c.gate.connections--
	})
	return c.Conn.Close()
}

// meet counts it no more with the strangers.
func (c *guest) meet() {
	c.known.Do(func() {
		c.gate.mu.Lock()
		defer c.gate.mu.Unlock()
		c.gate.strangers--
	})
}

// acquire takes a place among those that compute.
func (c *guest) acquire() error {
	place := c.gate.beginning
	if c.begun {
		place = c.gate.ending
	}
	c.begun = true
	select {
	case place <- struct{}{}:
		c.place = place
		return nil
	default:
	}
	start := time.Now()
	timer := time.NewTimer(c.gate.limits.Wait)
	defer timer.Stop()
	select {
	case place <- struct{}{}:
		c.place = place
		waited := time.Since(start)
		c.gate.metrics.waited.WithLabelValues("handshake").Observe(waited.Seconds())
		c.until = c.until.Add(waited)
		return c.SetDeadline(c.until)
	case <-timer.C:
		c.gate.metrics.refused.WithLabelValues("handshake").Inc()
		return errTooLong
	}
}

func (c *guest) release() {
	if c.place != nil {
		<-c.place
		c.place = nil
	}
}

// Credentials make handshakes wait for their turn. They are for connections of Listener.
func (g *Gate) Credentials(c credentials.TransportCredentials) credentials.TransportCredentials {
	return gateCredentials{c, g}
}

type gateCredentials struct {
	credentials.TransportCredentials
	gate *Gate
}

// patienceWithPeers is how long a handshake may take, what it waits for a place not counted.
const patienceWithPeers = 10 * time.Second

// ServerHandshake implements credentials.TransportCredentials.
func (c gateCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	g, ok := conn.(*guest)
	if !ok {
		return c.TransportCredentials.ServerHandshake(conn)
	}
	g.until = time.Now().Add(patienceWithPeers)
	if err := g.SetDeadline(g.until); err != nil {
		return nil, nil, err
	}
	g.shaking.Store(true)
	defer g.shaking.Store(false)
	defer g.release()
	out, info, err := c.TransportCredentials.ServerHandshake(conn)
	if err == nil {
		g.meet()
	}
	return out, info, err
}

// Clone implements credentials.TransportCredentials.
func (c gateCredentials) Clone() credentials.TransportCredentials {
	return gateCredentials{c.TransportCredentials.Clone(), c.gate}
}

// processorTime is what this process has used so far.
func processorTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
