// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/api"
)

// ErrBroken ends Envoy's stream when the upstream has ended.
var ErrBroken = errors.New("discovery stream to meshd ended")

// Relay is the agent's side of the aggregated discovery service.
// Fields must not change once it serves.
type Relay struct {
	// Servers are meshd's; any of them will do.
	Servers servers.List
	// Credentials authenticate both sides; see identity.Credentials.
	Credentials credentials.TransportCredentials
	// Ready blocks until Credentials have a certificate to show.
	Ready func(ctx context.Context) error
	// Dial opens connections; nil uses the network as it is.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Names gets the whole name table whenever it changes. It may not call the relay. If
	// nil, none is asked for.
	Names func(*api.NameTable)
	// Expires is when the workload's certificate ends, and a channel that is closed
	// when that may have changed. If set, meshd is told at the start and each time:
	// the certificate that it saw on the stream is renewed while the stream goes on.
	Expires func() (time.Time, <-chan struct{})
	// Beside, if set, is run on each connection to meshd for as long as its stream lives.
	Beside func(ctx context.Context, conn grpc.ClientConnInterface)
	// Memory, if set, learns what Envoy accepts, and is what an Envoy without configuration
	// gets while no meshd has answered for Patience, or 5 seconds if that is zero.
	Memory   *Memory
	Patience time.Duration
	// Log gets connects, breaks and what Envoy refuses; nil discards.
	Log *slog.Logger

	connected  atomic.Int64
	recalling  atomic.Int64 // streams that are answered from memory
	configured atomic.Bool

	mu   sync.Mutex
	held names
	last error // why the last attempt to connect failed
}

// Connected tells whether an upstream stream is open.
func (r *Relay) Connected() bool { return r.connected.Load() > 0 }

// Configured tells whether Envoy has accepted listeners at least once.
func (r *Relay) Configured() bool { return r.configured.Load() }

// Register adds the aggregated discovery service to a gRPC server, which must
// use Codec.
func (r *Relay) Register(server *grpc.Server) {
	if r.Log == nil {
		r.Log = slog.New(slog.DiscardHandler)
	}
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: discoveryv3.AggregatedDiscoveryService_ServiceDesc.ServiceName,
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{
			{StreamName: "StreamAggregatedResources", ServerStreams: true, ClientStreams: true, Handler: r.handler(stateOfTheWorld)},
			{StreamName: "DeltaAggregatedResources", ServerStreams: true, ClientStreams: true, Handler: r.handler(incremental)},
		},
	}, r)
}

func (r *Relay) handler(d dialect) grpc.StreamHandler {
	return func(_ any, envoy grpc.ServerStream) error {
		err := r.carry(envoy, d)
		if err == nil || envoy.Context().Err() != nil {
			return nil
		}
		r.Log.Warn("discovery stream ended", "server", r.Servers.String(), "error", err)
		if _, ok := status.FromError(err); ok {
			return err
		}
		return status.Error(codes.Unavailable, err.Error())
	}
}

// carry serves one stream of Envoy's from open to end.
func (r *Relay) carry(envoy grpc.ServerStream, d dialect) error {
	ctx, cancel := context.WithCancel(envoy.Context())
	defer cancel()
	if r.Ready != nil {
		if err := r.Ready(ctx); err != nil {
			return err
		}
	}
	// A connection of its own for each stream: it is bound to the certificate
	// of its handshake, and the next stream must show the present one.
	conn, err := r.Servers.Client(r.dial, r.options()...)
	if err != nil {
		return fmt.Errorf("meshd %s: %w", r.Servers, err)
	}
	defer conn.Close()
	stopReporting := r.reportStates(ctx, conn)
	defer stopReporting()
	meshd, first, err := r.open(ctx, conn, envoy, d)
	if err != nil {
		return err
	}
	r.connected.Add(1)
	defer r.connected.Add(-1)
	r.Log.Info("discovery stream open", "server", r.Servers.String(), "address", addressOf(meshd.Context()))
	one := &exchange{relay: r, dialect: d, envoy: envoy, meshd: meshd, first: first, begun: make(chan struct{})}
	if d.method == incremental.method {
		one.lesson = r.Memory.learn()
	}
	ended := make(chan error, 2)
	// Both end soon after this handler: cancel unblocks the side of meshd, and
	// returning unblocks the side of Envoy.
	go func() { ended <- one.requests() }()
	go func() { ended <- one.responses() }()
	if r.Expires != nil && d.tell != nil {
		go one.tellExpiry(ctx)
	}
	if r.Beside != nil {
		go r.Beside(ctx, conn)
	}
	return <-ended
}

func (r *Relay) options() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(&noted{TransportCredentials: r.Credentials, note: r.note}),
		grpc.WithDefaultCallOptions(
			grpc.ForceCodecV2(Codec{}),
			grpc.MaxCallRecvMsgSize(math.MaxInt32),
			grpc.MaxCallSendMsgSize(math.MaxInt32),
		),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 250 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	}
}

// addressOf is where the other end of a stream is.
func addressOf(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return "unknown"
}

// exchange is one pair of streams.
type exchange struct {
	relay   *Relay
	dialect dialect
	envoy   grpc.ServerStream
	meshd   grpc.ClientStream
	first   *frame  // of Envoy's, if it was read already
	lesson  *lesson // nil without a memory

	sending sync.Mutex    // guards meshd.SendMsg, which has three callers
	asked   bool          // listeners were asked for; only requests() uses it
	begun   chan struct{} // closed then
}

// requests carries Envoy's messages up.
func (x *exchange) requests() error {
	for {
		f, err := x.next()
		if err != nil {
			if errors.Is(err, io.EOF) {
				x.sending.Lock()
				defer x.sending.Unlock()
				return x.meshd.CloseSend()
			}
			return err
		}
		kind, err := text(f.data, x.dialect.requestType)
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		x.lesson.request(string(kind), f.data)
		if err := x.send(f); err != nil {
			return err
		}
		x.note(string(kind), f.data)
		if string(kind) != listenerType || x.asked {
			continue
		}
		x.asked = true
		close(x.begun)
		if x.relay.Names == nil {
			continue
		}
		if err := x.askNames(); err != nil {
			return err
		}
	}
}

// next is Envoy's next message.
func (x *exchange) next() (*frame, error) {
	if f := x.first; f != nil {
		x.first = nil
		return f, nil
	}
	f := new(frame)
	return f, x.envoy.RecvMsg(f)
}

// askNames subscribes to the name table.
func (x *exchange) askNames() error {
	data, err := proto.Marshal(x.dialect.subscribe(x.relay.heldNames()))
	if err != nil {
		return err
	}
	x.lesson.request(NameTableType, data)
	return x.send(&frame{data: data})
}

// expiresKey is the metadata in which meshd is told when the certificate ends.
const expiresKey = "ISTHMUS_CERTIFICATE_EXPIRES"

// tellExpiry tells meshd, for people to see, when the workload's certificate ends. It rides
// on the subscription to listeners, which is there by then, and asks for nothing.
func (x *exchange) tellExpiry(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-x.begun:
	}
	for told := (time.Time{}); ; {
		at, changed := x.relay.Expires()
		if !at.IsZero() && !at.Equal(told) {
			told = at
			metadata := &structpb.Struct{Fields: map[string]*structpb.Value{expiresKey: structpb.NewStringValue(at.UTC().Format(time.RFC3339))}}
			if err := x.sendMessage(x.dialect.tell(&corev3.Node{Metadata: metadata})); err != nil {
				return // the stream has ended, and its readers say why
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// note looks at what Envoy said about an earlier response: an acknowledgement
// of listeners makes us configured, a refusal is what a person wants to read.
func (x *exchange) note(kind string, data []byte) {
	nonce, err := text(data, x.dialect.requestNonce)
	if err != nil || len(nonce) == 0 {
		return
	}
	refusal, err := text(data, x.dialect.requestError)
	if err != nil {
		return
	}
	x.lesson.judged(string(nonce), refusal == nil)
	if refusal == nil {
		if kind == listenerType {
			x.relay.configured.Store(true)
		}
		return
	}
	message, _ := text(refusal, fieldStatusMessage) // a refusal without words is still one
	x.relay.Log.Warn("envoy refused configuration", "type", kind, "nonce", string(nonce), "error", string(message))
}

// responses carries meshd's messages down.
func (x *exchange) responses() error {
	for {
		var f frame
		if err := x.meshd.RecvMsg(&f); err != nil {
			if errors.Is(err, io.EOF) {
				return ErrBroken
			}
			return err
		}
		kind, err := text(f.data, fieldResponseType)
		if err != nil {
			return err
		}
		x.lesson.response(string(kind), f.data)
		if string(kind) != NameTableType {
			if err := x.envoy.SendMsg(&f); err != nil {
				return err
			}
			continue
		}
		if err := x.names(f.data); err != nil {
			return err
		}
	}
}

// names consumes one name table response.
func (x *exchange) names(data []byte) error {
	answer, err := x.dialect.answer(data)
	if err != nil {
		x.relay.Log.Warn("name table refused", "error", err)
		return x.sendMessage(x.dialect.confirm(answer, fmt.Errorf("name table: %w", err)))
	}
	x.relay.take(answer)
	x.lesson.judged(answer.nonce, true)
	return x.sendMessage(x.dialect.confirm(answer, nil))
}

func (x *exchange) sendMessage(message proto.Message) error {
	data, err := proto.Marshal(message)
	if err != nil {
		return err
	}
	return x.send(&frame{data: data})
}

// send reports io.EOF as success: the real error is what RecvMsg returns.
func (x *exchange) send(f *frame) error {
	x.sending.Lock()
	defer x.sending.Unlock()
	if err := x.meshd.SendMsg(f); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func (r *Relay) heldNames() map[string]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held.versions
}

// take hands on the names as they are with an answer. Several streams of one Envoy may
// overlap for a moment: their answers are taken one after the other.
func (r *Relay) take(a namesAnswer) {
	if r.Names == nil || a.empty() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = r.held.after(a)
	r.Names(r.held.table())
}
