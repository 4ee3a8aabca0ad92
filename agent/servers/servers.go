// SPDX-License-Identifier: Apache-2.0

// Package servers finds meshd where it may have several replicas: any of them will do, so
// that what cannot be reached is passed over, and no balancer is needed before them.
package servers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
)

// ErrAddress means that a text names no server.
var ErrAddress = errors.New("want host:port, several separated by commas")

// List is the addresses of meshd's replicas, host:port each. Their order says nothing.
type List []string

// Parse reads addresses that are separated by commas; there is at least one.
func Parse(text string) (List, error) {
	var list List
	for one := range strings.SplitSeq(text, ",") {
		one = strings.TrimSpace(one)
		if host, port, err := net.SplitHostPort(one); err != nil || host == "" || port == "" {
			return nil, fmt.Errorf("server %q: %w", text, ErrAddress)
		}
		if !slices.Contains(list, one) {
			list = append(list, one)
		}
	}
	return list, nil
}

// String is what Parse reads.
func (l List) String() string { return strings.Join(l, ",") }

// scheme of our targets, which gRPC wants to have a name for.
const scheme = "meshd"

// Client makes a connection, which opens when it is used, to one of the servers: to the
// first that completes a handshake, beginning anywhere in the list, so that many agents
// spread over the replicas. Who does not answer within a quarter of a second is tried
// together with the next. Each server is verified by the host name that it stands in the
// list with. Who has not said a word for 20 s, although asked after 10, is left for another:
// a replica that hangs, or a machine that was unplugged. dial opens connections; nil uses
// the network as it is.
func (l List) Client(dial func(ctx context.Context, address string) (net.Conn, error), options ...grpc.DialOption) (*grpc.ClientConn, error) {
	if len(l) == 0 {
		return nil, fmt.Errorf("no server: %w", ErrAddress)
	}
	if dial != nil {
		options = append(options, grpc.WithContextDialer(dial))
	}
	options = append(options,
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 10 * time.Second}),
		// Names are looked up by dial, not by gRPC: it knows the way past redirection.
		grpc.WithResolvers(fixed(l)), grpc.WithDisableServiceConfig(),
	)
	return grpc.NewClient(scheme+":///", options...)
}

// fixed is a resolver that knows its answer.
type fixed List

func (fixed) Scheme() string { return scheme }

// Build implements resolver.Builder.
func (f fixed) Build(_ resolver.Target, conn resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	var state resolver.State
	begin := rand.IntN(len(f))
	for i := range f {
		address := f[(begin+i)%len(f)]
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, fmt.Errorf("server %q: %w", address, ErrAddress)
		}
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address, ServerName: host}}})
	}
	return f, conn.UpdateState(state)
}

// ResolveNow implements resolver.Resolver.
func (fixed) ResolveNow(resolver.ResolveNowOptions) {}

// Close implements resolver.Resolver.
func (fixed) Close() {}
