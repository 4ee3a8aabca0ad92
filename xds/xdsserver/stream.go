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

// stream is one proxy's conversation. Whoever brings something new, the proxy or the feed,
// looks at once what there is to say, and says it; only one at a time does.
type stream struct {
	server  *Server
	wire    wire
	feed    Feed
	typeURL string // of single-type streams
	opened  time.Time
	ended   chan error // capacity 1

	mu       sync.Mutex
	node     node
	machine  *machine
	frame    Frame
	stale    bool   // the feed has something newer than frame
	speaking bool   // somebody is sending, and looks again before he stops
	closed   bool   // nothing more is to be sent
	arrived  func() // tells the gate that it has all that it asked for; nil from then on
	behind   time.Time
	timer    *time.Timer // looks again when something that is held back may go; nil until needed
}

// Watcher is a Feed that calls a function instead of using its channel, which saves a
// goroutine for each stream. The function does not block.
type Watcher interface {
	Watch(changed func())
}

func newStream(s *Server, w wire, feed Feed, who node, typeURL string) *stream {
	m := newMachine(w.sotw())
	m.diffs = s.diffs
	return &stream{
		server: s, wire: w, feed: feed, node: who, typeURL: typeURL, opened: s.config.Now(),
		ended: make(chan error, 1), machine: m, stale: true,
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
	case st.ended <- err:
	default:
	}
}

// run returns when the peer leaves or the stream is kicked. The conversation has a
// goroutine of its own, because a send to a peer that does not read returns only after
// the handler has.
func (st *stream) run(ctx context.Context, first request) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st.mu.Lock()
	st.load()
	st.mu.Unlock()
	go st.listen(first)
	if w, ok := st.feed.(Watcher); ok {
		w.Watch(st.wake)
	} else {
		go func() {
			for {
				select {
				case <-st.feed.Changed():
					st.wake()
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	err := <-st.ended
	st.mu.Lock()
	st.closed = true
	if st.timer != nil {
		st.timer.Stop()
	}
	st.mu.Unlock()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// load takes over what the feed has. The lock is held.
func (st *stream) load() {
	st.stale = false
	st.frame = st.feed.Current()
	st.machine.update(st.frame.Resources)
}

// listen takes in what the proxy says until it leaves.
func (st *stream) listen(first request) {
	err := st.hear(first)
	for err == nil {
		st.speak(true)
		var r request
		var who node
		if r, who, err = st.wire.receive(); err != nil {
			break
		}
		if who != (node{}) {
			st.mu.Lock()
			st.node.learn(who)
			st.mu.Unlock()
		}
		err = st.hear(r)
	}
	st.kick(err)
}

// wake looks at the feed again.
func (st *stream) wake() {
	st.mu.Lock()
	st.stale = true
	st.mu.Unlock()
	st.speak(false)
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

// unanswered is up to how many bytes may be in flight for a send not to block: gRPC lets a
// message of any size go while less than 64 KiB of those before are not written yet, and
// what is acknowledged has been.
const unanswered = 48 << 10

// speak sends all there is to say, if nobody else is about to. Who must not block has a
// proxy that does not keep up waited for by a goroutine.
func (st *stream) speak(mayBlock bool) {
	st.mu.Lock()
	if st.speaking || st.closed {
		st.mu.Unlock()
		return
	}
	st.speaking = true
	for {
		if st.stale {
			st.load()
		}
		now := st.server.config.Now()
		r, again := st.machine.next(now)
		st.measure(now)
		if r == nil {
			st.feed.Heard(st.frame, st.machine)
			st.bring()
			st.speaking = false
			st.lookAgain(again, now)
			st.mu.Unlock()
			return
		}
		blocks := !mayBlock && st.machine.unanswered()-r.size > unanswered
		st.mu.Unlock()
		if blocks {
			go func() {
				if st.send(r) {
					st.resume()
				}
			}()
			return
		}
		if !st.send(r) {
			return
		}
		st.mu.Lock()
	}
}

// resume goes on speaking.
func (st *stream) resume() {
	st.mu.Lock()
	st.speaking = false
	st.mu.Unlock()
	st.speak(true)
}

// send is false when the stream is over; then nobody speaks any more.
func (st *stream) send(r *response) bool {
	st.server.metrics.sent(r)
	err := st.wire.send(r)
	if err != nil {
		st.kick(err)
	}
	return err == nil
}

// lookAgain sees to it that what is held back goes when it may.
func (st *stream) lookAgain(at, now time.Time) {
	switch wait := max(at.Sub(now), time.Millisecond); {
	case st.closed || at.IsZero():
		if st.timer != nil {
			st.timer.Stop()
		}
	case st.timer == nil:
		st.timer = time.AfterFunc(wait, func() { st.speak(false) })
	default:
		st.timer.Reset(wait)
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
