// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// StoreConfig says what a Store works with.
type StoreConfig struct {
	// Client of etcd; the caller closes it after Run has returned.
	Client *clientv3.Client

	// Prefix of all keys; empty means "/isthmus/".
	Prefix string

	// Sealer protects members' credentials. Without one they are refused.
	Sealer registry.Sealer

	// Replica names this process among others, for people.
	Replica string

	// Sole tells that no other process can use this etcd (it is embedded): sessions that
	// an earlier process left behind are ended at once, instead of when their lease ends.
	Sole bool

	// SessionTTL is how long a session outlives its process; zero means 6 s.
	SessionTTL time.Duration

	// PresenceTTL is how long VMs outlive the replica that hears of them; zero means 15 s.
	PresenceTTL time.Duration

	// ReplicaTTL is how long others take a replica that was killed for one that lives; zero
	// means 10 s.
	ReplicaTTL time.Duration

	// Heartbeat is how often etcd is asked whether it is there; zero means 1 s.
	Heartbeat time.Duration

	// Patience is how long etcd may be silent before the store is Degraded, and how long
	// one attempt to write may take; zero means 2 s.
	Patience time.Duration

	// Maintenance is how often the database is looked after; zero means 30 s.
	Maintenance time.Duration

	// DefragmentFrom is the size of the database in bytes from which it is defragmented,
	// once less than half of it is in use; zero means 32 MiB.
	DefragmentFrom int64

	// Log; nil means none.
	Log *slog.Logger

	// Now is the time; nil means time.Now.
	Now func() time.Time
}

func (c *StoreConfig) setDefaults() {
	setDefault(&c.Prefix, "/isthmus/")
	setDefault(&c.SessionTTL, 6*time.Second)
	setDefault(&c.PresenceTTL, 15*time.Second)
	setDefault(&c.ReplicaTTL, 10*time.Second)
	setDefault(&c.Heartbeat, time.Second)
	setDefault(&c.Patience, 2*time.Second)
	setDefault(&c.Replica, "meshd")
	setDefault(&c.Maintenance, maintainEvery)
	setDefault(&c.DefragmentFrom, defragmentFrom)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Store is a registry.Store on etcd. Make one with New, and let Run run.
type Store struct {
	config  StoreConfig
	client  *clientv3.Client
	prefix  string
	log     *slog.Logger
	holder  string // of sessions: replica and process
	metrics metrics
	ready   chan struct{}

	// mu guards what follows. Run's goroutine changes the replica; others read it.
	mu       sync.Mutex
	replica  *replica
	changed  chan struct{} // closed when there is a newer snapshot
	advanced chan struct{} // closed when the replica has a newer revision
	health   registry.Health
	loaded   bool
	pulse    time.Time // when etcd last answered
	behind   struct {  // what etcd has, and the replica had not, since when
		revision int64
		since    time.Time
	}
	rewatch context.CancelFunc        // ends a watch that has stopped telling anything
	living  map[clientv3.LeaseID]bool // the leases of this process's sessions

	// When etcd was last asked whether it is there, when it last said so, and which
	// revision it had then; when this process was last found to have slept, until it has
	// caught up; and what is closed whenever etcd was asked.
	beaten, answered time.Time
	newest           int64
	woke             time.Time
	awake            chan struct{}

	// presence is the lease of the VMs that this replica hears of, made when needed.
	presenceMu sync.Mutex
	presence   *lease
}

var (
	_ registry.Store       = (*Store)(nil)
	_ prometheus.Collector = (*Store)(nil)
)

// New makes a store, which knows nothing until Run has loaded it.
func New(config StoreConfig) *Store {
	config.setDefaults()
	if !strings.HasSuffix(config.Prefix, "/") {
		config.Prefix += "/"
	}
	return &Store{
		config:   config,
		client:   config.Client,
		prefix:   config.Prefix,
		log:      config.Log,
		holder:   config.Replica + " " + rand.Text(),
		metrics:  newMetrics(),
		ready:    make(chan struct{}),
		replica:  newReplica(maphash.MakeSeed()),
		changed:  make(chan struct{}),
		advanced: make(chan struct{}),
		pulse:    config.Now(),
		living:   map[clientv3.LeaseID]bool{},
		beaten:   config.Now(),
		awake:    make(chan struct{}),
	}
}

// Run keeps the store up to date until ctx ends. Nothing etcd does ends it earlier: it
// keeps what it knows and goes on when etcd is back.
func (s *Store) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.beat(ctx) })
	wg.Go(func() {
		select {
		case <-s.ready:
			s.maintain(ctx)
		case <-ctx.Done():
		}
	})
	defer wg.Wait()
	defer s.dropPresence()
	retry := newBackOff(50*time.Millisecond, 2*time.Second)
	for ctx.Err() == nil {
		err := s.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.log.Warn("lost the watch of etcd, starting again from a list", "error", err)
		s.setDegraded(err)
		if !sleep(ctx, retry.NextBackOff()) {
			return nil
		}
	}
	return nil
}

// Ready is closed when the store has loaded what etcd had.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// Snapshot implements registry.Store.
func (s *Store) Snapshot() (*federation.Snapshot, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.replica.snapshot, s.changed
}

// Members implements registry.Members.
func (s *Store) Members() map[federation.ClusterID]*registry.Member {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.replica.memberViews
}

// VMs implements registry.VMs.
func (s *Store) VMs() map[registry.VMName]*registry.VM {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.replica.vmViews
}

// Holders says which replica syncs each source.
func (s *Store) Holders() map[federation.SourceID]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[federation.SourceID]string, len(s.replica.sessions))
	for source, session := range s.replica.sessions {
		out[source], _, _ = strings.Cut(session.holder, " ")
	}
	return out
}

// Health implements registry.Store.
func (s *Store) Health() registry.Health {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.health
	h.Revision = federation.Revision(s.replica.revision)
	for _, k := range slices.Sorted(maps.Keys(s.replica.quarantine)) {
		h.Quarantined = append(h.Quarantined, registry.Quarantined{Key: k, Reason: s.replica.quarantine[k]})
	}
	h.ReadOnly = s.readOnlyLocked()
	h.Alarms = slices.Clone(h.Alarms)
	return h
}

func (s *Store) readOnlyLocked() string {
	for _, k := range slices.Sorted(maps.Keys(s.replica.newer)) {
		return fmt.Sprintf("%s: %s; run the version of meshd that wrote it", k, s.replica.newer[k])
	}
	return ""
}

// WaitFor returns when the replica has seen everything up to a revision of etcd.
func (s *Store) WaitFor(ctx context.Context, revision int64) error {
	for {
		s.mu.Lock()
		done, advanced := s.loaded && s.replica.revision >= revision, s.advanced
		s.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// follow lists everything and then watches, until the watch breaks.
func (s *Store) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	revision, err := s.list(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.rewatch = cancel
	s.behind.revision = 0
	s.mu.Unlock()
	watch := s.client.Watch(clientv3.WithRequireLeader(ctx), s.prefix,
		clientv3.WithPrefix(), clientv3.WithRev(revision+1), clientv3.WithProgressNotify())
	for response := range watch {
		if err := response.Err(); err != nil {
			return fmt.Errorf("watch: %w", err)
		}
		s.takeEvents(response.Events, response.Header.Revision, response.IsProgressNotify())
	}
	return errors.New("watch ended")
}

// listPage is how many keys are read at once while loading.
const listPage = 2000

// list brings the replica to one revision, whatever it held before. What did not change
// keeps its pointers.
func (s *Store) list(ctx context.Context) (int64, error) {
	revision := int64(0)
	var kvs []keyValue
	for _, prefix := range loaded {
		from, end := s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix)
		for {
			page, err := s.get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(listPage), clientv3.WithRev(revision))
			if err != nil {
				return 0, fmt.Errorf("list %s: %w", prefix, err)
			}
			if revision == 0 {
				revision = page.Header.Revision
			}
			for _, kv := range page.Kvs {
				kvs = append(kvs, keyValue{key: strings.TrimPrefix(string(kv.Key), s.prefix), value: kv.Value, created: kv.CreateRevision})
			}
			if !page.More {
				break
			}
			from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		}
	}
	if s.config.Sole {
		var err error
		if kvs, err = s.endStaleSessions(ctx, kvs); err != nil {
			return 0, err
		}
	}
	s.takeList(kvs, revision)
	return revision, nil
}

type keyValue struct {
	key     string
	value   []byte
	created int64
	means   any // see expectation
}

// endStaleSessions removes the sessions of earlier processes.
func (s *Store) endStaleSessions(ctx context.Context, kvs []keyValue) ([]keyValue, error) {
	var err error
	kvs = slices.DeleteFunc(kvs, func(kv keyValue) bool {
		if err != nil || !strings.HasPrefix(kv.key, sessionsPrefix) || strings.Contains(string(kv.value), s.holder) {
			return false
		}
		ctx, cancel := context.WithTimeout(ctx, s.config.Patience)
		defer cancel()
		_, err = s.client.Delete(ctx, s.prefix+kv.key)
		return true
	})
	return kvs, err
}

func (s *Store) get(ctx context.Context, k string, options ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*s.config.Patience)
	defer cancel()
	return s.client.Get(ctx, k, options...)
}

func (s *Store) takeList(kvs []keyValue, revision int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := maps.Clone(s.replica.hashes)
	for _, kv := range kvs {
		delete(gone, kv.key)
		s.replica.put(kv.key, kv.value, kv.created)
	}
	for k := range gone {
		s.replica.remove(k)
	}
	first := !s.loaded
	s.loaded = true
	s.advanceLocked(revision, first)
	s.beatenLocked()
	if first {
		close(s.ready)
		s.log.Info("registry loaded", "revision", revision, "clusters", len(s.replica.memberViews),
			"services", len(s.replica.snapshot.Records), "quarantined", len(s.replica.quarantine))
	}
}

func (s *Store) takeEvents(events []*clientv3.Event, header int64, progress bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	revision := s.replica.revision
	if progress {
		revision = max(revision, header)
	}
	for _, event := range events {
		k := strings.TrimPrefix(string(event.Kv.Key), s.prefix)
		if event.Type == clientv3.EventTypeDelete {
			s.replica.remove(k)
		} else {
			s.replica.put(k, event.Kv.Value, event.Kv.CreateRevision)
		}
		revision = max(revision, event.Kv.ModRevision)
	}
	s.metrics.events.Add(float64(len(events)))
	s.advanceLocked(revision, false)
	s.beatenLocked()
}

// advanceLocked publishes a snapshot if there is something new, and wakes who waits.
func (s *Store) advanceLocked(revision int64, force bool) {
	s.replica.revision = revision
	s.replica.concealStored()
	if !s.publishLocked() && force {
		snapshot := *s.replica.snapshot
		snapshot.Revision = federation.Revision(revision)
		s.replica.snapshot = &snapshot
		s.tellLocked()
	}
	close(s.advanced)
	s.advanced = make(chan struct{})
}

// publishLocked makes the next snapshot, if it differs from the last one.
func (s *Store) publishLocked() bool {
	published := s.replica.publish()
	if published {
		s.tellLocked()
	}
	return published
}

func (s *Store) tellLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// beat asks etcd again and again whether it is there, and whether the watch keeps up.
func (s *Store) beat(ctx context.Context) {
	tick := time.NewTicker(s.config.Heartbeat)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		beat, cancel := context.WithTimeout(ctx, s.config.Patience)
		silent := s.expectPulse()
		response, err := s.client.Get(beat, s.prefix+sessionsPrefix, clientv3.WithCountOnly())
		if err == nil {
			err = s.client.RequestProgress(clientv3.WithRequireLeader(beat))
		}
		cancel()
		silent.Stop()
		s.mu.Lock()
		s.beatLocked(response, err)
		if err == nil {
			s.beatenLocked()
			s.checkWatchLocked(response.Header.Revision)
		} else if s.config.Now().Sub(s.pulse) >= s.config.Patience {
			s.degradedLocked(err)
		}
		s.mu.Unlock()
	}
}

var errSilent = errors.New("no answer")

// expectPulse tells that the store is degraded once etcd has been silent for too long,
// unless it is stopped before.
func (s *Store) expectPulse() *time.Timer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.AfterFunc(s.config.Patience-s.config.Now().Sub(s.pulse), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.config.Now().Sub(s.pulse) >= s.config.Patience {
			s.degradedLocked(errSilent)
		}
	})
}

// Current waits until this replica knows what etcd knew a moment ago, if it may know less:
// a process that was paused does when it goes on. It waits no longer than it takes to see
// that etcd is away, and then what is known is all there is.
func (s *Store) Current(ctx context.Context) error {
	for {
		s.mu.Lock()
		behind, wait := s.behindLocked()
		awake, advanced := s.awake, s.advanced
		s.mu.Unlock()
		if !behind {
			return nil
		}
		select {
		case <-awake:
		case <-advanced:
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// behindLocked tells whether this process has slept and not caught up since, and how long
// it may go on being taken for that.
func (s *Store) behindLocked() (bool, time.Duration) {
	now := s.config.Now()
	if now.Sub(s.beaten) > s.longestBeat() {
		return true, s.config.Patience
	}
	left := 2*s.config.Patience - now.Sub(s.woke)
	if s.woke.IsZero() || left <= 0 || !s.answered.Before(s.woke) && s.replica.revision >= s.newest {
		s.woke = time.Time{}
		return false, 0
	}
	return true, left
}

// longestBeat is the most that lies between two beats, unless the process sleeps.
func (s *Store) longestBeat() time.Duration { return 2*s.config.Heartbeat + s.config.Patience }

// beatLocked notes that etcd was asked, and what it said.
func (s *Store) beatLocked(response *clientv3.GetResponse, err error) {
	now := s.config.Now()
	if now.Sub(s.beaten) > s.longestBeat() {
		s.log.Warn("this process has slept", "for", now.Sub(s.beaten).Round(time.Second))
		s.woke = now
	}
	s.beaten = now
	if err == nil {
		s.answered, s.newest = now, response.Header.Revision
	}
	close(s.awake)
	s.awake = make(chan struct{})
}

// checkWatchLocked ends a watch that has not told for long what etcd has.
func (s *Store) checkWatchLocked(revision int64) {
	now := s.config.Now()
	switch {
	case s.behind.revision == 0 || s.replica.revision >= s.behind.revision:
		s.behind.revision, s.behind.since = revision, now
	case now.Sub(s.behind.since) > 5*s.config.Patience && s.rewatch != nil:
		s.log.Warn("the watch of etcd has fallen silent, starting it again", "have", s.replica.revision, "etcd", s.behind.revision)
		s.rewatch()
		s.behind.revision = 0
	}
}

func (s *Store) beatenLocked() {
	s.pulse = s.config.Now()
	if !s.health.Degraded {
		return
	}
	s.log.Info("etcd answers again", "after", s.pulse.Sub(s.health.Since).Round(time.Millisecond))
	s.health.Degraded, s.health.Since, s.health.Reason = false, time.Time{}, ""
}

func (s *Store) setDegraded(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.degradedLocked(err)
}

func (s *Store) degradedLocked(err error) {
	s.health.Reason = fmt.Sprintf("etcd: %v", err)
	if s.health.Degraded {
		return
	}
	s.health.Degraded, s.health.Since = true, s.pulse
	s.log.Warn("etcd does not answer; what is known goes on being served, writes wait", "error", err)
}

// writable refuses writes to a store that a newer meshd has written to.
func (s *Store) writable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reason := s.readOnlyLocked(); reason != "" {
		return fmt.Errorf("%w: %s", registry.ErrReadOnly, reason)
	}
	return nil
}

// commit runs a transaction until etcd has decided it: outages are waited for, until ctx
// or over ends. An attempt whose outcome is unknown is repeated, so the operations must
// mean the same when they are done twice.
func (s *Store) commit(ctx context.Context, over <-chan struct{}, compare []clientv3.Cmp, then, orElse []clientv3.Op) (*clientv3.TxnResponse, error) {
	if err := s.writable(); err != nil {
		return nil, err
	}
	retry := newBackOff(20*time.Millisecond, time.Second)
	for {
		attempt, cancel := context.WithTimeout(ctx, s.config.Patience)
		response, err := s.client.Txn(attempt).If(compare...).Then(then...).Else(orElse...).Commit()
		cancel()
		if err == nil {
			s.metrics.count(then, response.Succeeded)
			return response, nil
		}
		s.metrics.failures.Inc()
		if !passes(err) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-over:
			return nil, registry.ErrFenced
		case <-time.After(retry.NextBackOff()):
		}
	}
}

// passes tells whether an error may go away by itself.
func passes(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	var etcdError rpctypes.EtcdError
	code := status.Code(err)
	if errors.As(err, &etcdError) {
		code = etcdError.Code()
	}
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Unknown, codes.Aborted, codes.Canceled:
		return !errors.Is(err, rpctypes.ErrNoSpace)
	}
	return false
}

func newBackOff(first, most time.Duration) *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = first, most
	return b
}

// sleep waits, and tells whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
