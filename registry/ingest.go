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

	// Log; nil means none.
	Log *slog.Logger

	// Now is the time; nil means time.Now.
	Now func() time.Time
}

// Ingest brings what one source reports into the store, while it has the session for it.
type Ingest struct {
	config  IngestConfig
	log     *slog.Logger
	metrics *ingestMetrics
	wake    chan struct{} // there is something to do; holds one

	// mu guards what the source said last and what became of it.
	mu       sync.Mutex
	level    *Level
	offered  bool // level is newer than what was stored
	status   Status
	observed bool
	grant    federation.Grant
	state    SourceState

	// Only Run's goroutine uses these.
	trimmed map[*federation.Record]*federation.Record
}

// SourceState is what is known about a source where it is synced.
type SourceState struct {
	Source federation.SourceID

	// Holding tells that this replica syncs the source; if not, the rest is what was known
	// when it last did.
	Holding bool

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
	if config.Holdoff == 0 {
		config.Holdoff = 10 * time.Millisecond
	}
	if config.Retry == 0 {
		config.Retry = time.Second
	}
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	i := &Ingest{
		config: config, metrics: metrics,
		log:  config.Log.With("source", config.SourceID),
		wake: make(chan struct{}, 1),
	}
	i.state.Source = config.SourceID
	snapshot, _ := config.Store.Snapshot()
	i.grant, _ = snapshot.GrantOf(config.SourceID)
	return i
}

// State tells how the source is.
func (i *Ingest) State() SourceState {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.state
}

// Offer implements Sink.
func (i *Ingest) Offer(level Level) {
	i.mu.Lock()
	i.level, i.offered = &level, true
	i.state.Offered = i.config.Now()
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
	i.offered = i.offered || !same && i.level != nil
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
// knows no such source any more. While another replica has it, it waits for its turn.
func (i *Ingest) Run(ctx context.Context, source Source) error {
	var running *runningSource
	defer func() { running.stop() }()
	defer i.setHolding(false)
	retry := i.newBackOff()
	for {
		session, err := i.config.Store.Begin(ctx, i.config.SourceID)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				i.closeSession(ctx, session)
			}
			return nil
		case errors.Is(err, ErrNotFound):
			return nil
		case errors.Is(err, ErrHeld):
			// Another replica took over: what we have is no longer needed.
			running.stop()
			running = nil
			i.drop()
		case err != nil:
			i.log.Warn("cannot get the session of the source", "error", err)
		default:
			retry.Reset()
			i.log.Info("syncing the source")
			i.setHolding(true)
			if running == nil {
				running = i.start(ctx, source)
			}
			i.hold(ctx, session)
			i.setHolding(false)
			i.closeSession(ctx, session)
			continue
		}
		if !i.sleep(ctx, retry.NextBackOff()) {
			return nil
		}
	}
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

// drop forgets what the source said.
func (i *Ingest) drop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.level, i.offered, i.observed = nil, false, false
	i.trimmed = nil
}

// runningSource is a source in a goroutine of its own.
type runningSource struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func (r *runningSource) stop() {
	if r != nil {
		r.cancel()
		<-r.done
	}
}

// start runs the source, again and again if it fails.
func (i *Ingest) start(ctx context.Context, source Source) *runningSource {
	ctx, cancel := context.WithCancel(ctx)
	r := &runningSource{cancel, make(chan struct{})}
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
	return r
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
	level, offered, status, observed, grant := i.level, i.offered, i.status, i.observed, i.grant
	i.offered, i.observed = false, false
	i.mu.Unlock()
	var written Written
	var err error
	if offered {
		var findings []federation.Finding
		level, findings = i.admit(level, grant)
		began := i.config.Now()
		written, err = session.Apply(ctx, level)
		i.metrics.seconds.Observe(i.config.Now().Sub(began).Seconds())
		i.applied(findings, err)
	}
	if observed {
		more, conditionsErr := session.SetConditions(ctx, status.Conditions)
		written.Add(more)
		err = errors.Join(err, conditionsErr)
	}
	i.metrics.count(written)
	if err != nil {
		i.mu.Lock()
		i.offered, i.observed = i.offered || offered, i.observed || observed
		i.mu.Unlock()
	}
	return err
}

func (i *Ingest) applied(findings []federation.Finding, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.state.Findings, i.state.Err = findings, err
	if err == nil {
		i.state.Stored = i.config.Now()
	}
}
