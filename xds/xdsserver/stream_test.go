// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/xds"
)

// slowWire is a proxy that takes a response only when the test lets it.
type slowWire struct {
	requests chan request
	sent     chan *response
	sending  sync.Mutex
}

func (*slowWire) sotw() bool { return false }

func (w *slowWire) receive() (request, node, error) {
	r, ok := <-w.requests
	if !ok {
		return request{}, node{}, io.EOF
	}
	return r, node{}, nil
}

func (w *slowWire) send(r *response) error {
	if !w.sending.TryLock() {
		return errors.New("two send at once")
	}
	defer w.sending.Unlock()
	w.sent <- r
	return nil
}

// watchedFeed is a feed that a test sets by hand.
type watchedFeed struct {
	mu    sync.Mutex
	frame Frame
	wake  func()
}

func (f *watchedFeed) Current() Frame {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frame
}

func (f *watchedFeed) Changed() <-chan struct{} { return nil }
func (f *watchedFeed) Watch(changed func())     { f.wake = changed }
func (f *watchedFeed) Heard(Frame, Holdings)    {}
func (f *watchedFeed) Close()                   {}

// put is another version of one cluster's endpoints. It returns at once, whatever the proxy
// does: the pipeline waits for it.
func (f *watchedFeed) put(version string) {
	f.mu.Lock()
	f.frame.Resources = xds.Resources{
		xds.ClusterType:  {{Name: "c", Version: "1", Body: make([]byte, 2*unanswered)}},
		xds.EndpointType: {{Name: "c", Version: version, Body: []byte(version)}},
	}
	f.mu.Unlock()
	if f.wake != nil {
		f.wake()
	}
}

func TestAProxyThatDoesNotReadKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, f := &slowWire{requests: make(chan request), sent: make(chan *response)}, &watchedFeed{}
		f.put("0")
		st := newStream(New(Config{}), w, f, node{id: "slow"}, "")
		done := make(chan error, 1)
		go func() { done <- st.run(t.Context(), request{typeURL: xds.EndpointType, subscribe: []string{"c"}}) }()
		ack := func(r *response) { w.requests <- request{typeURL: r.typeURL, nonce: r.nonce} }
		ack(<-w.sent)
		w.requests <- request{typeURL: xds.ClusterType} // its answer is large, and never acknowledged
		<-w.sent
		endpoints := <-w.sent // the cluster waits for them
		ack(endpoints)
		synctest.Wait()
		for i := range 5 {
			f.put(fmt.Sprint(i + 1)) // would not return if it waited for the proxy
		}
		synctest.Wait()
		late := <-w.sent // begun with the first change
		if got := late.resources[0].Version; got != "1" {
			t.Errorf("sent version %s", got)
		}
		synctest.Wait()
		ack(late)
		if newest := <-w.sent; newest.resources[0].Version != "5" {
			t.Errorf("then version %s, want the newest one and nothing between", newest.resources[0].Version)
		}
		f.put("6") // in flight: nothing can be sent
		st.kick(context.Canceled)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		f.put("7") // nobody is there
		close(w.requests)
		synctest.Wait()
		if st.timer != nil && st.timer.Stop() {
			t.Error("a stream that is over has a timer")
		}
	})
}

func TestWhatIsHeldBackGoesWhenItMay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, f := &slowWire{requests: make(chan request), sent: make(chan *response, 10)}, &watchedFeed{}
		f.put("1")
		st := newStream(New(Config{}), w, f, node{id: "stuck"}, "")
		go func() { _ = st.run(t.Context(), request{typeURL: xds.EndpointType, subscribe: []string{"c"}}) }()
		<-w.sent // never acknowledged
		w.requests <- request{typeURL: xds.NameTableType}
		synctest.Wait()
		start := time.Now()
		if r := <-w.sent; r.typeURL != xds.NameTableType || time.Since(start) != gateTime {
			t.Errorf("%s after %v", r.typeURL, time.Since(start))
		}
		close(w.requests)
	})
}
