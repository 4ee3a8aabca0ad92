// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// attempts bounds how often a change that somebody else was faster with is tried again.
const attempts = 10

// stored is a value as it was read, to be compared when it is replaced.
type stored struct {
	value    []byte
	revision int64 // of its last change; 0 if there is no such key
}

// read reads keys as of one moment.
func (s *Store) read(ctx context.Context, keys ...string) (map[string]stored, error) {
	ops := make([]clientv3.Op, len(keys))
	for i, k := range keys {
		ops[i] = clientv3.OpGet(s.prefix + k)
	}
	response, err := s.commitRead(ctx, ops)
	if err != nil {
		return nil, err
	}
	out := make(map[string]stored, len(keys))
	for i, k := range keys {
		out[k] = stored{}
		if kvs := response.Responses[i].GetResponseRange().GetKvs(); len(kvs) > 0 {
			out[k] = stored{kvs[0].Value, kvs[0].ModRevision}
		}
	}
	return out, nil
}

func (s *Store) commitRead(ctx context.Context, ops []clientv3.Op) (*clientv3.TxnResponse, error) {
	retry := newBackOff(20*time.Millisecond, time.Second)
	for {
		attempt, cancel := context.WithTimeout(ctx, s.config.Patience)
		response, err := s.client.Txn(attempt).Then(ops...).Commit()
		cancel()
		if err == nil || !passes(err) {
			return response, err
		}
		if !sleep(ctx, retry.NextBackOff()) {
			return nil, fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}

// decide runs a function that reads, decides and says what to write, until nobody was
// faster: what it read is compared when its operations are committed.
func (s *Store) decide(ctx context.Context, decide func(t *transaction) error) error {
	for range attempts {
		t := &transaction{store: s, ctx: ctx, seen: map[string]stored{}}
		if err := decide(t); err != nil {
			return err
		}
		if len(t.ops) == 0 {
			return nil
		}
		var compare []clientv3.Cmp
		for k, v := range t.seen {
			compare = append(compare, clientv3.Compare(clientv3.ModRevision(s.prefix+k), "=", v.revision))
		}
		response, err := s.commit(ctx, nil, compare, t.ops, nil)
		if err != nil {
			return err
		}
		if response.Succeeded {
			return s.WaitFor(ctx, response.Header.Revision)
		}
	}
	return registry.ErrConflict
}

// transaction is what decide's function reads and wants to write.
type transaction struct {
	store *Store
	ctx   context.Context
	seen  map[string]stored
	ops   []clientv3.Op
}

// get reads keys; each of them will be compared.
func (t *transaction) get(keys ...string) error {
	read, err := t.store.read(t.ctx, keys...)
	for k, v := range read {
		t.seen[k] = v
	}
	return err
}

func (t *transaction) put(k string, value []byte) {
	t.ops = append(t.ops, clientv3.OpPut(t.store.prefix+k, string(value)))
}

func (t *transaction) delete(k string) {
	t.ops = append(t.ops, clientv3.OpDelete(t.store.prefix+k))
}

func (t *transaction) deleteBelow(k string) {
	t.ops = append(t.ops, clientv3.OpDelete(t.store.prefix+k+"/", clientv3.WithPrefix()))
}

// member reads a member; nil if there is none.
func (t *transaction) member(id federation.ClusterID) (*registry.Member, error) {
	k := clusterKey(id)
	if err := t.get(k); err != nil {
		return nil, err
	}
	raw := t.seen[k].value
	if raw == nil {
		return nil, nil
	}
	var v memberValue
	if err := decode(raw, &v, &v.version); err != nil {
		return nil, fmt.Errorf("%s: %w", k, err)
	}
	v.ID, v.Conditions = id, nil
	return &v.Member, nil
}

// claim makes sure that an index key is free or already names the cluster, and reads
// whose it is otherwise.
func (t *transaction) claim(k string, id federation.ClusterID) (other federation.ClusterID, err error) {
	if err := t.get(k); err != nil {
		return "", err
	}
	if v := t.seen[k].value; v != nil && string(v) != string(id) {
		return federation.ClusterID(v), nil
	}
	return "", nil
}

// Join implements registry.Members.
func (s *Store) Join(ctx context.Context, m *registry.Member, c registry.Credentials, replace bool) (registry.Outcome, error) {
	if err := m.Validate(); err != nil {
		return "", err
	}
	m = m.Clone()
	var outcome registry.Outcome
	err := s.decide(ctx, func(t *transaction) error {
		old, err := t.member(m.ID)
		if err != nil {
			return err
		}
		if old != nil && old.Name != m.Name && !replace {
			return fmt.Errorf("cluster %q: %w: %q (uid %s)", m.Name, registry.ErrSameUID, old.Name, m.ID)
		}
		replaced, err := s.evict(t, m, replace)
		if err != nil {
			return err
		}
		outcome, err = s.putMember(t, old, m)
		if replaced {
			outcome = registry.Replaced
		}
		if err != nil || c.Reader.Empty() {
			return err
		}
		return s.putCredentials(t, m.ID, c)
	})
	if err != nil {
		return "", err
	}
	return outcome, nil
}

// evict refuses the join if another member has the name or a key, or removes that member
// if it is the one to be replaced.
func (s *Store) evict(t *transaction, m *registry.Member, replace bool) (bool, error) {
	named, err := t.claim(nameKey(m.Name), m.ID)
	if err != nil {
		return false, err
	}
	if named != "" {
		if !replace {
			return false, fmt.Errorf("cluster %q: %w (uid %s)", m.Name, registry.ErrSameName, named)
		}
		old, err := t.member(named)
		if err != nil {
			return false, err
		}
		if old != nil {
			s.removeMember(t, old, m)
		}
	}
	thumbprints, err := registry.KeyThumbprints(m.IssuerKeys)
	if err != nil {
		return false, err
	}
	for _, thumbprint := range thumbprints {
		other, err := t.claim(issuerKey(thumbprint), m.ID)
		if err != nil {
			return false, err
		}
		if other != "" && other != named {
			name := string(other)
			if owner := s.Members()[other]; owner != nil {
				name = owner.Name
			}
			return false, fmt.Errorf("cluster %q: %w: %q (uid %s, key %s)", m.Name, registry.ErrSameKey, name, other, thumbprint)
		}
	}
	return named != "", nil
}

// putMember writes a member with its indexes; old is what it replaces, nil for a new one.
func (s *Store) putMember(t *transaction, old, m *registry.Member) (registry.Outcome, error) {
	outcome := registry.Created
	if old != nil {
		outcome, m.Joined = registry.Updated, old.Joined
	} else if m.Joined.IsZero() {
		m.Joined = s.config.Now().UTC().Truncate(time.Second)
	}
	m.Conditions = nil
	raw := t.seen[clusterKey(m.ID)].value
	value, err := overlay(raw, &memberValue{version{schema}, *m})
	if err != nil {
		return "", err
	}
	thumbprints, err := registry.KeyThumbprints(m.IssuerKeys)
	if err != nil {
		return "", err
	}
	if old != nil {
		if old.Name != m.Name {
			t.delete(nameKey(old.Name))
		}
		before, _ := registry.KeyThumbprints(old.IssuerKeys) // was valid when it was written
		for _, thumbprint := range before {
			if !slices.Contains(thumbprints, thumbprint) {
				t.delete(issuerKey(thumbprint))
			}
		}
	}
	for _, k := range append([]string{nameKey(m.Name)}, keysOf(thumbprints)...) {
		if string(t.seen[k].value) != string(m.ID) {
			t.put(k, []byte(m.ID))
		}
	}
	if sameJSON(raw, value) {
		if len(t.ops) == 0 {
			outcome = registry.Unchanged
		}
		return outcome, nil
	}
	t.put(clusterKey(m.ID), value)
	return outcome, nil
}

func keysOf(thumbprints []string) []string {
	out := make([]string, len(thumbprints))
	for i, t := range thumbprints {
		out[i] = issuerKey(t)
	}
	return out
}

// sameJSON compares values whatever the order of their fields.
func sameJSON(a, b []byte) bool {
	var x, y any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	p, err1 := json.Marshal(x)
	q, err2 := json.Marshal(y)
	return err1 == nil && err2 == nil && string(p) == string(q)
}

// removeMember removes a member and all it reported. What the successor claims itself is
// left to it.
func (s *Store) removeMember(t *transaction, m, successor *registry.Member) {
	source := m.Source()
	t.delete(clusterKey(m.ID))
	t.deleteBelow(clusterKey(m.ID))
	t.delete(sessionKey(source))
	t.delete(settledKey(source))
	t.deleteBelow(key(recordsPrefix, string(source)))
	t.deleteBelow(key(workloadsPrefix, string(source)))
	t.deleteBelow(key(configPrefix, string(source)))
	networks := map[federation.Network]bool{m.Network: true}
	s.mu.Lock()
	for _, g := range s.replica.gateways {
		if g.Source == source {
			networks[g.Network] = true
		}
	}
	s.mu.Unlock()
	for n := range networks {
		t.deleteBelow(key(gatewaysPrefix, string(n), string(source)))
	}
	var keep []string
	if successor != nil {
		keep, _ = registry.KeyThumbprints(successor.IssuerKeys) // validated before
	}
	if successor == nil || successor.Name != m.Name {
		t.delete(nameKey(m.Name))
	}
	thumbprints, _ := registry.KeyThumbprints(m.IssuerKeys) // was valid when it was written
	for _, thumbprint := range thumbprints {
		if !slices.Contains(keep, thumbprint) {
			t.delete(issuerKey(thumbprint))
		}
	}
}

// UpdateMember implements registry.Members.
func (s *Store) UpdateMember(ctx context.Context, id federation.ClusterID, change func(*registry.Member) error) error {
	return s.decide(ctx, func(t *transaction) error {
		old, err := t.member(id)
		if err != nil {
			return err
		}
		if old == nil {
			return fmt.Errorf("cluster %s: %w", id, registry.ErrNotFound)
		}
		m := old.Clone()
		if err := change(m); err != nil {
			return err
		}
		m.ID = id
		if err := m.Validate(); err != nil {
			return err
		}
		if _, err := s.evict(t, m, false); err != nil {
			return err
		}
		_, err = s.putMember(t, old, m)
		return err
	})
}

// Leave implements registry.Members.
func (s *Store) Leave(ctx context.Context, id federation.ClusterID) error {
	return s.decide(ctx, func(t *transaction) error {
		m, err := t.member(id)
		if err != nil {
			return err
		}
		if m == nil {
			return fmt.Errorf("cluster %s: %w", id, registry.ErrNotFound)
		}
		s.removeMember(t, m, nil)
		return nil
	})
}

// credentialsValue is sealed under the name of its key.
type credentialsValue struct {
	version
	Sealed []byte `json:"sealed"`
}

var errNoSealer = errors.New("no sealing key is configured, so that credentials cannot be kept")

func (s *Store) putCredentials(t *transaction, id federation.ClusterID, c registry.Credentials) error {
	if s.config.Sealer == nil {
		return errNoSealer
	}
	k := credentialsKey(id)
	plain, err := encode(&c)
	if err != nil {
		return err
	}
	sealed, err := s.config.Sealer.Seal(k, plain)
	if err != nil {
		return fmt.Errorf("seal the credentials of cluster %s: %w", id, err)
	}
	if err := t.get(k); err != nil {
		return err
	}
	value, err := overlay(t.seen[k].value, &credentialsValue{version{schema}, sealed})
	if err != nil {
		return err
	}
	t.put(k, value)
	return nil
}

// SetCredentials implements registry.Members.
func (s *Store) SetCredentials(ctx context.Context, id federation.ClusterID, c registry.Credentials) error {
	return s.decide(ctx, func(t *transaction) error {
		m, err := t.member(id)
		if err != nil {
			return err
		}
		if m == nil {
			return fmt.Errorf("cluster %s: %w", id, registry.ErrNotFound)
		}
		return s.putCredentials(t, id, c)
	})
}

// Credentials implements registry.Members. They are kept in memory, sealed, so that a
// member can be watched while etcd is away.
func (s *Store) Credentials(ctx context.Context, id federation.ClusterID) (registry.Credentials, error) {
	var c registry.Credentials
	if s.config.Sealer == nil {
		return c, errNoSealer
	}
	k := credentialsKey(id)
	value, err := s.sealed(ctx, id)
	if err != nil {
		return c, fmt.Errorf("credentials of cluster %s: %w", id, err)
	}
	if value == nil {
		return c, fmt.Errorf("credentials of cluster %s: %w", id, registry.ErrNotFound)
	}
	var v credentialsValue
	if err := decode(value, &v, &v.version); err != nil {
		return c, fmt.Errorf("credentials of cluster %s: %w", id, err)
	}
	plain, err := s.config.Sealer.Open(k, v.Sealed)
	if err != nil {
		return c, fmt.Errorf("credentials of cluster %s: %w", id, err)
	}
	if err := json.Unmarshal(plain, &c); err != nil {
		return c, fmt.Errorf("credentials of cluster %s: %w", id, err)
	}
	return c, nil
}

// sealed is the value that holds the credentials of a member, nil if there is none. What
// has not been heard of may just have been written.
func (s *Store) sealed(ctx context.Context, id federation.ClusterID) ([]byte, error) {
	s.mu.Lock()
	value := s.replica.secrets[id]
	s.mu.Unlock()
	if value != nil {
		return value, nil
	}
	k := credentialsKey(id)
	read, err := s.read(ctx, k)
	return read[k].value, err
}
