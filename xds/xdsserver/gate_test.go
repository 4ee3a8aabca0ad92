// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// processor is one that computes what it is given, one after the other.
type processor struct {
	turn chan struct{}
	used atomic.Int64
}

func newProcessor() *processor { return &processor{turn: make(chan struct{}, 1)} }

func (p *processor) compute(d time.Duration) {
	p.turn <- struct{}{}
	time.Sleep(d)
	p.used.Add(int64(d))
	<-p.turn
}

func (p *processor) gate(l Limits) *Gate {
	l = l.withDefaults()
	return newGate(l, budget{rate: l.Share, now: time.Now, used: func() time.Duration { return time.Duration(p.used.Load()) }})
}

func TestAStormIsLetInAsTheProcessorAllows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams, cost = 500, 8 * time.Millisecond
		p := newProcessor()
		g := p.gate(Limits{})
		var most, inside atomic.Int64
		var wait sync.WaitGroup
		start := time.Now()
		for range streams {
			wait.Go(func() {
				leave, err := g.enter(t.Context(), rankNew)
				if err != nil {
					t.Error(err)
					return
				}
				defer leave()
				if n := inside.Add(1); n > most.Load() {
					most.Store(n)
				}
				p.compute(cost)
				inside.Add(-1)
			})
		}
		wait.Wait()
		took := time.Since(start)
		if all := streams * cost; took < all || took > all*3/2 {
			t.Errorf("%v for streams that cost %v", took, all)
		}
		if most.Load() > streams/3 {
			t.Errorf("%d of %d streams were let in at once", most.Load(), streams)
		}
	})
}

func TestWhoIsLetInFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProcessor()
		g := p.gate(Limits{})
		g.mu.Lock()
		g.budget.measure()
		g.budget.left = -time.Millisecond // busy with others
		g.budget.arriving = 1
		g.mu.Unlock()
		var mu sync.Mutex
		var order []rank
		var wait sync.WaitGroup
		for _, r := range []rank{rankNew, rankReturning, rankNew, rankGateway, rankReturning, rankGateway} {
			wait.Go(func() {
				leave, err := g.enter(t.Context(), r)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, r)
				mu.Unlock()
				p.compute(100 * time.Millisecond)
				leave()
			})
			synctest.Wait()
		}
		p.used.Add(int64(time.Second)) // one after the other from now on
		time.Sleep(20 * time.Millisecond)
		g.leave()
		wait.Wait()
		if !slices.IsSorted(order) || len(order) != 6 {
			t.Errorf("%v", order)
		}
	})
}

func TestWhoWaitsTooLongIsSentAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Limits{Wait: 5 * time.Second}.withDefaults(), budget{rate: 1, now: time.Now, used: func() time.Duration {
			return 2 * time.Duration(time.Now().UnixNano()) // something uses more than there is, for good
		}})
		g.budget.measure()
		g.budget.left = 0
		var in, refused atomic.Int64
		var wait sync.WaitGroup
		for range 10 {
			wait.Go(func() {
				switch _, err := g.enter(t.Context(), rankNew); status.Code(err) {
				case codes.OK:
					in.Add(1) // and never has all it wants
				case codes.ResourceExhausted:
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wait.Wait()
		if in.Load() != 3 || refused.Load() != 7 { // one at once, one every two seconds
			t.Errorf("%d were let in, %d refused", in.Load(), refused.Load())
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := g.enter(ctx, rankGateway); err != nil && status.Code(err) != codes.Canceled {
			t.Error(err)
		}
		time.Sleep(time.Minute)
	})
}

func TestRanks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		role  federation.ProxyRole
		first request
		want  rank
	}{
		{federation.GatewayRole, request{}, rankGateway},
		{federation.Sidecar, request{initial: map[string]string{"a": "1"}}, rankReturning},
		{federation.Sidecar, request{version: "1"}, rankReturning},
		{federation.VMRole, request{}, rankNew},
		{"", request{}, rankNew},
	} {
		if got := rankOf(c.role, c.first); got != c.want {
			t.Errorf("%s, %+v: %s, want %s", c.role, c.first, rankNames[got], rankNames[c.want])
		}
	}
}

func TestAStreamHasBounds(t *testing.T) {
	t.Parallel()
	many := func(n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprint(i))
		}
		return out
	}
	l := Limits{Names: 10, Types: 3}
	for what, c := range map[string]struct {
		sotw     bool
		requests []request
		ok       bool
	}{
		"few names":             {false, []request{{typeURL: "a", subscribe: many(5)}, {typeURL: "a", subscribe: []string{"x"}}}, true},
		"many names at once":    {false, []request{{typeURL: "a", subscribe: many(11)}}, false},
		"many, by and by":       {false, []request{{typeURL: "a", subscribe: many(8)}, {typeURL: "a", subscribe: []string{"x", "y", "z"}}}, false},
		"many that it had":      {false, []request{{typeURL: "a", initial: map[string]string{"1": "", "2": "", "3": ""}, subscribe: many(8)}}, false},
		"the same names again":  {true, []request{{typeURL: "a", names: many(10)}, {typeURL: "a", names: many(10)}}, true},
		"many names of a whole": {true, []request{{typeURL: "a", names: many(11)}}, false},
		"many types":            {false, []request{{typeURL: "a"}, {typeURL: "b"}, {typeURL: "c"}, {typeURL: "d"}}, false},
		"few types, often":      {false, []request{{typeURL: "a"}, {typeURL: "b"}, {typeURL: "c"}, {typeURL: "a"}}, true},
	} {
		m, err := newMachine(c.sotw), error(nil)
		for _, r := range c.requests {
			if err == nil {
				err = l.bound(m, r)
			}
			m.request(r, time.Time{})
		}
		if (err == nil) != c.ok || !c.ok && status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// quietWire is a proxy that asks once and says no more.
type quietWire struct {
	ctx   context.Context
	asked atomic.Bool
}

func (w *quietWire) sotw() bool           { return false }
func (w *quietWire) send(*response) error { return nil }
func (w *quietWire) receive() (request, node, error) {
	if w.asked.CompareAndSwap(false, true) {
		return request{typeURL: xds.ClusterType, subscribe: []string{"*"}}, node{id: "n"}, nil
	}
	<-w.ctx.Done()
	return request{}, node{}, io.EOF
}

// still is a source that has nothing and never changes.
type still struct{}

func (still) Attach(context.Context, Peer) (Feed, error) { return still{}, nil }
func (still) Current() Frame                             { return Frame{Resources: xds.Resources{}} }
func (still) Changed() <-chan struct{}                   { return nil }
func (still) Heard(Frame, Holdings)                      {}
func (still) Close()                                     {}

func TestDrainingMovesStreamsEvenly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{Source: still{}, Authenticate: func(context.Context) (Peer, error) { return Peer{}, nil }})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		start, ends := time.Now(), make(chan time.Duration, 100)
		for range cap(ends) {
			go func() {
				if err := s.serve(ctx, &quietWire{ctx: ctx}, ""); status.Code(err) != codes.Unavailable {
					t.Error(err)
				}
				ends <- time.Since(start)
			}()
		}
		synctest.Wait()
		if s.Streams() != cap(ends) {
			t.Fatal(s.Streams())
		}
		if err := s.Drain(ctx, 10*time.Second); err != nil {
			t.Error(err)
		}
		var seconds [10]int
		for range cap(ends) {
			seconds[int((<-ends)/time.Second)]++
		}
		if seconds != [10]int{10, 10, 10, 10, 10, 10, 10, 10, 10, 10} {
			t.Errorf("streams that ended in each second: %v", seconds)
		}
		if err := s.Drain(ctx, 10*time.Second); err != nil { // nobody is left
			t.Error(err)
		}
	})
}
