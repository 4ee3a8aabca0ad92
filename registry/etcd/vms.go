// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/registry"
)

// PutVM implements registry.VMs.
func (s *Store) PutVM(ctx context.Context, vm *registry.VM) (registry.Outcome, error) {
	if err := vm.Validate(); err != nil {
		return "", err
	}
	outcome := registry.Created
	err := s.decide(ctx, func(t *transaction) error {
		k := vmKey(vm.Key())
		if err := t.get(k); err != nil {
			return err
		}
		raw := t.seen[k].value
		want := *vm
		if raw != nil {
			var old vmValue
			if err := decode(raw, &old, &old.version); err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
			outcome, want.Created = registry.Updated, old.Created
		} else if want.Created.IsZero() {
			want.Created = s.config.Now().UTC().Truncate(time.Second)
		}
		value, err := overlay(raw, &vmValue{version{schema}, want})
		if err != nil {
			return err
		}
		if sameJSON(raw, value) {
			outcome = registry.Unchanged
			return nil
		}
		t.put(k, value)
		return nil
	})
	if err != nil {
		return "", err
	}
	return outcome, nil
}

// RemoveVM implements registry.VMs.
func (s *Store) RemoveVM(ctx context.Context, name registry.VMName) error {
	return s.decide(ctx, func(t *transaction) error {
		k := vmKey(name)
		if err := t.get(k); err != nil {
			return err
		}
		if t.seen[k].value == nil {
			return fmt.Errorf("vm %s: %w", name, registry.ErrNotFound)
		}
		t.delete(k)
		t.deleteBelow(k)
		return nil
	})
}

// ReportVM implements registry.VMs.
func (s *Store) ReportVM(ctx context.Context, name registry.VMName, health registry.VMHealth) (registry.Written, error) {
	var written registry.Written
	l, err := s.presenceLease(ctx)
	if err != nil {
		return written, fmt.Errorf("vm %s: %w", name, err)
	}
	read, err := s.commitRead(ctx, []clientv3.Op{
		clientv3.OpGet(s.prefix + vmKey(name)), clientv3.OpGet(s.prefix + healthKey(name)), clientv3.OpGet(s.prefix + presentKey(name)),
	})
	if err != nil {
		return written, fmt.Errorf("vm %s: %w", name, err)
	}
	var ops []clientv3.Op
	kvs := read.Responses[1].GetResponseRange().GetKvs()
	var old vmHealthValue
	known := len(kvs) > 0 && decode(kvs[0].Value, &old, &old.version) == nil
	if !known || !old.Same(&health) {
		if known && old.Healthy == health.Healthy {
			health.Since = old.Since
		}
		value, err := encode(&vmHealthValue{version{schema}, health})
		if err != nil {
			return written, err
		}
		ops = append(ops, clientv3.OpPut(s.prefix+healthKey(name), string(value)))
	}
	kvs = read.Responses[2].GetResponseRange().GetKvs()
	if len(kvs) == 0 || clientv3.LeaseID(kvs[0].Lease) != l.id {
		ops = append(ops, clientv3.OpPut(s.prefix+presentKey(name), `{"v":1}`, clientv3.WithLease(l.id)))
	}
	if len(ops) == 0 && len(read.Responses[0].GetResponseRange().GetKvs()) > 0 {
		return written, nil
	}
	registered := clientv3.Compare(clientv3.CreateRevision(s.prefix+vmKey(name)), ">", 0)
	response, err := s.commit(ctx, l.lost, []clientv3.Cmp{registered}, ops, nil)
	if err != nil {
		return written, fmt.Errorf("vm %s: %w", name, err)
	}
	if !response.Succeeded {
		return written, fmt.Errorf("vm %s: %w", name, registry.ErrNotFound)
	}
	return registry.Written{Transactions: 1, Operations: len(ops), Bytes: opsSize(ops)}, nil
}

// LoseVM implements registry.VMs.
func (s *Store) LoseVM(ctx context.Context, name registry.VMName) error {
	s.presenceMu.Lock()
	l := s.presence
	s.presenceMu.Unlock()
	if l == nil {
		return nil
	}
	ours := clientv3.Compare(clientv3.LeaseValue(s.prefix+presentKey(name)), "=", l.id)
	_, err := s.commit(ctx, l.lost, []clientv3.Cmp{ours}, []clientv3.Op{clientv3.OpDelete(s.prefix + presentKey(name))}, nil)
	return err
}

// presenceLease is the one lease of the VMs that this replica hears of.
func (s *Store) presenceLease(ctx context.Context) (*lease, error) {
	s.presenceMu.Lock()
	defer s.presenceMu.Unlock()
	if s.presence != nil && !s.presence.isLost() {
		return s.presence, nil
	}
	l, err := s.newLease(ctx, s.config.PresenceTTL)
	if err != nil {
		return nil, err
	}
	s.presence = l
	return l, nil
}

// dropPresence stops keeping the lease alive. The VMs remain present until it ends, which
// leaves them the time to find another replica, or this one again.
func (s *Store) dropPresence() {
	s.presenceMu.Lock()
	defer s.presenceMu.Unlock()
	if s.presence != nil {
		s.presence.cancel()
		s.presence = nil
	}
}
