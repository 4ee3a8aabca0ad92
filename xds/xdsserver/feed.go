// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// feed implements Feed.
type feed struct {
	pipeline *Pipeline
	key      federation.WorkloadKey
	peer     Peer
	changed  chan struct{}
	class    atomic.Pointer[class] // changes under the pipeline's lock
	load     *federation.Workload  // under the pipeline's lock

	acked atomic.Uint64 // the sequence of the newest frame of which all was acknowledged
	runs  atomic.Bool   // there has been one
	tardy atomic.Bool   // was waited for in vain, and has not been heard of since

	mu      sync.Mutex
	subject xds.Proxy // who is told
	watcher func()    // instead of changed

	// Of gateways, before is what was told before the last computation, and synced tells
	// that all of it had been acknowledged.
	before xds.Resources
	synced bool
}

// know takes over the record of the workload.
func (f *feed) know(w *federation.Workload) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load, f.subject = w, xds.ProxyOf(w, f.peer.TrustDomain)
}

func (f *feed) isGateway() bool { return f.load.Role == federation.GatewayRole }

// remember keeps what is told, before it is computed anew.
func (f *feed) remember() {
	told := f.class.Load().state.Load()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before, f.synced = told.resources, f.acked.Load() == told.sequence
}

// wake makes the reader look at the frame again.
func (f *feed) wake() {
	f.mu.Lock()
	watcher := f.watcher
	f.mu.Unlock()
	if watcher != nil {
		watcher()
	} else {
		poke(f.changed)
	}
}

// wakeAll wakes many, on all processors.
func wakeAll(feeds []*feed) {
	const apiece = 64
	workers := min(runtime.GOMAXPROCS(0), len(feeds)/apiece)
	if workers <= 1 {
		for _, f := range feeds {
			f.wake()
		}
		return
	}
	var next atomic.Int64
	var done sync.WaitGroup
	for range workers {
		done.Go(func() {
			for {
				end := int(next.Add(apiece))
				if end-apiece >= len(feeds) {
					return
				}
				for _, f := range feeds[end-apiece : min(end, len(feeds))] {
					f.wake()
				}
			}
		})
	}
	done.Wait()
}

// current tells whether all that there is to be told has been acknowledged.
func (f *feed) current() bool { return f.acked.Load() == f.class.Load().state.Load().sequence }

// hadAll tells whether an assignment was acknowledged before the last computation, and is
// still the same.
func (f *feed) hadAll(name, version string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.before.Get(xds.EndpointType, name)
	return ok && f.synced && r.Version == version
}

// Heard implements Feed.
func (f *feed) Heard(frame Frame, holds Holdings) {
	if holds.Settled() {
		f.acked.Store(frame.sequence)
		f.runs.Store(true)
		f.tardy.Store(false)
	}
	f.pipeline.doors.heard(f, holds)
}

// sameResources compares by identity of the lists.
func sameResources(a, b xds.Resources) bool {
	if len(a) != len(b) {
		return false
	}
	for typeURL, list := range b {
		if !sameList(a[typeURL], list) {
			return false
		}
	}
	return true
}

// Current implements Feed.
func (f *feed) Current() Frame { return f.told() }

func (f *feed) told() Frame {
	f.mu.Lock()
	proxy := f.subject
	f.mu.Unlock()
	revision := f.pipeline.revision.Load() // before the resources: they may be newer, never older
	c := f.class.Load()
	now := c.state.Load()
	return Frame{
		Proxy: proxy, Class: c.name, Revision: federation.Revision(revision), Resources: now.resources, sequence: now.sequence,
	}
}

// Watch implements Watcher.
func (f *feed) Watch(changed func()) {
	f.mu.Lock()
	f.watcher = changed
	f.mu.Unlock()
	select {
	case <-f.changed: // before it watched
		changed()
	default:
	}
}

// Changed implements Feed.
func (f *feed) Changed() <-chan struct{} { return f.changed }

// Close implements Feed.
func (f *feed) Close() {
	p := f.pipeline
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(f.class.Load().feeds, f)
	if delete(p.feeds[f.key], f); len(p.feeds[f.key]) == 0 {
		delete(p.feeds, f.key)
	}
	p.doors.leave(f)
}
