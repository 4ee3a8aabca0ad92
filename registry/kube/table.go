// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/isthmus-mesh/isthmus/registry"
)

// table is one kind of objects of a member, reduced to what the mesh needs and kept
// current by a reflector. It tells which rows changed, and nothing of how.
type table[T any] struct {
	// reduce makes a row from an object; false leaves it out.
	reduce func(object any) (T, bool)
	same   func(a, b T) bool

	// changed is called, without the lock, with the row before and after; either may be
	// missing.
	changed func(key registry.ObjectName, before, after *T)

	names *registry.Interner

	mu   sync.Mutex
	rows map[registry.ObjectName]T
	ear  *ear // nil until it is followed
	tableState
}

// tableState tells whether a table can be relied on.
type tableState struct {
	synced bool      // it was complete at least once
	denied error     // the API server refuses to show the kind, and has since the start
	err    error     // the last attempt to list or watch failed
	failed time.Time // since when attempts fail
	deaf   time.Time // since when nothing is heard of the kind; zero while its watch is on
	gaveUp bool      // the API server was asked in vain meanwhile
}

// patience with refusals: an API server that has just started refuses for a moment what
// it grants.
const refusalPatience = 10 * time.Second

// refusedLong tells that a kind that was shown before is not shown any more.
func (s tableState) refusedLong(now time.Time) bool {
	return s.err != nil && apierrors.IsForbidden(s.err) && now.Sub(s.failed) >= refusalPatience
}

// settled tells that waiting longer would not tell more.
func (s tableState) settled() bool { return s.synced || s.denied != nil }

func newTable[T any](names *registry.Interner, reduce func(object any) (T, bool), same func(a, b T) bool, changed func(key registry.ObjectName, before, after *T)) *table[T] {
	return &table[T]{reduce: reduce, same: same, changed: changed, names: names, rows: map[registry.ObjectName]T{}}
}

func (t *table[T]) state() tableState {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.tableState
	if t.ear != nil {
		s.deaf, s.gaveUp = t.ear.state()
	}
	return s
}

func (t *table[T]) get(key registry.ObjectName) (T, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	row, ok := t.rows[key]
	return row, ok
}

// each calls f for every row, under the lock.
func (t *table[T]) each(f func(key registry.ObjectName, row T)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, row := range t.rows {
		f(k, row)
	}
}

// reduced wraps a row, so that the reflector's own stores hold rows too.
type reduced[T any] struct {
	metav1.ObjectMeta
	row  T
	keep bool
}

// Transformer implements cache.TransformingStore: the reflector reduces objects as they
// arrive, so that a long list is never in memory as it was sent.
func (t *table[T]) Transformer() cache.TransformFunc {
	return func(object any) (any, error) {
		if d, ok := object.(cache.DeletedFinalStateUnknown); ok {
			object = d.Obj
		}
		if r, ok := object.(*reduced[T]); ok {
			return r, nil
		}
		m, err := meta.Accessor(object)
		if err != nil {
			return nil, err
		}
		row, keep := t.reduce(object)
		return &reduced[T]{metav1.ObjectMeta{Namespace: t.names.String(m.GetNamespace()), Name: m.GetName(), ResourceVersion: m.GetResourceVersion()}, row, keep}, nil
	}
}

func (t *table[T]) take(object any) (registry.ObjectName, T, bool, error) {
	var zero T
	r, err := t.Transformer()(object)
	if err != nil {
		return registry.ObjectName{}, zero, false, err
	}
	row := r.(*reduced[T])
	return registry.ObjectName{Namespace: row.Namespace, Name: row.Name}, row.row, row.keep, nil
}

// inCluster is the key of what is in no namespace.
func inCluster(name string) registry.ObjectName { return registry.ObjectName{Name: name} }

// Add, Update, Delete, Replace and Resync implement cache.ReflectorStore.
func (t *table[T]) Add(object any) error { return t.Update(object) }

func (t *table[T]) Update(object any) error {
	key, row, keep, err := t.take(object)
	if err != nil {
		return err
	}
	if !keep {
		t.remove(key)
		return nil
	}
	t.set(key, row)
	return nil
}

func (t *table[T]) set(key registry.ObjectName, row T) {
	t.mu.Lock()
	before, there := t.rows[key]
	if there && t.same(before, row) {
		t.mu.Unlock()
		return
	}
	t.rows[key] = row
	t.mu.Unlock()
	if there {
		t.changed(key, &before, &row)
	} else {
		t.changed(key, nil, &row)
	}
}

func (t *table[T]) remove(key registry.ObjectName) {
	t.mu.Lock()
	before, there := t.rows[key]
	delete(t.rows, key)
	t.mu.Unlock()
	if there {
		t.changed(key, &before, nil)
	}
}

func (t *table[T]) Delete(object any) error {
	key, _, _, err := t.take(object)
	if err == nil {
		t.remove(key)
	}
	return err
}

func (t *table[T]) Replace(objects []any, _ string) error {
	seen := make(map[registry.ObjectName]bool, len(objects))
	for _, object := range objects {
		key, row, keep, err := t.take(object)
		if err != nil {
			return err
		}
		if keep {
			seen[key] = true
			t.set(key, row)
		}
	}
	var gone []registry.ObjectName
	t.mu.Lock()
	for key := range t.rows {
		if !seen[key] {
			gone = append(gone, key)
		}
	}
	t.mu.Unlock()
	for _, key := range gone {
		t.remove(key)
	}
	t.mu.Lock()
	first := !t.synced || t.err != nil
	t.synced, t.denied, t.err = true, nil, nil
	ear := t.ear
	t.mu.Unlock()
	if ear != nil {
		ear.complete()
	}
	if first {
		t.changed(registry.ObjectName{}, nil, nil)
	}
	return nil
}

func (t *table[T]) Resync() error { return nil }

// note remembers how an attempt to list or watch went.
func (t *table[T]) note(err error) {
	t.mu.Lock()
	before := t.tableState
	if t.err = err; before.err == nil && err != nil {
		t.failed = time.Now()
	}
	if err != nil && !t.synced && (apierrors.IsForbidden(err) || apierrors.IsNotFound(err) || apierrors.IsMethodNotSupported(err)) {
		t.denied = err
	}
	changed := before.settled() != t.settled() || (before.err == nil) != (err == nil)
	t.mu.Unlock()
	if changed {
		t.changed(registry.ObjectName{}, nil, nil)
	}
}

// lister lists and watches one kind through whatever API is current.
type lister struct {
	list  func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error)
	watch func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error)
}

// follow keeps the table current until ctx ends. guard is asked before every list and
// watch, and refuses when what answers is not the cluster it should be.
func (t *table[T]) follow(ctx context.Context, name string, expected any, l lister, guard func(context.Context) error, h hearing) {
	ear := newEar(h, l, name)
	t.mu.Lock()
	t.ear = ear
	t.mu.Unlock()
	attempt := func(ctx context.Context, do func() error) error {
		err := guard(ctx)
		if err == nil {
			err = do()
		}
		// An expired watch is the ordinary way to a new list, and what is invalid makes the
		// reflector fall back from a streamed list.
		if err == nil || !apierrors.IsResourceExpired(err) && !apierrors.IsInvalid(err) && ctx.Err() == nil {
			t.note(err)
		}
		return err
	}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (list runtime.Object, err error) {
			err = attempt(ctx, func() error { list, err = ear.listIt(ctx, options); return err })
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (w watch.Interface, err error) {
			err = attempt(ctx, func() error { w, err = ear.watchIt(ctx, options); return err })
			return w, err
		},
	}
	quiet := logr.Discard() // what goes wrong is told by conditions, once
	ctx = klog.NewContext(ctx, quiet)
	cache.NewReflectorWithOptions(lw, expected, t, cache.ReflectorOptions{
		Name: fmt.Sprintf("isthmus %s", name), Logger: &quiet,
		// Members come back when they come back: what lasts here is freshness lost.
		Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 1.6, Jitter: 0.3, Steps: 7, Cap: 3 * time.Second},
	}).RunWithContext(ctx)
}
