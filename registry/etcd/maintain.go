// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// maintenance is the session of the one replica that looks after etcd.
const maintenance federation.SourceID = "meshd:maintenance"

// The limits of maintenance.
const (
	quotaWarning   = 0.8              // of the quota: reported, before writes are refused
	defragmentFrom = 32 << 20         // bytes: smaller databases are left alone
	historyKept    = 5 * time.Minute  // of revisions, as embedded etcd and Kubernetes keep
	changesKept    = 24 * time.Hour   // of the log of changes
	changesLimit   = 10000            // entries of that log
	maintainEvery  = 30 * time.Second // and how often all this is looked at
)

// maintain looks after the database until ctx ends: how full it is, what of its history
// and logs can go, and whether it should be defragmented.
func (s *Store) maintain(ctx context.Context) {
	var revisions []revisionAt
	tick := time.NewTicker(s.config.Maintenance)
	defer tick.Stop()
	for {
		members := s.measure(ctx)
		if len(members) > 0 && s.writable() == nil {
			var err error
			if revisions, err = s.lookAfter(ctx, members, revisions); err != nil && ctx.Err() == nil {
				s.log.Warn("maintenance of etcd", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

type revisionAt struct {
	revision int64
	at       time.Time
}

// memberStatus is one member of etcd.
type memberStatus struct {
	endpoint string
	*clientv3.StatusResponse
}

// leader tells whether the member leads: it is defragmented last.
func (m memberStatus) leader() bool { return m.Leader == m.Header.MemberId }

func (s *Store) endpoints() []string {
	if list := s.client.Endpoints(); len(list) > 0 {
		return list
	}
	return []string{""} // in this process
}

// measure asks every member how full it is, and notes the worst.
func (s *Store) measure(ctx context.Context) []memberStatus {
	var members []memberStatus
	for _, endpoint := range s.endpoints() {
		attempt, cancel := context.WithTimeout(ctx, s.config.Patience)
		status, err := s.client.Status(attempt, endpoint)
		cancel()
		if err == nil {
			members = append(members, memberStatus{endpoint, status})
		}
	}
	if len(members) == 0 {
		return nil
	}
	attempt, cancel := context.WithTimeout(ctx, s.config.Patience)
	raised, err := s.client.AlarmList(attempt)
	cancel()
	worst := slices.MaxFunc(members, func(a, b memberStatus) int { return int((a.DbSize - b.DbSize) >> 10) })
	alarms := []string{}
	if err == nil {
		for _, a := range raised.Alarms {
			if name := a.Alarm.String(); !slices.Contains(alarms, name) {
				alarms = append(alarms, name)
			}
		}
	}
	if quota := worst.DbSizeQuota; quota > 0 && float64(worst.DbSize) >= quotaWarning*float64(quota) {
		alarms = append(alarms, "NOSPACE soon")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(alarms) > 0 && !slices.Equal(alarms, s.health.Alarms) {
		s.log.Error("etcd raises an alarm", "alarms", alarms, "size", worst.DbSize, "in use", worst.DbSizeInUse, "quota", worst.DbSizeQuota)
	}
	s.health.Size, s.health.InUse, s.health.Quota, s.health.Alarms = worst.DbSize, worst.DbSizeInUse, worst.DbSizeQuota, alarms
	return members
}

// lookAfter does what one replica does for all.
func (s *Store) lookAfter(ctx context.Context, members []memberStatus, revisions []revisionAt) ([]revisionAt, error) {
	held, err := s.Begin(ctx, maintenance)
	if errors.Is(err, registry.ErrHeld) {
		return nil, nil
	}
	if err != nil {
		return revisions, err
	}
	defer held.Close(context.WithoutCancel(ctx))
	errs := []error{s.trimChanges(ctx)}
	if !s.config.Sole { // the embedded etcd compacts itself
		revisions, err = s.compact(ctx, members[0].Header.Revision, revisions)
		errs = append(errs, err)
	}
	errs = append(errs, s.defragment(ctx, members, held.Lost()))
	return revisions, errors.Join(errs...)
}

// compact lets go of the history that is older than historyKept.
func (s *Store) compact(ctx context.Context, revision int64, revisions []revisionAt) ([]revisionAt, error) {
	now := s.config.Now()
	revisions = append(revisions, revisionAt{revision, now})
	old := int64(0)
	for len(revisions) > 0 && now.Sub(revisions[0].at) >= historyKept {
		old, revisions = revisions[0].revision, revisions[1:]
	}
	if old == 0 {
		return revisions, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*s.config.Patience)
	defer cancel()
	_, err := s.client.Compact(ctx, old)
	if err != nil && strings.Contains(err.Error(), "compacted") {
		err = nil // somebody else did
	}
	return revisions, err
}

// defragment gives back space that is not in use, one member at a time and the leader
// last: a member does not answer while it is at it.
func (s *Store) defragment(ctx context.Context, members []memberStatus, lost <-chan struct{}) error {
	slices.SortStableFunc(members, func(a, b memberStatus) int { return int(truth(a.leader()) - truth(b.leader())) })
	for _, m := range members {
		if m.DbSize < s.config.DefragmentFrom || m.DbSizeInUse*2 > m.DbSize {
			continue
		}
		select {
		case <-lost:
			return registry.ErrFenced
		default:
		}
		s.log.Info("defragmenting a member of etcd", "endpoint", m.endpoint, "size", m.DbSize, "in use", m.DbSizeInUse)
		attempt, cancel := context.WithTimeout(ctx, time.Minute)
		_, err := s.client.Defragment(attempt, m.endpoint)
		cancel()
		if err != nil {
			return fmt.Errorf("defragment %s: %w", m.endpoint, err)
		}
	}
	return s.disarm(ctx)
}

// disarm ends a NOSPACE alarm when there is space again.
func (s *Store) disarm(ctx context.Context) error {
	s.mu.Lock()
	raised := slices.Contains(s.health.Alarms, pb.AlarmType_NOSPACE.String())
	s.mu.Unlock()
	if !raised {
		return nil
	}
	for _, m := range s.measure(ctx) {
		if m.DbSizeQuota > 0 && float64(m.DbSize) >= quotaWarning*float64(m.DbSizeQuota) {
			return nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.config.Patience)
	defer cancel()
	_, err := s.client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	return err
}

// trimChanges bounds the log of changes by age and by number.
func (s *Store) trimChanges(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*s.config.Patience)
	defer cancel()
	from := s.prefix + changesPrefix
	until := from + fmt.Sprintf("%020d", s.config.Now().Add(-changesKept).UnixNano())
	all, err := s.client.Get(ctx, from, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || all.Count == 0 {
		return err
	}
	if over := all.Count - changesLimit; over > 0 {
		oldest, err := s.client.Get(ctx, from, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(over))
		if err != nil {
			return err
		}
		if n := len(oldest.Kvs); n > 0 {
			until = max(until, string(oldest.Kvs[n-1].Key)+"\x00")
		}
	}
	_, err = s.client.Delete(ctx, from, clientv3.WithRange(until))
	return err
}
