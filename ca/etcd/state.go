// SPDX-License-Identifier: Apache-2.0

// Package etcd keeps the authorities of package ca in etcd, so that replicas share them, and the join tokens of
// virtual machines, so that each is used once.
package etcd

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// State is a ca.State below one prefix of an etcd cluster. Versions are modification revisions.
type State struct {
	client *clientv3.Client
	prefix string
}

var _ ca.State = (*State)(nil)

// watchAgain is the pause before a watch that ended is taken up again.
const watchAgain = 500 * time.Millisecond

// NewState uses the keys below prefix, which must end with a slash, as in "/isthmus/ca/".
func NewState(client *clientv3.Client, prefix string) (*State, error) {
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	return &State{client: client, prefix: prefix}, nil
}

func checkPrefix(prefix string) error {
	if !strings.HasSuffix(prefix, "/") {
		return fmt.Errorf("prefix %q: want one that ends with a slash", prefix)
	}
	return nil
}

// Fetch implements ca.State.
func (s *State) Fetch(ctx context.Context, key string) (ca.Entry, error) {
	got, err := s.client.Get(ctx, s.prefix+key)
	if err != nil {
		return ca.Entry{}, fmt.Errorf("read %s: %w", key, err)
	}
	if len(got.Kvs) == 0 {
		return ca.Entry{}, fmt.Errorf("%s: %w", key, ca.ErrNotFound)
	}
	return ca.Entry{Key: key, Value: got.Kvs[0].Value, Version: ca.Version(got.Kvs[0].ModRevision)}, nil
}

// List implements ca.State.
func (s *State) List(ctx context.Context, prefix string) ([]ca.Entry, error) {
	got, err := s.client.Get(ctx, s.prefix+prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", prefix, err)
	}
	var out []ca.Entry
	for _, kv := range got.Kvs {
		key := strings.TrimPrefix(string(kv.Key), s.prefix)
		out = append(out, ca.Entry{Key: key, Value: kv.Value, Version: ca.Version(kv.ModRevision)})
	}
	return out, nil
}

// Create implements ca.State.
func (s *State) Create(ctx context.Context, key string, value []byte) (ca.Version, error) {
	return s.put(ctx, key, value, 0, nil, ca.ErrExists)
}

// Replace implements ca.State.
func (s *State) Replace(ctx context.Context, key string, value []byte, version ca.Version) (ca.Version, error) {
	if version == 0 {
		return 0, fmt.Errorf("%s: %w: version 0 is that of no value", key, ca.ErrChanged)
	}
	return s.put(ctx, key, value, version, nil, ca.ErrChanged)
}

// ReplaceAs implements ca.State.
func (s *State) ReplaceAs(ctx context.Context, term ca.Term, key string, value []byte, version ca.Version) (ca.Version, error) {
	if version == 0 {
		return 0, fmt.Errorf("%s: %w: version 0 is that of no value", key, ca.ErrChanged)
	}
	return s.put(ctx, key, value, version, &term, ca.ErrChanged)
}

func (s *State) put(ctx context.Context, key string, value []byte, version ca.Version, term *ca.Term, lost error) (ca.Version, error) {
	full := s.prefix + key
	conditions := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(full), "=", int64(version))}
	var otherwise []clientv3.Op
	if term != nil {
		conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(term.Key), "=", int64(term.Revision)))
		otherwise = []clientv3.Op{clientv3.OpGet(term.Key)}
	}
	got, err := s.client.Txn(ctx).
		If(conditions...).
		Then(clientv3.OpPut(full, string(value))).
		Else(otherwise...).
		Commit()
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", key, err)
	}
	if !got.Succeeded {
		if term != nil && !leads(*term, got.Responses[0].GetResponseRange().GetKvs()) {
			lost = ca.ErrFenced
		}
		return 0, fmt.Errorf("%s: %w", key, lost)
	}
	return ca.Version(got.Header.Revision), nil
}

// leads tells whether the key of a term is still that of its beginning.
func leads(term ca.Term, found []*mvccpb.KeyValue) bool {
	return len(found) == 1 && found[0].GetCreateRevision() == int64(term.Revision)
}

// leaseTTL is after how many seconds somebody else may lead when a leader falls silent.
const leaseTTL = 10

// Lead implements ca.State. Candidates wait in line, each behind a key of its own with a lease.
func (s *State) Lead(ctx context.Context, name, who string) (ca.Term, error) {
	lease, err := s.client.Grant(ctx, leaseTTL)
	if err != nil {
		return ca.Term{}, fmt.Errorf("lead %s: %w", name, err)
	}
	// The session outlives ctx, so that it can be ended in etcd too.
	session, err := concurrency.NewSession(s.client, concurrency.WithLease(lease.ID), concurrency.WithContext(context.WithoutCancel(ctx)))
	if err != nil {
		return ca.Term{}, fmt.Errorf("lead %s: %w", name, err)
	}
	election := concurrency.NewElection(session, s.prefix+"lead/"+name)
	if err := election.Campaign(ctx, who); err != nil {
		session.Close()
		return ca.Term{}, fmt.Errorf("lead %s: %w", name, err)
	}
	end := sync.OnceFunc(func() { session.Close() })
	context.AfterFunc(ctx, end)
	return ca.Term{Key: election.Key(), Revision: ca.Version(election.Rev()), Done: session.Done(), Resign: end}, nil
}

// Changes implements ca.State. A watch that etcd ends (compaction, a lost member) is taken up again; since that
// may have hidden a change, it counts as one.
func (s *State) Changes(ctx context.Context, prefix string) <-chan struct{} {
	out := make(chan struct{}, 1)
	go func() {
		defer close(out)
		for ctx.Err() == nil {
			watch := s.client.Watch(clientv3.WithRequireLeader(ctx), s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
			for range watch {
				select {
				case out <- struct{}{}:
				default:
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(watchAgain):
			}
		}
	}()
	return out
}
