// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
)

// unreachableAfter is how long a connection may take before it is worth a line.
const unreachableAfter = 2 * time.Second

// reportStates says so while meshd cannot be reached, with the reason: opening
// a stream waits in silence otherwise. The returned function ends the watch.
func (r *Relay) reportStates(ctx context.Context, conn *grpc.ClientConn) func() {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		said := ""
		for began := time.Now(); ; {
			state := conn.GetState()
			if state == connectivity.Ready {
				began, said = time.Now(), ""
			}
			if state != connectivity.Ready && time.Since(began) > unreachableAfter {
				if reason := r.lastFailure(); reason != said {
					said = reason
					r.Log.Warn("meshd cannot be reached, trying on", "server", r.Servers.String(), "error", reason, "since", began.UTC().Format(time.RFC3339))
				}
			}
			// A connection that fails again and again stays in one state, so this
			// also looks once a second.
			look, done := context.WithTimeout(ctx, time.Second)
			conn.WaitForStateChange(look, state)
			done()
			if ctx.Err() != nil {
				return
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

func (r *Relay) note(err error) {
	if err == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = err
}

func (r *Relay) lastFailure() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil {
		return "unknown"
	}
	return r.last.Error()
}

func (r *Relay) dial(ctx context.Context, address string) (net.Conn, error) {
	dial := r.Dial
	if dial == nil {
		dial = func(ctx context.Context, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}
	}
	conn, err := dial(ctx, address)
	r.note(err)
	return conn, err
}

// noted remembers why a handshake failed; gRPC keeps that to itself.
type noted struct {
	credentials.TransportCredentials
	note func(error)
}

func (n *noted) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := n.TransportCredentials.ClientHandshake(ctx, authority, conn)
	n.note(err)
	return secured, info, err
}

func (n *noted) Clone() credentials.TransportCredentials {
	return &noted{TransportCredentials: n.TransportCredentials.Clone(), note: n.note}
}
