// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/isthmus-mesh/isthmus/federation"
)

// IngestConfig says what an Ingest works with.
type IngestConfig struct {
	Store    Store
	SourceID federation.SourceID

	// Holdoff is how long changes are gathered after one was stored; the first one after
	// a quiet spell goes at once. Zero means 10 ms.
	Holdoff time.Duration

	// Retry is the longest pause between attempts to get a session or to store; zero
	// means 1 s.
	Retry time.Duration

	// Exposure is how long a store may take to store a level, until the level is shown
	// without it; zero means 1 s. One that is away is not waited for.
	Exposure time.Duration

	// Absence is how long a store is away until this replica looks for itself at a source
	// that another one syncs; zero means 2 s.
	Absence time.Duration

	// Linger is how long it goes on doing so when another replica syncs the source again:
	// longer than a session outlives its process, so that the other one surely lives. Zero
	// means 10 s.
	Linger time.Duration

	// Log; nil means none.
	Log *slog.Logger

	// Now is the time; nil means time.Now.
	Now func() time.Time
}

func (c *IngestConfig) setDefaults() {
	for _, f := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.Holdoff, 10 * time.Millisecond}, {&c.Retry, time.Second}, {&c.Exposure, time.Second},
		{&c.Absence, 2 * time.Second}, {&c.Linger, 10 * time.Second},
	} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

// Ingest brings what one source reports into the store, while it has the session for it.
// What the store does not take in time is shown from memory (see exposer).
type Ingest struct {
	config  IngestConfig
	log     *slog.Logger
	metrics *ingestMetrics
	wake    chan struct{} // there is something to do; holds one
	exposer *exposer

	// mu guards what the source said last and what became of it.
	mu       sync.Mutex
	level    *Level
	number   uint64 // of the level under its grant; 0 for none
	offered  bool   // level is newer than what was stored
	status   Status
	observed bool
	grant    federation.Grant
	state    SourceState

	// Only Run's goroutine uses these.
	running *runningSource
	began   federation.Revision // of the last session that stored something here
	seen    federation.Revision // what was settled when the source was started
	settled time.Time           // since when another replica is known to sync the source
}

// SourceState is what is known about a source where it is synced.
type SourceState struct {
	Source federation.SourceID

	// Holding tells that this replica syncs the source. Watching tells that it looks at the
	// source: because it syncs it, or because the store is away. If it does not, the rest
	// is what was known when it last did.
	Holding, Watching bool

	// Exposed tells that what the source says is shown from memory, since when.
	Exposed time.Time

	Status   Status
	Findings []federation.Finding

	// Offered is when the source last reported, Stored when the store last agreed with it;
	// zero if never. Err is why it could not be stored, since then.
	Offered, Stored time.Time
	Err             error
}

// NewIngest makes an Ingest, which does nothing until Run.
func NewIngest(config IngestConfig) *Ingest {
	return newIngest(config, newIngestMetrics())
}

func newIngest(config IngestConfig, metrics *ingestMetrics) *Ingest {
	config.setDefaults()
	i := &Ingest{
		config: config, metrics: metrics,
		log:  config.Log.With("source", config.SourceID),
		wake: make(chan struct{}, 1),
	}
	i.exposer = newExposer(&i.config, i.log)
	i.state.Source = config.SourceID
	snapshot, _ := config.Store.Snapshot()
	i.grant, _ = snapshot.GrantOf(config.SourceID)
	return i
}

// State tells how the source is.
func (i *Ingest) State() SourceState {
	exposed := i.exposer.since()
	i.mu.Lock()
	defer i.mu.Unlock()
	state := i.state
	state.Exposed = exposed
	return state
}

// Offer implements Sink.
func (i *Ingest) Offer(level Level) {
	i.mu.Lock()
	i.level, i.offered = &level, true
	i.number++
	i.state.Offered = i.config.Now()
	i.exposer.offer(i.number, i.level, i.grant)
	i.mu.Unlock()
	i.metrics.offers.Inc()
	i.wakeUp()
}

// Observe implements Sink.
func (i *Ingest) Observe(status Status) {
	i.mu.Lock()
	i.status, i.observed = status, true
	i.state.Status = status
	i.mu.Unlock()
	i.wakeUp()
}

// SetGrant changes what the source may contribute.
func (i *Ingest) SetGrant(grant federation.Grant) {
	i.mu.Lock()
	same := i.grant.Equal(grant)
	i.grant = grant
	if !same && i.level != nil {
		i.offered = true
		i.number++
		i.exposer.offer(i.number, i.level, grant)
	}
	i.mu.Unlock()
	if !same {
		i.wakeUp()
	}
}

func (i *Ingest) wakeUp() {
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// Run runs the source whenever this replica has its session, until ctx ends or the store
// knows no such source any more. While another replica has it, it waits for its turn; if
// the store is away for long, the source is run all the same, and what it says is shown
// from memory.
func (i *Ingest) Run(ctx context.Context, source Source) error {
	exposing, stop := context.WithCancel(ctx)
	exposed := make(chan struct{})
	go func() { defer close(exposed); i.exposer.run(exposing) }()
	defer func() { i.stop(); stop(); <-exposed }()
	defer i.setHolding(false)
	retry, failing := i.newBackOff(), false
	for {
		session, err := i.begin(ctx, source)
		if !errors.Is(err, ErrHeld) {
			i.settled = time.Time{}
		}
		switch {
		case ctx.Err() != nil:
			if err == nil {
				i.closeSession(ctx, session)
			}
			return nil
		case errors.Is(err, ErrNotFound):
			return nil
		case errors.Is(err, ErrHeld):
			i.yield()
		case err != nil:
			level := slog.LevelWarn
			if failing {
				level = slog.LevelDebug // an outage is one line
			}
			failing = true
			i.log.Log(ctx, level, "cannot get the session of the source", "error", err)
		default:
			retry.Reset()
			failing = false
			i.take(ctx, source, session)
			continue
		}
		if !i.sleep(ctx, retry.NextBackOff()) {
			return nil
		}
	}
}

// begin asks for the session of the source, and meanwhile sees to it that the source is
// looked at if the store turns out to be away.
func (i *Ingest) begin(ctx context.Context, source Source) (session Session, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		session, err = i.config.Store.Begin(ctx, i.config.SourceID)
	}()
	look := time.NewTicker(i.config.Retry / 4)
	defer look.Stop()
	for {
		if i.running == nil && i.storeIsAway() {
			i.log.Warn("the store is away: looking at the source without it")
			i.start(ctx, source)
		}
		select {
		case <-done:
			return session, err
		case <-look.C:
		}
	}
}

// storeIsAway tells that the store has been away for so long that who syncs the source
// cannot tell what it says.
func (i *Ingest) storeIsAway() bool {
	h := i.config.Store.Health()
	return h.Degraded && i.config.Now().Sub(h.Since) >= i.config.Absence
}

// yield leaves the source to the replica that syncs it. If this one has looked at it while
// the store was away, it goes on until the other one has surely stored what the source says
// by now: what has vanished meanwhile must not come back for the moment in between.
func (i *Ingest) yield() {
	if i.running == nil {
		return
	}
	if !i.config.Store.SyncedElsewhere(i.config.SourceID) {
		i.settled = time.Time{}
		return
	}
	now := i.config.Now()
	if i.settled.IsZero() {
		i.settled = now
	}
	if i.exposer.since().IsZero() || now.Sub(i.settled) >= i.config.Linger {
		i.stop()
	}
}

// take syncs the source for as long as the session lasts.
func (i *Ingest) take(ctx context.Context, source Source, session Session) {
	i.log.Info("syncing the source")
	if last := i.config.Store.Settled(i.config.SourceID); i.running != nil && last != i.seen && last != i.began {
		// Another replica has stored what it saw since our caches were made, and they may be
		// older: those of a process that was paused, or cut off, are. What is shown from
		// memory may as well be newer than what is stored, and stays until the source was read.
		i.log.Info("another replica has synced the source meanwhile, reading it anew")
		i.halt()
		i.exposer.reread()
	}
	i.setHolding(true)
	if i.running == nil {
		i.start(ctx, source)
	}
	i.hold(ctx, session)
	i.setHolding(false)
	i.closeSession(ctx, session)
}

func (i *Ingest) newBackOff() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = min(50*time.Millisecond, i.config.Retry), i.config.Retry
	return b
}

func (i *Ingest) sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (i *Ingest) closeSession(ctx context.Context, session Session) {
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := session.Close(end); err != nil {
		i.log.Debug("the session ends with its lease", "error", err)
	}
}

func (i *Ingest) setHolding(holding bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.state.Holding = holding
}

// runningSource is a source in a goroutine of its own.
type runningSource struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// stop ends the source and forgets what it said.
func (i *Ingest) stop() {
	if i.running != nil {
		i.halt()
		i.exposer.forget()
	}
}

// halt ends the source, and leaves what is shown of it.
func (i *Ingest) halt() {
	i.running.cancel()
	<-i.running.done
	i.running, i.settled = nil, time.Time{}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.level, i.offered, i.observed = nil, false, false
	i.state.Watching = false
}

// start runs the source, again and again if it fails.
func (i *Ingest) start(ctx context.Context, source Source) {
	ctx, cancel := context.WithCancel(ctx)
	r := &runningSource{cancel, make(chan struct{})}
	i.running, i.seen = r, i.config.Store.Settled(i.config.SourceID)
	i.mu.Lock()
	i.state.Watching = true
	i.mu.Unlock()
	go func() {
		defer close(r.done)
		retry := i.newBackOff()
		retry.MaxInterval = 30 * time.Second
		for {
			began := i.config.Now()
			err := source.Run(ctx, i)
			if ctx.Err() != nil {
				return
			}
			i.log.Warn("the source has stopped, starting it again", "error", err)
			if i.config.Now().Sub(began) > time.Minute {
				retry.Reset()
			}
			if !i.sleep(ctx, retry.NextBackOff()) {
				return
			}
		}
	}()
}

// hold stores what the source says for as long as the session lasts.
func (i *Ingest) hold(ctx context.Context, session Session) {
	// A new session knows only what is stored: compare everything once.
	i.mu.Lock()
	i.offered, i.observed = i.level != nil, len(i.status.Conditions) > 0
	i.mu.Unlock()
	i.wakeUp()
	retry := i.newBackOff()
	for {
		select {
		case <-ctx.Done():
			return
		case <-session.Lost():
			i.log.Warn("lost the session of the source")
			return
		case <-i.wake:
		}
		pause := i.config.Holdoff
		if err := i.store(ctx, session); err != nil {
			if ctx.Err() != nil {
				return
			}
			if errors.Is(err, ErrFenced) {
				i.log.Warn("lost the session of the source", "error", err)
				return
			}
			i.metrics.failures.Inc()
			i.log.Warn("cannot store what the source reports", "error", err)
			pause = retry.NextBackOff()
			i.wakeUp()
		} else {
			retry.Reset()
		}
		if !i.sleep(ctx, pause) {
			return
		}
	}
}

// store applies what is new since the last time.
func (i *Ingest) store(ctx context.Context, session Session) error {
	i.mu.Lock()
	level, number, offered, status, observed, grant := i.level, i.number, i.offered, i.status, i.observed, i.grant
	i.offered, i.observed = false, false
	i.mu.Unlock()
	var written Written
	var err error
	if offered {
		admitted, findings := i.exposer.admit(number, level, grant)
		i.mu.Lock()
		i.state.Findings = findings
		i.mu.Unlock()
		began := i.config.Now()
		written, err = session.Apply(ctx, admitted)
		i.metrics.seconds.Observe(i.config.Now().Sub(began).Seconds())
		i.applied(err)
		if err == nil {
			i.exposer.stored(number, written.Revision)
			if level.Records != nil {
				i.began = session.Began()
			}
		}
	}
	if observed {
		more, conditionsErr := session.SetConditions(ctx, status.Conditions)
		written.Add(more)
		err = errors.Join(err, conditionsErr)
	}
	i.metrics.count(written)
	if err != nil {
		i.mu.Lock()
		i.offered, i.observed = i.offered || offered && i.level != nil, i.observed || observed
		i.mu.Unlock()
	}
	return err
}

func (i *Ingest) applied(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.state.Err = err
	if err == nil {
		i.state.Stored = i.config.Now()
	}
}
