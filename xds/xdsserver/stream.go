// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/xds"
)

// stream is one proxy's conversation. Its machine is touched by one goroutine, under mu
// only so that Proxies can look at it.
type stream struct {
	server  *Server
	wire    wire
	feed    Feed
	typeURL string // of single-type streams
	opened  time.Time
	kicked  chan error // capacity 1

	mu      sync.Mutex
	node    node
	machine *machine
	frame   Frame
	arrived func()    // tells the gate that it has all that it asked for; nil from then on
	behind  time.Time // since when something was unacknowledged; zero while in sync
}

func newStream(s *Server, w wire, feed Feed, who node, typeURL string) *stream {
	m := newMachine(w.sotw())
	m.diffs = s.diffs
	return &stream{
		server: s, wire: w, feed: feed, node: who, typeURL: typeURL, opened: s.config.Now(),
		kicked: make(chan error, 1), machine: m,
	}
}

func (st *stream) proxy() xds.Proxy {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.frame.Proxy
}

// kick ends the stream with an error, also while it waits for a slow reader.
func (st *stream) kick(err error) {
	select {
	case st.kicked <- err:
	default:
	}
}

// run returns when the peer leaves or the stream is kicked. The conversation has a
// goroutine of its own, because a send to a peer that does not read returns only after
// the handler has.
func (st *stream) run(ctx context.Context, first request) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st.load()
	done := make(chan error, 1)
	go func() { done <- st.converse(ctx, first) }()
	select {
	case err := <-done:
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	case err := <-st.kicked:
		return err
	}
}

// load takes over what the feed has.
func (st *stream) load() {
	frame := st.feed.Current()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.frame = frame
	st.machine.update(frame.Resources)
}

// converse is the loop of one stream.
func (st *stream) converse(ctx context.Context, first request) error {
	requests := make(chan request)
	failed := make(chan error, 1)
	go func() {
		for {
			r, who, err := st.wire.receive()
			if err != nil {
				failed <- err
				return
			}
			if who != (node{}) {
				st.mu.Lock()
				st.node.learn(who)
				st.mu.Unlock()
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	if err := st.hear(first); err != nil {
		return err
	}
	for {
		wait, err := st.speak()
		if err != nil {
			return err
		}
		timer.Reset(wait)
		select {
		case r := <-requests:
			if err := st.hear(r); err != nil {
				return err
			}
		case <-st.feed.Changed():
			st.load()
		case <-timer.C:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// hear takes in a request.
func (st *stream) hear(r request) error {
	if st.typeURL != "" {
		if r.typeURL != "" && r.typeURL != st.typeURL {
			return status.Errorf(codes.InvalidArgument, "type_url %q on a stream of %q", r.typeURL, st.typeURL)
		}
		r.typeURL = st.typeURL
	}
	if r.typeURL == "" {
		return status.Error(codes.InvalidArgument, "type_url is mandatory on ADS")
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if err := st.server.limits.bound(st.machine, r); err != nil {
		return err
	}
	now := st.server.config.Now()
	if sub := st.machine.subs[r.typeURL]; r.isNACK && sub != nil && r.nonce == sub.inFlight && r.nonce != "" {
		st.server.metrics.nacks.WithLabelValues(kind(r.typeURL)).Inc()
		st.server.config.Log.Warn("proxy refused configuration", "proxy", st.node.id, "type", kind(r.typeURL),
			"resources", clip(blamed(sub.sentNames, r.refused), 5), "message", r.refused)
	}
	st.machine.request(r, now)
	return nil
}

// clip keeps log lines readable.
func clip(names []string, n int) []string {
	if len(names) <= n {
		return names
	}
	return append(names[:n:n], "…")
}

// speak sends all there is to say, and tells how long to wait before asking again.
func (st *stream) speak() (time.Duration, error) {
	for {
		now := st.server.config.Now()
		st.mu.Lock()
		r, again := st.machine.next(now)
		st.measure(now)
		if r == nil {
			st.feed.Heard(st.frame, st.machine)
			st.bring()
		}
		st.mu.Unlock()
		if r == nil {
			if again.IsZero() {
				return time.Hour, nil
			}
			return max(again.Sub(now), time.Millisecond), nil
		}
		st.server.metrics.sent(r)
		if err := st.wire.send(r); err != nil {
			return 0, err
		}
	}
}

// measure notes how long the proxy took to acknowledge everything.
func (st *stream) measure(now time.Time) {
	waiting := st.machine.waiting()
	switch {
	case waiting && st.behind.IsZero():
		st.behind = now
	case !waiting && !st.behind.IsZero():
		st.server.metrics.converged.Observe(now.Sub(st.behind).Seconds())
		st.behind = time.Time{}
	}
}
