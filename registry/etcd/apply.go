// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"fmt"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// Apply implements registry.Session.
func (s *session) Apply(ctx context.Context, level *registry.Level) (registry.Written, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var written registry.Written
	groups, err := s.baseline.plan(s.source, level)
	if err != nil {
		return written, fmt.Errorf("source %s: %w", s.source, err)
	}
	settling, err := s.settle(level)
	if err != nil {
		return written, fmt.Errorf("source %s: %w", s.source, err)
	}
	groups = append(groups, settling...)
	for len(groups) > 0 {
		batch := nextBatch(groups)
		if err := s.write(ctx, groups[:batch], &written); err != nil {
			return written, err
		}
		groups = groups[batch:]
	}
	if written.Transactions == 0 {
		if err := s.confirm(ctx); err != nil {
			return written, err
		}
	}
	s.baseline.settled(level)
	written.Revision = federation.Revision(max(s.fence, s.revision))
	return written, nil
}

// confirm makes sure, where nothing is to be written, that what this session knows to be
// stored still is. It costs a question to etcd only while the source is exposed, because
// then something may be shown again that was shown differently.
func (s *session) confirm(ctx context.Context) error {
	if err := s.over(); err != nil {
		return err
	}
	s.store.mu.Lock()
	exposed := s.store.replica.exposed[s.source] != nil
	s.store.mu.Unlock()
	if !exposed {
		return nil
	}
	var unwritten registry.Written
	return s.commit(ctx, []clientv3.Op{clientv3.OpGet(s.store.prefix + sessionKey(s.source))}, &unwritten)
}

// settle tells the other replicas that what is stored of the source is a level of this
// session, and no longer what an earlier one has left: once, with its first whole level.
func (s *session) settle(level *registry.Level) ([]*group, error) {
	if s.settled || level.Records == nil {
		return nil, nil
	}
	value, err := encode(&settledValue{version{schema}, s.fence})
	if err != nil {
		return nil, err
	}
	return []*group{{
		puts: []keyValue{{key: settledKey(s.source), value: value}},
		done: func() { s.settled = true },
	}}, nil
}

// nextBatch is how many groups fit into one transaction; at least one, since a group alone
// was made to fit.
func nextBatch(groups []*group) int {
	operations, size := 0, 0
	for i, g := range groups {
		operations += len(g.puts) + len(g.deletes)
		for _, kv := range g.puts {
			size += len(kv.key) + len(kv.value)
		}
		if i > 0 && (operations > txnOperations || size > txnBytes) {
			return i
		}
	}
	return len(groups)
}

func (s *session) write(ctx context.Context, groups []*group, written *registry.Written) error {
	var ops []clientv3.Op
	var changes []change
	for _, g := range groups {
		for _, kv := range g.puts {
			ops = append(ops, clientv3.OpPut(s.store.prefix+kv.key, string(kv.value)))
		}
		for _, k := range g.deletes {
			ops = append(ops, clientv3.OpDelete(s.store.prefix+k))
		}
		changes = append(changes, g.changes...)
	}
	if len(changes) > 0 {
		op, err := s.store.logChanges(s.source, changes)
		if err != nil {
			return err
		}
		ops = append(ops, op)
	}
	s.store.expect(groups)
	for chunk := range slices.Chunk(ops, txnOperations+1) {
		// More than one chunk only for the removal of a very large record.
		if err := s.commit(ctx, chunk, written); err != nil {
			return err
		}
	}
	for _, g := range groups {
		g.note(s.baseline)
	}
	return nil
}

// change is why an endpoint came or went.
type change struct {
	Service  string `json:"s"`
	Endpoint string `json:"e"`
	What     string `json:"w"` // "+", "-", or the new health
}

// changesPerEntry bounds an entry of the log: of a change of very many endpoints only the
// first are named, and the rest is counted.
const changesPerEntry = 20

type changesValue struct {
	version
	Source  federation.SourceID `json:"source"`
	Changes []change            `json:"changes"`
	More    int                 `json:"more,omitempty"`
}

// logChanges is the operation that appends to the log of changes. Its key is ordered by
// time and does not collide between sources.
func (s *Store) logChanges(source federation.SourceID, changes []change) (clientv3.Op, error) {
	v := changesValue{version: version{schema}, Source: source, Changes: changes}
	if n := len(changes); n > changesPerEntry {
		v.Changes, v.More = changes[:changesPerEntry], n-changesPerEntry
	}
	value, err := encode(&v)
	if err != nil {
		return clientv3.Op{}, err
	}
	k := key(changesPrefix, fmt.Sprintf("%020d", s.config.Now().UnixNano()), string(source))
	return clientv3.OpPut(s.prefix+k, string(value)), nil
}

// appendChanges compares the endpoints of a service before and after.
func appendChanges(list []change, name federation.ServiceName, before, after []federation.Endpoint) []change {
	health := make(map[string]federation.Health, len(before))
	for i := range before {
		health[before[i].Key()] = before[i].Health
	}
	for i := range after {
		e := &after[i]
		was, there := health[e.Key()]
		delete(health, e.Key())
		switch {
		case !there:
			list = append(list, change{name.String(), e.Key(), "+"})
		case was != e.Health:
			list = append(list, change{name.String(), e.Key(), string(e.Health)})
		}
	}
	for i := range before {
		if _, left := health[before[i].Key()]; left {
			list = append(list, change{name.String(), before[i].Key(), "-"})
		}
	}
	return list
}
