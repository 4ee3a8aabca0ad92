// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// pair is a session's baseline, the replica of its own process, which is told what to
// expect, and that of another process, which is not.
type pair struct {
	source     federation.SourceID
	baseline   *baseline
	near, far  *replica
	operations int
	followers  [2]follower // of the two replicas
}

// follower is somebody who believes the change log.
type follower struct {
	snapshot *federation.Snapshot
	view     *federation.View
}

// follow sees that the change log leaves nothing out.
func (f *follower) follow(t *testing.T, r *replica, what string) {
	t.Helper()
	scope := federation.Scope{Cluster: "a", Network: "n1"}
	joined := *r.snapshot // or else its services are nobody's
	joined.Clusters = map[federation.ClusterID]*federation.Cluster{"a": {ID: "a", Name: "a", Network: "n1"}}
	last, now := f.snapshot, &joined
	f.snapshot, f.view = now, now.ViewFrom(f.view, scope)
	if !reflect.DeepEqual(f.view.Services, now.View(scope).Services) {
		t.Fatalf("%s: by the change log other services than there are", what)
	}
	if len(now.Records) > 0 && len(f.view.Services) == 0 {
		t.Fatalf("%s: %d records, and no service is seen", what, len(now.Records))
	}
	if last == nil {
		return
	}
	want := map[federation.WorkloadKey]bool{}
	for key, w := range now.Workloads {
		if last.Workloads[key] != w {
			want[key] = true
		}
	}
	for key := range last.Workloads {
		if now.Workloads[key] == nil {
			want[key] = true
		}
	}
	got := map[federation.WorkloadKey]bool{}
	for _, key := range now.ChangedWorkloads(last) {
		got[key] = true
	}
	if !maps.Equal(got, want) {
		t.Fatalf("%s: workloads changed: %v, but they did: %v", what, got, want)
	}
}

// content is a snapshot without what its maker knows of it.
func content(s *federation.Snapshot) federation.Snapshot {
	return federation.Snapshot{
		Revision: s.Revision, Clusters: s.Clusters, Records: s.Records, Workloads: s.Workloads,
		Gateways: s.Gateways, Objects: s.Objects, Addresses: s.Addresses, Standing: s.Standing,
	}
}

func newPair(source federation.SourceID) *pair {
	seed := maphash.MakeSeed()
	p := &pair{source: source, near: newReplica(seed), far: newReplica(seed)}
	p.baseline = p.far.baseline(source)
	return p
}

// apply stores a level as a session does, one transaction after the other.
func (p *pair) apply(t *testing.T, level *registry.Level) {
	t.Helper()
	groups, err := p.baseline.plan(p.source, level)
	if err != nil {
		t.Fatal(err)
	}
	p.operations = 0
	for _, g := range groups {
		for _, kv := range g.puts {
			p.near.expected[kv.key] = expectation{kv.key, p.near.hash(kv.value), kv.means}
			if len(kv.value) > 8<<10 {
				t.Errorf("%s has %d bytes", kv.key, len(kv.value))
			}
		}
		for _, r := range []*replica{p.near, p.far} {
			for _, kv := range g.puts {
				r.put(kv.key, kv.value, 1)
			}
			for _, k := range g.deletes {
				r.remove(k)
			}
			r.revision++
			r.publish()
		}
		p.operations += len(g.puts) + len(g.deletes)
		g.note(p.baseline)
	}
	p.baseline.settled(level)
}

func (p *pair) same(t *testing.T, level *registry.Level, what string) {
	t.Helper()
	if len(p.near.expected) != 0 || len(p.far.quarantine) != 0 {
		t.Fatalf("%s: still expected: %v; quarantined: %v", what, slices.Collect(maps.Keys(p.near.expected)), p.far.quarantine)
	}
	for i, r := range []*replica{p.near, p.far} {
		p.followers[i].follow(t, r, what)
	}
	if !reflect.DeepEqual(content(p.near.snapshot), content(p.far.snapshot)) {
		t.Fatalf("%s: the writer sees something else than others\n%+v\n%+v", what, p.near.snapshot, p.far.snapshot)
	}
	if len(p.near.snapshot.Workloads) != len(level.Workloads) || len(p.near.snapshot.Records) != len(level.Records) {
		t.Fatalf("%s: %d workloads, want %d; %d records, want %d", what, len(p.near.snapshot.Workloads), len(level.Workloads), len(p.near.snapshot.Records), len(level.Records))
	}
	for uid, w := range level.Workloads {
		if got := p.near.snapshot.Workloads[federation.WorkloadKey{Source: p.source, UID: uid}]; !reflect.DeepEqual(got, w) {
			t.Fatalf("%s: workload %+v, want %+v", what, got, w)
		}
	}
	for name, r := range level.Records {
		if got := p.near.snapshot.Records[name]; len(got) != 1 || !reflect.DeepEqual(got[0], r) {
			t.Fatalf("%s: record %+v, want %+v", what, got, r)
		}
	}
}

func somePod(source federation.SourceID, n int) *federation.Workload {
	return &federation.Workload{
		Source: source, Namespace: fmt.Sprint("team-", n%7), Name: fmt.Sprint("pod-", n), UID: fmt.Sprintf("%08d-0000-4000-8000-000000000000", n),
		Role: federation.Sidecar, ServiceAccount: fmt.Sprint("account-", n%11), Network: "n1", Locality: federation.Locality{Region: "eu", Zone: "eu-1"},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)})}, Labels: map[string]string{"app": fmt.Sprint("a", n%11), "version": "v1"},
	}
}

func someRecord(source federation.SourceID, n, endpoints int) *federation.Record {
	r := &federation.Record{
		Source: source, Name: federation.ServiceName{Namespace: fmt.Sprint("team-", n%7), Name: fmt.Sprint("service-", n)}, Type: federation.ClusterIP,
		Created: time.Unix(int64(n), 0).UTC(), Ports: []federation.Port{{Number: 80, Name: "http", Protocol: federation.HTTP}}, Labels: map[string]string{"app": fmt.Sprint(n)},
	}
	for e := range endpoints {
		w := somePod(source, 1000*n+e)
		r.Endpoints = append(r.Endpoints, federation.Endpoint{Workload: w.Name, UID: w.UID, Addresses: w.Addresses, TargetPorts: map[uint32]uint32{80: 8080},
			Health: federation.Ready, Network: w.Network, Locality: w.Locality, ServiceAccount: w.ServiceAccount, Labels: w.Labels, Mesh: true})
	}
	slices.SortFunc(r.Endpoints, byKey)
	return r
}

// nextLevel makes the next level from the last one, by a few random changes.
func nextLevel(random *rand.Rand, source federation.SourceID, last *registry.Level) *registry.Level {
	next := &registry.Level{Records: maps.Clone(last.Records), Workloads: maps.Clone(last.Workloads)}
	for range random.IntN(20) {
		w := somePod(source, random.IntN(300))
		switch random.IntN(4) {
		case 0:
			delete(next.Workloads, w.UID)
		case 1:
			w.Ready, w.Role = true, federation.GatewayRole
			next.Workloads[w.UID] = w
		case 2:
			w.Labels["long"] = strings.Repeat("x", random.IntN(3000))
			next.Workloads[w.UID] = w
		default:
			next.Workloads[w.UID] = w
		}
	}
	for range random.IntN(3) {
		n := random.IntN(6)
		r := someRecord(source, n, []int{0, 1, 10, 70, 130, 3600}[n])
		switch random.IntN(4) {
		case 0:
			delete(next.Records, r.Name)
		case 1:
			if n < 5 && len(r.Endpoints) > 0 {
				r.Endpoints = slices.Delete(r.Endpoints, 0, random.IntN(len(r.Endpoints)))
			}
			next.Records[r.Name] = r
		case 2:
			if len(r.Endpoints) > 0 {
				r.Endpoints[random.IntN(len(r.Endpoints))].Health = federation.NotReady
			}
			next.Records[r.Name] = r
		default:
			r.PublishNotReady = true
			next.Records[r.Name] = r
		}
	}
	return next
}

func TestWriterSeesWhatOthersDecode(t *testing.T) {
	t.Parallel()
	const source = federation.SourceID("kube:a")
	for seed := range uint64(4) {
		random := rand.New(rand.NewPCG(seed, 1))
		p := newPair(source)
		level := &registry.Level{Records: map[federation.ServiceName]*federation.Record{}, Workloads: map[string]*federation.Workload{}}
		for step := range 15 {
			level = nextLevel(random, source, level)
			p.apply(t, level)
			what := fmt.Sprintf("seed %d, step %d", seed, step)
			p.same(t, level, what)
			if p.apply(t, level); p.operations != 0 {
				t.Fatalf("%s: %d operations, and nothing has changed", what, p.operations)
			}
			if random.IntN(4) == 0 { // another session takes over
				p.baseline = p.far.baseline(source)
				if p.apply(t, level); p.operations != 0 {
					t.Fatalf("%s: a new session writes %d times what is stored", what, p.operations)
				}
			}
		}
	}
}

// One pod that changes writes the few that share its key; each is in memory once.
func TestWorkloadsShareKeysAndMemory(t *testing.T) {
	t.Parallel()
	const source = federation.SourceID("kube:a")
	p := newPair(source)
	level := &registry.Level{Records: map[federation.ServiceName]*federation.Record{}, Workloads: map[string]*federation.Workload{}}
	for n := range 100 {
		w := somePod(source, n)
		level.Workloads[w.UID] = w
	}
	small := someRecord(source, 1, 10)
	level.Records[small.Name] = small
	p.apply(t, level)
	p.same(t, level, "after the first level")
	if want := (100+WorkloadsPerKey-1)/WorkloadsPerKey + 2; p.operations != want {
		t.Errorf("%d operations, want %d", p.operations, want)
	}
	if p.near.snapshot.Records[small.Name][0] != small {
		t.Error("the record is in memory twice")
	}
	for uid, w := range level.Workloads {
		if p.near.snapshot.Workloads[federation.WorkloadKey{Source: source, UID: uid}] != w {
			t.Fatal("a workload is in memory twice")
		}
	}
	changed := *level
	changed.Workloads = maps.Clone(level.Workloads)
	w := *somePod(source, 50)
	w.Ready = true
	changed.Workloads[w.UID] = &w
	before := p.near.snapshot.Workloads
	if p.apply(t, &changed); p.operations != 1 {
		t.Errorf("%d operations for one pod, want 1", p.operations)
	}
	p.same(t, &changed, "after a change")
	if before[federation.WorkloadKey{Source: source, UID: w.UID}].Ready {
		t.Error("a snapshot that was handed out has changed")
	}
}

// Endpoints that join others in a slice leave alone what was handed out of it.
func TestSlicesThatAreSharedDoNotChange(t *testing.T) {
	t.Parallel()
	const source = federation.SourceID("kube:a")
	for n := 1; n < 60; n++ {
		p := newPair(source)
		all := someRecord(source, 1, 70)
		level := &registry.Level{Records: map[federation.ServiceName]*federation.Record{}, Workloads: map[string]*federation.Workload{}}
		less := *all
		less.Endpoints = slices.Concat(all.Endpoints[:n], all.Endpoints[n+1:])
		level.Records[all.Name] = &less
		p.apply(t, level)
		handed := map[string][]federation.Endpoint{}
		shared := map[string][]federation.Endpoint{}
		for _, s := range p.near.records[source][all.Name].slices {
			shared[s.name], handed[s.name] = s.endpoints, slices.Clone(s.endpoints)
		}
		more := *level
		more.Records = map[federation.ServiceName]*federation.Record{all.Name: all}
		if _, err := p.baseline.plan(source, &more); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(shared, handed) {
			t.Fatalf("without endpoint %d: planning has changed what the replica holds", n)
		}
		p.apply(t, &more)
		p.same(t, &more, "with all")
	}
}

// What is damaged is written again, and what means nothing goes.
func TestDamagedBundlesAreMended(t *testing.T) {
	t.Parallel()
	const source = federation.SourceID("kube:a")
	p := newPair(source)
	level := &registry.Level{Records: map[federation.ServiceName]*federation.Record{}, Workloads: map[string]*federation.Workload{}}
	for n := range 40 {
		w := somePod(source, n)
		level.Workloads[w.UID] = w
	}
	p.apply(t, level)
	double, err := encodeWorkloads([]*federation.Workload{somePod(source, 3)})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*replica{p.near, p.far} {
		r.put("workloads/kube:a/1", []byte(`{"v":1,"w":[{"u":"x","n":9}]}`), 1)
		r.put("workloads/kube:a/7", double, 1)
		r.put("workloads/kube:a/x%zz", []byte(`{"v":1}`), 1)
		r.publish()
	}
	p.baseline = p.far.baseline(source)
	p.apply(t, level)
	p.same(t, level, "after the repair")
	if _, left := p.far.hashes["workloads/kube:a/x%zz"]; left || len(p.far.bundles) != 3 {
		t.Errorf("what means nothing is still there: %v", slices.Collect(maps.Keys(p.far.bundles)))
	}
}

func FuzzDecodeWorkloads(f *testing.F) {
	data, err := encodeWorkloads([]*federation.Workload{somePod("kube:a", 1), somePod("kube:a", 2)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"v":1,"w":[{"u":"x","z":-1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := decodeWorkloads(data, "kube:a", &registry.Interner{})
		if err != nil {
			return
		}
		again, err := encodeWorkloads(list)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := decodeWorkloads(again, "kube:a", &registry.Interner{})
		if err != nil || !reflect.DeepEqual(list, twice) {
			t.Errorf("%q: %v\n%+v\n%+v", data, err, list, twice)
		}
	})
}
