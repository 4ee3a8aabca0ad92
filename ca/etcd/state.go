// SPDX-License-Identifier: Apache-2.0

// Package etcd keeps the authorities of package ca in etcd, so that replicas share them, and the join tokens of
// virtual machines, so that each is used once.
package etcd

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	clientv3 "go.etcd.io/etcd/client/v3"
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
	return s.put(ctx, key, value, 0, ca.ErrExists)
}

// Replace implements ca.State.
func (s *State) Replace(ctx context.Context, key string, value []byte, version ca.Version) (ca.Version, error) {
	if version == 0 {
		return 0, fmt.Errorf("%s: %w: version 0 is that of no value", key, ca.ErrChanged)
	}
	return s.put(ctx, key, value, version, ca.ErrChanged)
}

func (s *State) put(ctx context.Context, key string, value []byte, version ca.Version, lost error) (ca.Version, error) {
	full := s.prefix + key
	got, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(full), "=", int64(version))).
		Then(clientv3.OpPut(full, string(value))).
		Commit()
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", key, err)
	}
	if !got.Succeeded {
		return 0, fmt.Errorf("%s: %w", key, lost)
	}
	return ca.Version(got.Header.Revision), nil
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
