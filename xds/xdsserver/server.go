// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// Peer is who stands at the other end of a stream, as its credential proves.
type Peer struct {
	Workload       federation.WorkloadKey
	Namespace      string
	ServiceAccount string
	TrustDomain    string // empty means xds.DefaultTrustDomain
}

// Source gives a stream what its proxy is to be told.
type Source interface {
	// Attach waits, at most until the context ends, for the peer's workload to be known.
	// Errors are gRPC statuses. The caller closes the feed.
	Attach(ctx context.Context, peer Peer) (Feed, error)
}

// Feed is what one proxy is told, now and later.
type Feed interface {
	// Current is the whole, never nil.
	Current() Frame
	// Changed gets a value after Current has changed; several changes may be one value.
	Changed() <-chan struct{}
	// Heard is called whenever the stream has nothing more to say at the moment, with the
	// frame that it works on. The holdings are good during the call only.
	Heard(Frame, Holdings)
	Close()
}

// Frame is everything a proxy is told at one moment.
type Frame struct {
	Proxy     xds.Proxy
	Class     string
	Revision  federation.Revision
	Resources xds.Resources

	sequence uint64 // rises when the resources of its feed change
}

// Config of a Server.
type Config struct {
	Source Source

	// Authenticate says who opened a stream, from its TLS certificate or its token. Its
	// errors are sent to the peer; those that are no gRPC statuses as Unauthenticated.
	Authenticate func(ctx context.Context) (Peer, error)

	// Patience is how long a stream waits for the record of its workload; zero means 20 s.
	Patience time.Duration

	// Gate holds back who comes; nil lets everybody in at once.
	Gate *Gate

	// Identifier names this replica in responses; it may be empty.
	Identifier string

	Log *slog.Logger     // nil means none
	Now func() time.Time // nil means time.Now
}

// Server serves ADS, and the discovery services of single types, in both variants.
type Server struct {
	config  Config
	limits  Limits
	metrics *metrics
	diffs   *differences // shared by all streams
	nonces  recentNonce  // likewise

	mu       sync.Mutex
	streams  map[*stream]struct{}
	draining bool
	wait     sync.WaitGroup
}

// New makes a server that Register gives to gRPC.
func New(c Config) *Server {
	if c.Patience == 0 {
		c.Patience = 20 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	limits := Limits{}.withDefaults()
	if c.Gate != nil {
		limits = c.Gate.limits
	}
	return &Server{config: c, limits: limits, metrics: newMetrics(), diffs: &differences{}, streams: map[*stream]struct{}{}}
}

// Options are what a gRPC server of many quiet streams is to be started with: messages
// that are encoded already are passed through, agents ping after 10 quiet seconds (half of
// that is allowed, since packets bunch up on the way), peers that vanished are noticed
// within a minute, and flow control windows are fixed, which saves a ping for every
// message. The buffers of reading are small: what proxies say is short, and over TLS every
// connection keeps its own.
func Options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.ReadBufferSize(2 << 10),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.InitialWindowSize(1 << 20),
		grpc.InitialConnWindowSize(1 << 20),
		grpc.MaxRecvMsgSize(8 << 20),
		grpc.MaxConcurrentStreams(1000),
	}
}

// Disconnect closes the streams of the proxies that which picks, and says how many. They
// are told that their credential is no longer good for anything.
func (s *Server) Disconnect(which func(xds.Proxy) bool) int {
	n := 0
	for _, st := range s.list() {
		if which(st.proxy()) {
			st.kick(status.Error(codes.Unauthenticated, "this identity has been revoked"))
			n++
		}
	}
	return n
}

// Drain refuses new streams and closes those there are, spread evenly over the given time
// in random order, so that other replicas are not stormed. It returns when all are closed
// or the context ends.
func (s *Server) Drain(ctx context.Context, over time.Duration) error {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	streams := s.list()
	rand.Shuffle(len(streams), func(i, j int) { streams[i], streams[j] = streams[j], streams[i] })
	for i, st := range streams {
		share := over / time.Duration(len(streams))
		wait := time.Duration(i) * share
		if share > 0 {
			wait += rand.N(share)
		}
		timer := time.AfterFunc(wait, func() {
			st.kick(status.Error(codes.Unavailable, "this replica is shutting down; another one will answer"))
		})
		defer timer.Stop()
	}
	done := make(chan struct{})
	go func() { s.wait.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Streams is how many there are.
func (s *Server) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

func (s *Server) list() []*stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*stream, 0, len(s.streams))
	for st := range s.streams {
		out = append(out, st)
	}
	return out
}

// add takes a stream in; false while draining.
func (s *Server) add(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return false
	}
	s.streams[st] = struct{}{}
	s.wait.Add(1)
	return true
}

func (s *Server) remove(st *stream) {
	s.mu.Lock()
	delete(s.streams, st)
	s.mu.Unlock()
	s.wait.Done()
}

// serve runs one stream. typeURL is empty on ADS.
func (s *Server) serve(ctx context.Context, w wire, typeURL string) error {
	s.mu.Lock()
	draining := s.draining
	s.mu.Unlock()
	if draining {
		return status.Error(codes.Unavailable, "this replica is shutting down; another one will answer")
	}
	peer, err := s.config.Authenticate(ctx)
	if err != nil {
		s.metrics.refused.Inc()
		if _, ok := status.FromError(err); !ok {
			err = status.Error(codes.Unauthenticated, err.Error())
		}
		return err
	}
	first, who, err := w.receive()
	if err != nil {
		return err
	}
	if who.id == "" {
		return status.Error(codes.InvalidArgument, "the first request of a stream must carry node.id")
	}
	leave, err := s.enter(ctx, peer, first)
	if err != nil {
		return err
	}
	defer leave()
	waiting, cancel := context.WithTimeout(ctx, s.config.Patience)
	feed, err := s.config.Source.Attach(waiting, peer)
	cancel()
	if err != nil {
		s.metrics.refused.Inc()
		s.config.Log.Info("stream refused", "node", who.id, "workload", peer.Workload.UID, "source", peer.Workload.Source, "error", err)
		return err
	}
	defer feed.Close()
	st := newStream(s, w, feed, who, typeURL)
	st.arrived = leave
	if !s.add(st) {
		return status.Error(codes.Unavailable, "this replica is shutting down; another one will answer")
	}
	defer s.remove(st)
	return st.run(ctx, first)
}
