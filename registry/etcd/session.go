// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// lease is a lease of etcd that is kept alive until it is ended.
type lease struct {
	id     clientv3.LeaseID
	client *clientv3.Client
	cancel context.CancelFunc
	lost   chan struct{} // closed when etcd has not heard of us for the lease's time
}

func (s *Store) newLease(ctx context.Context, ttl time.Duration) (*lease, error) {
	attempt, cancelAttempt := context.WithTimeout(ctx, s.config.Patience)
	defer cancelAttempt()
	granted, err := s.client.Grant(attempt, max(1, int64((ttl+time.Second-1)/time.Second)))
	if err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	alive, cancel := context.WithCancel(context.Background())
	l := &lease{id: granted.ID, client: s.client, cancel: cancel, lost: make(chan struct{})}
	answers, err := s.client.KeepAlive(alive, granted.ID)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("lease: %w", err)
	}
	go func() {
		defer close(l.lost)
		for range answers {
		}
	}()
	return l, nil
}

// end gives the lease back, and with it its keys, if etcd can be reached.
func (l *lease) end(ctx context.Context) error {
	l.cancel()
	_, err := l.client.Revoke(ctx, l.id)
	return err
}

func (l *lease) isLost() bool {
	select {
	case <-l.lost:
		return true
	default:
		return false
	}
}

// session is a registry.Session.
type session struct {
	store  *Store
	source federation.SourceID
	lease  *lease
	fence  int64 // create revision of the session's key

	lostOnce sync.Once
	lost     chan struct{}

	// mu is held while something is written, and guards what is known to be stored.
	mu       sync.Mutex
	baseline *baseline
	revision int64 // of the last write
	settled  bool  // a whole level was stored, and others were told so
}

// Begin implements registry.Store.
func (s *Store) Begin(ctx context.Context, source federation.SourceID) (registry.Session, error) {
	l, err := s.newLease(ctx, s.config.SessionTTL)
	if err != nil {
		return nil, fmt.Errorf("session of %s: %w", source, err)
	}
	s.setLiving(l.id, true)
	fence, err := s.takeFence(ctx, source, l)
	if err != nil {
		s.setLiving(l.id, false)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.Patience)
		defer cancel()
		l.end(end) // the error that counts is the first one; the lease ends by itself otherwise
		return nil, fmt.Errorf("session of %s: %w", source, err)
	}
	session := &session{store: s, source: source, lease: l, fence: fence, lost: make(chan struct{})}
	// Whatever an earlier session wrote is older than our key: with it the replica is
	// complete, and stays so, because nobody else can write here.
	if err := s.WaitFor(ctx, fence); err != nil {
		session.Close(context.WithoutCancel(ctx))
		return nil, fmt.Errorf("session of %s: %w", source, err)
	}
	s.mu.Lock()
	session.baseline = s.replica.baseline(source)
	s.mu.Unlock()
	go session.watchLease()
	return session, nil
}

// takeFence creates the session's key under a lease and returns its create revision.
func (s *Store) takeFence(ctx context.Context, source federation.SourceID, l *lease) (int64, error) {
	k := s.prefix + sessionKey(source)
	value, err := encode(&sessionValue{version{schema}, s.holder})
	if err != nil {
		return 0, err
	}
	compare := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(k), "=", 0)}
	cluster, isCluster := source.Cluster()
	if isCluster {
		compare = append(compare, clientv3.Compare(clientv3.CreateRevision(s.prefix+clusterKey(cluster)), ">", 0))
	}
	response, err := s.commit(ctx, l.lost, compare,
		[]clientv3.Op{clientv3.OpPut(k, string(value), clientv3.WithLease(l.id))},
		[]clientv3.Op{clientv3.OpGet(k)})
	if err != nil {
		return 0, err
	}
	if response.Succeeded {
		return response.Header.Revision, nil
	}
	kvs := response.Responses[0].GetResponseRange().GetKvs()
	switch {
	case len(kvs) == 0:
		return 0, fmt.Errorf("cluster %s: %w", cluster, registry.ErrNotFound)
	case clientv3.LeaseID(kvs[0].Lease) == l.id: // an attempt that seemed to fail
		return kvs[0].CreateRevision, nil
	case s.isAbandoned(kvs[0]):
		if err := s.removeAbandoned(ctx, kvs[0], l); err != nil {
			return 0, err
		}
		return s.takeFence(ctx, source, l)
	}
	return 0, registry.ErrHeld
}

// isAbandoned tells whether a session's key is one that this very process has given up
// while etcd was away. An etcd that was away renews all leases when it comes back, so that
// waiting for its end would take long.
func (s *Store) isAbandoned(kv *mvccpb.KeyValue) bool {
	var v sessionValue
	if decode(kv.Value, &v, &v.version) != nil || v.Holder != s.holder {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.living[clientv3.LeaseID(kv.Lease)]
}

func (s *Store) removeAbandoned(ctx context.Context, kv *mvccpb.KeyValue, l *lease) error {
	k := string(kv.Key)
	same := clientv3.Compare(clientv3.CreateRevision(k), "=", kv.CreateRevision)
	_, err := s.commit(ctx, l.lost, []clientv3.Cmp{same}, []clientv3.Op{clientv3.OpDelete(k)}, nil)
	return err
}

func (s *Store) setLiving(id clientv3.LeaseID, living bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if living {
		s.living[id] = true
	} else {
		delete(s.living, id)
	}
}

// watchLease ends the session when its lease or its key has gone.
func (s *session) watchLease() {
	for {
		s.store.mu.Lock()
		held, advanced := s.store.replica.sessions[s.source].created == s.fence, s.store.advanced
		s.store.mu.Unlock()
		if !held {
			s.end()
			return
		}
		select {
		case <-s.lease.lost:
			s.end()
			return
		case <-s.lost:
			return
		case <-advanced:
		}
	}
}

func (s *session) end() {
	s.lostOnce.Do(func() {
		close(s.lost)
		s.store.setLiving(s.lease.id, false)
	})
}

// Began implements registry.Session.
func (s *session) Began() federation.Revision { return federation.Revision(s.fence) }

// Lost implements registry.Session.
func (s *session) Lost() <-chan struct{} { return s.lost }

// Close implements registry.Session.
func (s *session) Close(ctx context.Context) error {
	s.end()
	s.store.forget(s.source)
	ctx, cancel := context.WithTimeout(ctx, s.store.config.Patience)
	defer cancel()
	return s.lease.end(ctx)
}

// commit writes operations if the fence still stands.
func (s *session) commit(ctx context.Context, ops []clientv3.Op, written *registry.Written) error {
	if err := s.over(); err != nil {
		return err
	}
	fence := clientv3.Compare(clientv3.CreateRevision(s.store.prefix+sessionKey(s.source)), "=", s.fence)
	response, err := s.store.commit(ctx, s.lost, []clientv3.Cmp{fence}, ops, nil)
	if err != nil {
		return fmt.Errorf("source %s: %w", s.source, err)
	}
	if !response.Succeeded {
		s.end()
		return fmt.Errorf("source %s: %w", s.source, registry.ErrFenced)
	}
	s.revision = response.Header.Revision
	written.Add(registry.Written{Transactions: 1, Operations: len(ops), Bytes: opsSize(ops)})
	return nil
}

// over is an error once the session has ended.
func (s *session) over() error {
	select {
	case <-s.lost:
		return fmt.Errorf("source %s: %w", s.source, registry.ErrFenced)
	default:
		return nil
	}
}

// SetConditions implements registry.Session.
func (s *session) SetConditions(ctx context.Context, conditions []federation.Condition) (registry.Written, error) {
	var written registry.Written
	id, ok := s.source.Cluster()
	if !ok {
		return written, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next, changed := mergeConditions(s.baseline.conditions, conditions, s.store.config.Now())
	if !changed {
		return written, nil
	}
	value, err := encode(&conditionsValue{version{schema}, next})
	if err != nil {
		return written, err
	}
	err = s.commit(ctx, []clientv3.Op{clientv3.OpPut(s.store.prefix+conditionsKey(id), string(value))}, &written)
	if err == nil {
		s.baseline.conditions = next
	}
	return written, err
}

// mergeConditions takes in what is a transition: another status or another reason.
func mergeConditions(stored, observed []federation.Condition, now time.Time) ([]federation.Condition, bool) {
	next := append([]federation.Condition(nil), stored...)
	changed := false
	for _, c := range observed {
		if c.Since.IsZero() {
			c.Since = now
		}
		c.Since = c.Since.UTC().Truncate(time.Millisecond)
		found := false
		for i := range next {
			if next[i].Type != c.Type {
				continue
			}
			found = true
			if next[i].Status == c.Status {
				c.Since = next[i].Since
			}
			if next[i].Status != c.Status || next[i].Reason != c.Reason {
				next[i], changed = c, true
			}
		}
		if !found {
			next, changed = append(next, c), true
		}
	}
	return next, changed
}
