// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Forwarder is a port on the machine's own loopback, through which a person
// outside of the bed reaches one address inside. Bytes cross in this process:
// no packet and no route does.
type Forwarder struct {
	listener net.Listener
	inside   *Namespace
	target   string
	done     sync.WaitGroup
	ctx      context.Context
	cancel   context.CancelFunc
}

// Forward listens on the machine's loopback (port 0 means any port) and
// connects whoever comes to the target, an IP address and port as seen from
// the namespace. It lasts until Close, or until the world closes.
func (n *Namespace) Forward(port uint16, target string) (*Forwarder, error) {
	if err := literal("tcp", target); err != nil {
		return nil, err
	}
	outer := outerNet.Load()
	if outer == nil {
		return nil, errors.New("forward: the machine's network is known only to the program that entered the bed")
	}
	f := &Forwarder{inside: n, target: target}
	err := onThread(func() (err error) {
		if err := unix.Setns(int(outer.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		loopback := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
		f.listener, err = net.Listen("tcp4", loopback.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("forward to %s in %s: %w", target, n.name, err)
	}
	f.ctx, f.cancel = context.WithCancel(n.world.ctx)
	f.done.Go(f.serve)
	n.world.OnClose(f.Close)
	return f, nil
}

// Addr returns the address on the machine's loopback.
func (f *Forwarder) Addr() string { return f.listener.Addr().String() }

// Close ends the forwarder and the connections through it.
func (f *Forwarder) Close() error {
	f.cancel()
	err := f.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	f.done.Wait()
	return err
}

func (f *Forwarder) serve() {
	for {
		conn, err := f.listener.Accept()
		if err != nil {
			return
		}
		f.done.Go(func() { f.carry(conn) })
	}
}

// carry joins one connection from outside with one inside.
func (f *Forwarder) carry(outside net.Conn) {
	defer outside.Close()
	ctx, cancel := context.WithTimeout(f.ctx, 10*time.Second)
	inside, err := f.inside.Dial(ctx, "tcp", f.target)
	cancel()
	if err != nil {
		return // the caller sees its connection closed
	}
	defer inside.Close()
	defer context.AfterFunc(f.ctx, func() { outside.Close(); inside.Close() })()
	var both sync.WaitGroup
	for _, pair := range [][2]net.Conn{{outside, inside}, {inside, outside}} {
		both.Go(func() {
			io.Copy(pair[0], pair[1])
			if half, ok := pair[0].(interface{ CloseWrite() error }); ok {
				half.CloseWrite()
			}
		})
	}
	both.Wait()
}
