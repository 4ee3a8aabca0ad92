// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Replica is one meshd among those that share an etcd, as it tells the others of itself.
type Replica struct {
	// Name among the replicas, as in StoreConfig.
	Name string `json:"name"`

	// AdminAddress is the "host:port" at which the others reach its admin port.
	AdminAddress string `json:"adminAddress"`

	// Advertise are the "host:port" that it tells proxies to dial.
	Advertise []string `json:"advertise,omitempty"`

	// Version of meshd.
	Version string `json:"version,omitempty"`

	// Started is when the process began, to the millisecond.
	Started time.Time `json:"started,omitzero"`
}

// same tells whether two describe one process.
func (r Replica) same(other Replica) bool {
	return r.Name == other.Name && r.AdminAddress == other.AdminAddress && r.Version == other.Version && r.Started.Equal(other.Started)
}

type replicaValue struct {
	version
	Replica
}

// Announce tells the other replicas of this one until ctx ends, and is silent then. While
// etcd is away it waits, and it comes back whatever became of its key. A replica that has
// the name of another one that lives elsewhere waits until that one is gone.
func (s *Store) Announce(ctx context.Context, self Replica) error {
	self.Started = self.Started.UTC().Truncate(time.Millisecond)
	value, err := encode(&replicaValue{version{schema}, self})
	if err != nil {
		return err
	}
	retry := newBackOff(50*time.Millisecond, 2*time.Second)
	said := ""
	for ctx.Err() == nil {
		err := s.announce(ctx, self, string(value), func() { said = ""; retry.Reset() })
		if ctx.Err() != nil {
			return nil
		}
		if text := err.Error(); text != said { // an outage is one line, not one a second
			said = text
			s.log.Warn("the other replicas may not know this one", "error", err)
		}
		sleep(ctx, retry.NextBackOff())
	}
	return nil
}

// announce keeps the key until it is lost, which is always an error.
func (s *Store) announce(ctx context.Context, self Replica, value string, announced func()) error {
	l, err := s.newLease(ctx, s.config.ReplicaTTL)
	if err != nil {
		return err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.Patience)
		defer cancel()
		l.end(end) // else it ends by itself
	}()
	revision, err := s.putReplica(ctx, self, value, l)
	if err != nil {
		return err
	}
	if err := s.WaitFor(ctx, revision); err != nil {
		return err
	}
	announced()
	for {
		s.mu.Lock()
		known, ok := s.replica.replicas[self.Name]
		advanced := s.advanced
		s.mu.Unlock()
		if !ok || !known.same(self) {
			return fmt.Errorf("replica %s: its key was removed or replaced", self.Name)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-l.lost:
			return fmt.Errorf("replica %s: its lease has ended", self.Name)
		case <-advanced:
		}
	}
}

// putReplica writes the key under the lease and returns the revision of that. What an
// earlier process at the same address left is replaced; another replica is not.
func (s *Store) putReplica(ctx context.Context, self Replica, value string, l *lease) (int64, error) {
	k := s.prefix + replicaKey(self.Name)
	write := clientv3.OpPut(k, value, clientv3.WithLease(l.id))
	read := clientv3.OpGet(k)
	compare := clientv3.Compare(clientv3.CreateRevision(k), "=", 0)
	for {
		response, err := s.commit(ctx, l.lost, []clientv3.Cmp{compare}, []clientv3.Op{write}, []clientv3.Op{read})
		if err != nil {
			return 0, fmt.Errorf("replica %s: %w", self.Name, err)
		}
		if response.Succeeded {
			return response.Header.Revision, nil
		}
		kvs := response.Responses[0].GetResponseRange().GetKvs()
		if len(kvs) == 0 {
			compare = clientv3.Compare(clientv3.CreateRevision(k), "=", 0)
			continue
		}
		if clientv3.LeaseID(kvs[0].Lease) == l.id { // an attempt that seemed to fail
			return kvs[0].ModRevision, nil
		}
		var other replicaValue
		if decode(kvs[0].Value, &other, &other.version) == nil && other.AdminAddress != self.AdminAddress {
			return 0, fmt.Errorf("replica %s: another one of that name is at %s; give each a --replica of its own, or wait if it has ended",
				self.Name, other.AdminAddress)
		}
		compare = clientv3.Compare(clientv3.ModRevision(k), "=", kvs[0].ModRevision)
	}
}

// Replicas are the other replicas that live, by name, as far as this one knows. One that
// was killed is among them until its lease ends.
func (s *Store) Replicas() []Replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Replica
	for name, r := range s.replica.replicas {
		if name != s.config.Replica {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b Replica) int { return strings.Compare(a.Name, b.Name) })
	return out
}
