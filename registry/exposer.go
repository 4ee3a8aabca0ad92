// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// exposer shows what a source says while the store does not take it: a pod that goes away
// while etcd is away must still leave the endpoints of the proxies of this replica. It
// stops as soon as this replica reads from the store what it has shown, so that nothing
// that was taken away comes back in between.
type exposer struct {
	config *IngestConfig
	log    *slog.Logger
	poke   chan struct{} // there may be something to show; holds one

	// mu guards what follows. It may be taken while an Ingest's is held, not the other
	// way around.
	mu      sync.Mutex
	number  uint64 // of the last level that was offered
	level   *Level
	grant   federation.Grant
	waiting time.Time // since when a level is not stored; zero while the last one is
	done    uint64    // the last level that is stored
	shown   uint64    // the level that is shown; 0 for none
	from    time.Time // since when some level is shown
	until   time.Time // how long the level is shown at most; zero for as long as it is not stored

	// admitted is the last level as it was admitted.
	admitting sync.Mutex
	admitted  struct {
		number   uint64
		level    *Level
		findings []federation.Finding
	}
	admission admission
}

func newExposer(config *IngestConfig, log *slog.Logger) *exposer {
	return &exposer{config: config, log: log, poke: make(chan struct{}, 1), admission: admission{source: config.SourceID}}
}

// offer takes in the newest level.
func (e *exposer) offer(number uint64, level *Level, grant federation.Grant) {
	e.mu.Lock()
	e.number, e.level, e.grant, e.until = number, level, grant, time.Time{}
	if e.waiting.IsZero() {
		e.waiting = e.config.Now()
	}
	e.mu.Unlock()
	e.wakeUp()
}

// stored notes that the store has a level, as of some revision.
func (e *exposer) stored(number uint64, revision federation.Revision) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if number <= e.done {
		return
	}
	e.done = number
	if number < e.number {
		return // a newer one waits
	}
	e.waiting = time.Time{}
	if e.shown > 0 {
		e.log.Info("what the source says is stored again", "after", e.config.Now().Sub(e.from).Round(time.Millisecond))
		e.conceal(revision)
	}
}

// conceal shows what is stored again, as of that revision; mu is held, and a level is shown.
func (e *exposer) conceal(revision federation.Revision) {
	e.config.Store.Conceal(e.config.SourceID, revision)
	e.shown, e.from, e.until = 0, time.Time{}, time.Time{}
}

// reread notes that the source starts over: what is shown stays until it has said
// something, but not for long.
func (e *exposer) reread() {
	e.mu.Lock()
	e.level, e.waiting = nil, time.Time{}
	if e.shown > 0 {
		e.until = e.config.Now().Add(e.config.Linger)
	}
	e.mu.Unlock()
	e.wakeUp()
}

func (e *exposer) wakeUp() {
	select {
	case e.poke <- struct{}{}:
	default:
	}
}

// forget shows again what is stored, whatever the source said.
func (e *exposer) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.level, e.waiting = nil, time.Time{}
	if e.shown > 0 {
		e.conceal(0)
	}
}

// since tells since when the source is shown from memory; zero if it is not.
func (e *exposer) since() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.from
}

// run shows levels when it is time to, until ctx ends.
func (e *exposer) run(ctx context.Context) {
	defer e.forget()
	for {
		wait := e.expose()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-e.poke:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// expose shows the last level if the store does not have it by now, and tells when to look
// again.
func (e *exposer) expose() time.Duration {
	e.mu.Lock()
	number, level, grant, shown := e.number, e.level, e.grant, e.shown
	wait := e.config.Exposure - e.config.Now().Sub(e.waiting)
	pending := level != nil && !e.waiting.IsZero() && number != shown
	lingers := !e.until.IsZero()
	left := e.until.Sub(e.config.Now())
	if lingers && left <= 0 {
		e.conceal(0)
		lingers = false
	}
	e.mu.Unlock()
	switch {
	case lingers:
		return left
	case !pending:
		return time.Hour
	case shown == 0 && wait > 0 && !e.config.Store.Health().Degraded:
		return wait
	}
	admitted, _ := e.admit(number, level, grant)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.level == nil || e.number != number || e.done >= number {
		return 0 // there is a newer one, or it is stored by now
	}
	if e.shown == 0 {
		e.from = e.config.Now()
		e.log.Warn("the store does not take what the source says; it is shown from memory")
	}
	e.config.Store.Expose(e.config.SourceID, admitted)
	e.shown = number
	return time.Hour
}

// admit is a level without what its source was not granted, and its findings.
func (e *exposer) admit(number uint64, level *Level, grant federation.Grant) (*Level, []federation.Finding) {
	e.admitting.Lock()
	defer e.admitting.Unlock()
	if e.admitted.number != number {
		e.admitted.number = number
		e.admitted.level, e.admitted.findings = e.admission.admit(level, grant)
	}
	return e.admitted.level, e.admitted.findings
}
