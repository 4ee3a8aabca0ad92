// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// hearing says how long an API server is believed that says nothing.
type hearing struct {
	// answer is how long a list or a watch may go without an answer, and a first state
	// without another piece of it. It doubles, up to answerAtMost, each time that is in vain:
	// a large cluster on a slow machine needs longer.
	answer time.Duration

	// silence is how long a watch may bring neither events nor bookmarks.
	silence time.Duration

	log  *slog.Logger
	wake func() // a kind is heard again, or was given up
}

// answerAtMost is how long kube-apiserver itself lets a request take.
const answerAtMost = time.Minute

// deafFor is how long nothing may be heard of a kind before it counts: a watch that ends
// and goes on is nothing.
const deafFor = time.Second

// errSilent: the API server took a request, and then said nothing.
var errSilent = errors.New("the API server does not answer")

// ear lists and watches one kind, and gives up what is not answered: a connection that
// only seems to live, or a server that is stuck with one kind, would otherwise be waited
// for until the reflector's own time is up, which is ten minutes.
type ear struct {
	hearing
	lister
	kind     string
	patience atomic.Int64 // with the next request

	mu      sync.Mutex
	current *heardWatch // that tells of changes now, or will once the first state is there
	deaf    time.Time   // since when there is none; zero while there is
	gaveUp  bool        // meanwhile
}

func newEar(h hearing, l lister, kind string) *ear {
	e := &ear{hearing: h, lister: l, kind: kind, deaf: time.Now()}
	e.patience.Store(int64(h.answer))
	return e
}

// state tells since when nothing is heard of the kind, zero while its watch is on, and
// whether the API server was asked in vain meanwhile.
func (e *ear) state() (deaf time.Time, gaveUp bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.deaf, e.gaveUp
}

// ask notes that another request takes the place of what was there.
func (e *ear) ask() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.current = nil
	if e.deaf.IsZero() {
		e.deaf = time.Now()
	}
}

// attend notes the watch that tells of changes from now on.
func (e *ear) attend(w *heardWatch) {
	e.mu.Lock()
	e.current = w
	e.mu.Unlock()
	if !w.first {
		e.complete() // the state was listed before
	}
}

// complete notes that the table is as the API server says, if a watch keeps it so.
func (e *ear) complete() {
	e.mu.Lock()
	was := e.deaf
	if e.current != nil {
		e.deaf, e.gaveUp = time.Time{}, false
	}
	changed := e.deaf != was
	e.mu.Unlock()
	if changed && time.Since(was) >= deafFor {
		e.wake() // somebody may have been told
	}
}

// lost notes that a watch has ended, and when it last told something.
func (e *ear) lost(w *heardWatch, at time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.current == w {
		e.current, e.deaf = nil, at
	}
}

// giveUp is the error for what was not answered.
func (e *ear) giveUp(what string, after time.Duration) error {
	e.mu.Lock()
	e.gaveUp = true
	e.mu.Unlock()
	e.wake()
	patience := time.Duration(e.patience.Load())
	e.patience.Store(int64(max(patience, min(2*patience, answerAtMost))))
	e.log.Warn("the API server says nothing of a kind; asking it again", "kind", e.kind, "request", what, "waited", after.Round(time.Millisecond))
	return fmt.Errorf("%w: %s of %s, for %v", errSilent, what, e.kind, after.Round(time.Millisecond))
}

func (e *ear) listIt(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	e.ask()
	patience := time.Duration(e.patience.Load())
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errSilent)
	defer cancel()
	list, err := e.list(ctx, options)
	if err != nil && errors.Is(context.Cause(ctx), errSilent) {
		err = e.giveUp("list", patience)
	}
	return list, err
}

func (e *ear) watchIt(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	e.ask()
	patience := time.Duration(e.patience.Load())
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(patience, func() { cancel(errSilent) })
	source, err := e.watch(ctx, options)
	if !timer.Stop() && errors.Is(context.Cause(ctx), errSilent) {
		if err == nil {
			source.Stop()
		}
		return nil, e.giveUp("watch", patience)
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	w := &heardWatch{
		ear: e, source: source, cancel: cancel, events: make(chan watch.Event), stopped: make(chan struct{}),
		first: options.SendInitialEvents != nil && *options.SendInitialEvents,
	}
	e.attend(w)
	go w.run()
	return w, nil
}

// heardWatch passes events on, and ends when none come.
type heardWatch struct {
	*ear
	source  watch.Interface
	cancel  context.CancelCauseFunc
	events  chan watch.Event
	stop    sync.Once
	stopped chan struct{}
	first   bool // the first state is on its way
}

// ResultChan implements watch.Interface.
func (w *heardWatch) ResultChan() <-chan watch.Event { return w.events }

// Stop implements watch.Interface.
func (w *heardWatch) Stop() { w.stop.Do(func() { close(w.stopped) }) }

func (w *heardWatch) run() {
	last := time.Now()
	timer := time.NewTimer(w.limit())
	defer func() {
		timer.Stop()
		w.source.Stop()
		w.cancel(nil)
		close(w.events)
	}()
	for {
		select {
		case <-w.stopped:
			w.lost(w, time.Now())
			return
		case event, ok := <-w.source.ResultChan():
			if !ok {
				w.lost(w, time.Now())
				return
			}
			last = time.Now()
			if w.first && endsFirstState(event) {
				w.first = false
				timer.Reset(w.limit())
			}
			w.pass(event)
		case <-timer.C:
			if left := w.limit() - time.Since(last); left > 0 {
				timer.Reset(left)
				continue
			}
			w.lost(w, last)
			w.endSilent(time.Since(last))
			return
		}
	}
}

func (w *heardWatch) pass(event watch.Event) {
	select {
	case w.events <- event:
	case <-w.stopped:
	}
}

// limit is how long nothing may come.
func (w *heardWatch) limit() time.Duration {
	if w.first {
		return time.Duration(w.patience.Load())
	}
	return w.silence
}

// endSilent ends a watch that brings nothing. Without a first state the reflector is told
// to list instead; with one it watches on from where it is.
func (w *heardWatch) endSilent(after time.Duration) {
	if !w.first {
		w.log.Warn("the API server says nothing of a kind any more; watching it anew", "kind", w.kind, "waited", after.Round(time.Millisecond))
		return
	}
	err := w.giveUp("first state", after)
	w.pass(watch.Event{Type: watch.Error, Object: &metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusGatewayTimeout, Reason: metav1.StatusReasonTimeout, Message: err.Error(),
	}})
}

// endsFirstState tells whether an event is the bookmark that ends the first state.
func endsFirstState(event watch.Event) bool {
	if event.Type != watch.Bookmark {
		return false
	}
	m, err := meta.Accessor(event.Object)
	return err == nil && m.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true"
}
