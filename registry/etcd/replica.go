// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// replica is the state of etcd in memory. One goroutine changes it; the store guards it
// with its mutex. What it publishes is never changed again.
type replica struct {
	seed     maphash.Seed
	revision int64
	hashes   map[string]uint64 // of every value, to see at once whether it differs

	names    registry.Interner
	expected map[string]expectation // what sessions of this process are about to write

	members    map[federation.ClusterID]*memberState
	records    map[federation.SourceID]map[federation.ServiceName]*recordState
	bundles    map[string][]*federation.Workload // by key
	leaving    map[string][]*federation.Workload // by key: those of before, of bundles that changed
	workloads  map[federation.WorkloadKey]*federation.Workload
	gateways   map[string]*federation.Gateway // by key
	objects    map[string]*federation.Object  // by key
	addresses  map[string]federation.VirtualAddress
	vms        map[registry.VMName]*vmState
	sessions   map[federation.SourceID]sessionState
	settled    map[federation.SourceID]int64 // create revision of the session that stored a level
	exposed    map[federation.SourceID]*exposure
	secrets    map[federation.ClusterID][]byte // members' credentials, sealed
	replicas   map[string]Replica              // by name, this one too
	quarantine map[string]string               // key to reason
	newer      map[string]string               // keys that make the store read-only

	// What the next snapshot cannot share with the last one.
	dirtyServices map[federation.ServiceName]bool
	dirtyMembers  bool
	dirtyWork     bool // bundles
	dirtyShown    bool // workloads that are exposed
	dirtyGateways bool
	dirtyObjects  bool
	dirtyAddrs    bool
	dirtyVMs      bool

	snapshot    *federation.Snapshot
	history     federation.History // of the snapshots
	memberViews map[federation.ClusterID]*registry.Member
	vmViews     map[registry.VMName]*registry.VM
}

// memberState is a cluster as it is stored.
type memberState struct {
	member     *registry.Member // nil while only its conditions are known
	raw        []byte
	conditions []federation.Condition
}

// recordState is a record as it is stored, in pieces.
type recordState struct {
	head   *headState
	slices []*sliceState      // mostly one
	whole  *federation.Record // what a session of this process takes it to be; nil if unknown
	record *federation.Record // nil until there is a head
}

// headState is a record whose endpoints do not count.
type headState struct {
	Generation int64
	record     *federation.Record
}

type sliceState struct {
	name       string
	generation int64
	endpoints  []federation.Endpoint
	record     *federation.Record // only while it is expected: the record that it makes whole
}

type vmState struct {
	vm      *registry.VM
	raw     []byte
	health  *registry.VMHealth
	present bool
}

type sessionState struct {
	created int64 // create revision, the fence
	holder  string
}

func newReplica(seed maphash.Seed) *replica {
	return &replica{
		seed:          seed,
		hashes:        map[string]uint64{},
		members:       map[federation.ClusterID]*memberState{},
		records:       map[federation.SourceID]map[federation.ServiceName]*recordState{},
		expected:      map[string]expectation{},
		bundles:       map[string][]*federation.Workload{},
		leaving:       map[string][]*federation.Workload{},
		workloads:     map[federation.WorkloadKey]*federation.Workload{},
		gateways:      map[string]*federation.Gateway{},
		objects:       map[string]*federation.Object{},
		addresses:     map[string]federation.VirtualAddress{},
		vms:           map[registry.VMName]*vmState{},
		sessions:      map[federation.SourceID]sessionState{},
		settled:       map[federation.SourceID]int64{},
		exposed:       map[federation.SourceID]*exposure{},
		secrets:       map[federation.ClusterID][]byte{},
		replicas:      map[string]Replica{},
		quarantine:    map[string]string{},
		newer:         map[string]string{},
		dirtyServices: map[federation.ServiceName]bool{},
		snapshot: &federation.Snapshot{
			Clusters:  map[federation.ClusterID]*federation.Cluster{},
			Records:   map[federation.ServiceName][]*federation.Record{},
			Workloads: map[federation.WorkloadKey]*federation.Workload{},
			Gateways:  map[federation.Network][]*federation.Gateway{},
			Addresses: map[string]federation.VirtualAddress{},
		},
		memberViews: map[federation.ClusterID]*registry.Member{},
		vmViews:     map[registry.VMName]*registry.VM{},
	}
}

func (r *replica) hash(value []byte) uint64 { return maphash.Bytes(r.seed, value) }

// put takes in one value. A value that cannot be understood leaves what was there before
// and is quarantined.
func (r *replica) put(k string, value []byte, created int64) {
	hash := r.hash(value)
	if e, ok := r.expected[k]; ok {
		k = e.key // the one that the session keeps too
	}
	if old, ok := r.hashes[k]; ok && old == hash && !strings.HasPrefix(k, sessionsPrefix) {
		return
	}
	if !r.holds(k) {
		return
	}
	r.hashes[k] = hash
	delete(r.quarantine, k)
	delete(r.newer, k)
	if r.takeExpected(k, hash) {
		return
	}
	err := r.take(k, value, created)
	if err == nil {
		return
	}
	r.quarantine[k] = err.Error()
	if errors.Is(err, errNewer) && (strings.HasPrefix(k, clustersPrefix) || strings.HasPrefix(k, byHostPrefix)) {
		r.newer[k] = err.Error()
	}
}

func (r *replica) holds(k string) bool {
	return slices.ContainsFunc(loaded, func(p string) bool { return strings.HasPrefix(k, p) })
}

func (r *replica) take(k string, value []byte, created int64) error {
	switch {
	case strings.HasPrefix(k, recordsPrefix):
		return r.takeRecord(k, value)
	case strings.HasPrefix(k, workloadsPrefix):
		return r.takeWorkloads(k, value)
	case strings.HasPrefix(k, gatewaysPrefix):
		return r.takeGateway(k, value)
	case strings.HasPrefix(k, configPrefix):
		return r.takeObject(k, value)
	case strings.HasPrefix(k, clustersPrefix):
		return r.takeMember(k, value)
	case strings.HasPrefix(k, byHostPrefix):
		return r.takeAddress(k, value)
	case strings.HasPrefix(k, vmsPrefix):
		return r.takeVM(k, value)
	case strings.HasPrefix(k, replicasPrefix):
		return r.takeReplica(k, value)
	case strings.HasPrefix(k, settledPrefix):
		return r.takeSettled(k, value)
	}
	return r.takeSession(k, value, created)
}

func (r *replica) takeRecord(k string, value []byte) error {
	p, err := parts(k, recordsPrefix, 3, 4)
	if err != nil {
		return err
	}
	source, name := federation.SourceID(p[0]), federation.ServiceName{Namespace: p[1], Name: p[2]}
	var head headValue
	var slice sliceState
	if len(p) == 3 {
		if err := decode(value, &head, &head.version); err != nil {
			return err
		}
		head.Source, head.Name, head.Endpoints = source, name, nil
	} else if slice.generation, slice.endpoints, err = decodeSlice(value, &r.names); err != nil {
		return err
	}
	state := r.recordState(source, name)
	state.whole = nil
	if len(p) == 3 {
		head.Labels = r.names.Labels(head.Labels)
		state.head = &headState{head.Generation, &head.Record}
	} else {
		slice.name = p[3]
		state.setSlice(&slice)
	}
	r.dirtyRecord(source, name)
	return nil
}

func (r *replica) recordState(source federation.SourceID, name federation.ServiceName) *recordState {
	byName := r.records[source]
	if byName == nil {
		byName = map[federation.ServiceName]*recordState{}
		r.records[source] = byName
	}
	state := byName[name]
	if state == nil {
		state = &recordState{}
		byName[name] = state
	}
	return state
}

// dirtyRecord marks a record for assembly, once all events of a revision were taken in.
func (r *replica) dirtyRecord(source federation.SourceID, name federation.ServiceName) {
	r.records[source][name].record = nil
	r.dirtyServices[name] = true
}

func (r *replica) takeGateway(k string, value []byte) error {
	p, err := parts(k, gatewaysPrefix, 3, 3)
	if err != nil {
		return err
	}
	var v gatewayValue
	if err := decode(value, &v, &v.version); err != nil {
		return err
	}
	v.Network, v.Source, v.Name = federation.Network(p[0]), federation.SourceID(p[1]), p[2]
	r.gateways[k] = &v.Gateway
	r.dirtyGateways = true
	return nil
}

func (r *replica) takeObject(k string, value []byte) error {
	p, err := parts(k, configPrefix, 4, 4)
	if err != nil {
		return err
	}
	var v objectValue
	if err := decode(value, &v, &v.version); err != nil {
		return err
	}
	v.Object.Raw = v.Raw
	v.Source, v.Namespace, v.Name = federation.SourceID(p[0]), p[2], p[3]
	r.objects[k] = &v.Object
	r.dirtyObjects = true
	return nil
}

// memberValue is a member without its conditions.
type memberValue struct {
	version
	registry.Member
}

type conditionsValue struct {
	version
	Conditions []federation.Condition `json:"conditions"`
}

func (r *replica) takeMember(k string, value []byte) error {
	p, err := parts(k, clustersPrefix, 1, 2)
	if err != nil {
		return err
	}
	id := federation.ClusterID(p[0])
	var v memberValue
	var c conditionsValue
	switch {
	case len(p) == 1:
		err = decode(value, &v, &v.version)
		if err != nil && (!errors.Is(err, errNewer) || v.Name == "") {
			return err // a newer one that can be read is still served
		}
		v.ID, v.Conditions = id, nil
	case p[1] == "conditions":
		if err := decode(value, &c, &c.version); err != nil {
			return err
		}
	case p[1] == "credentials":
		var v version
		r.dirtyMembers = true
		if err := decode(value, &v, &v); err != nil {
			return err
		}
		r.secrets[id] = slices.Clone(value) // sealed: opened when it is needed
		return nil
	default:
		return fmt.Errorf("unknown part %q of a cluster", p[1])
	}
	state := r.members[id]
	if state == nil {
		state = &memberState{}
		r.members[id] = state
	}
	if len(p) == 1 {
		state.member, state.raw = &v.Member, slices.Clone(value)
	} else {
		state.conditions = c.Conditions
	}
	r.dirtyMembers = true
	return err
}

type addressValue struct {
	version
	federation.VirtualAddress
}

func (r *replica) takeAddress(k string, value []byte) error {
	p, err := parts(k, byHostPrefix, 1, 1)
	if err != nil {
		return err
	}
	var v addressValue
	err = decode(value, &v, &v.version)
	if err != nil && !errors.Is(err, errNewer) {
		return err
	}
	v.Host = p[0]
	r.addresses[v.Host] = v.VirtualAddress
	r.dirtyAddrs = true
	return err
}

type vmValue struct {
	version
	registry.VM
}

type vmHealthValue struct {
	version
	registry.VMHealth
}

func (r *replica) takeVM(k string, value []byte) error {
	p, err := parts(k, vmsPrefix, 2, 3)
	if err != nil {
		return err
	}
	name := registry.VMName{Network: federation.Network(p[0]), Name: p[1]}
	var v vmValue
	var h vmHealthValue
	part := ""
	if len(p) == 3 {
		part = p[2]
	}
	switch part {
	case "":
		err = decode(value, &v, &v.version)
	case "health":
		err = decode(value, &h, &h.version)
	case "present":
	default:
		err = fmt.Errorf("unknown part %q of a VM", part)
	}
	if err != nil {
		return err
	}
	state := r.vms[name]
	if state == nil {
		state = &vmState{}
		r.vms[name] = state
	}
	switch part {
	case "":
		v.VM.Network, v.VM.Name = name.Network, name.Name
		state.vm, state.raw = &v.VM, slices.Clone(value)
	case "health":
		state.health = &h.VMHealth
	case "present":
		state.present = true
	}
	r.dirtyVMs = true
	return nil
}

type sessionValue struct {
	version
	Holder string `json:"holder"`
}

func (r *replica) takeSession(k string, value []byte, created int64) error {
	p, err := parts(k, sessionsPrefix, 1, 1)
	if err != nil {
		return err
	}
	var v sessionValue
	err = decode(value, &v, &v.version)
	r.sessions[federation.SourceID(p[0])] = sessionState{created: created, holder: v.Holder}
	return err
}

type settledValue struct {
	version
	Session int64 `json:"session"` // its key's create revision
}

func (r *replica) takeSettled(k string, value []byte) error {
	p, err := parts(k, settledPrefix, 1, 1)
	if err != nil {
		return err
	}
	var v settledValue
	if err := decode(value, &v, &v.version); err != nil {
		return err
	}
	r.settled[federation.SourceID(p[0])] = v.Session
	return nil
}

func (r *replica) takeReplica(k string, value []byte) error {
	p, err := parts(k, replicasPrefix, 1, 1)
	if err != nil {
		return err
	}
	var v replicaValue
	err = decode(value, &v, &v.version)
	if err != nil && !errors.Is(err, errNewer) {
		return err
	}
	if v.AdminAddress == "" {
		return errors.Join(err, errors.New("a replica without adminAddress"))
	}
	v.Name = p[0]
	r.replicas[v.Name] = v.Replica
	return err
}

// remove forgets one key.
func (r *replica) remove(k string) {
	if _, ok := r.hashes[k]; !ok {
		return
	}
	delete(r.hashes, k)
	delete(r.quarantine, k)
	delete(r.newer, k)
	switch {
	case strings.HasPrefix(k, recordsPrefix):
		r.removeRecord(k)
	case strings.HasPrefix(k, workloadsPrefix):
		r.setBundle(k, nil)
	case strings.HasPrefix(k, gatewaysPrefix):
		delete(r.gateways, k)
		r.dirtyGateways = true
	case strings.HasPrefix(k, configPrefix):
		delete(r.objects, k)
		r.dirtyObjects = true
	case strings.HasPrefix(k, clustersPrefix):
		r.removeMember(k)
	case strings.HasPrefix(k, byHostPrefix):
		if p, err := parts(k, byHostPrefix, 1, 1); err == nil {
			delete(r.addresses, p[0])
			r.dirtyAddrs = true
		}
	case strings.HasPrefix(k, vmsPrefix):
		r.removeVM(k)
	case strings.HasPrefix(k, sessionsPrefix):
		if p, err := parts(k, sessionsPrefix, 1, 1); err == nil {
			delete(r.sessions, federation.SourceID(p[0]))
		}
	case strings.HasPrefix(k, settledPrefix):
		if p, err := parts(k, settledPrefix, 1, 1); err == nil {
			delete(r.settled, federation.SourceID(p[0]))
		}
	case strings.HasPrefix(k, replicasPrefix):
		if p, err := parts(k, replicasPrefix, 1, 1); err == nil {
			delete(r.replicas, p[0])
		}
	}
}

func (r *replica) removeRecord(k string) {
	p, err := parts(k, recordsPrefix, 3, 4)
	if err != nil {
		return
	}
	source, name := federation.SourceID(p[0]), federation.ServiceName{Namespace: p[1], Name: p[2]}
	state := r.records[source][name]
	if state == nil {
		return
	}
	state.whole = nil
	if len(p) == 3 {
		state.head = nil
	} else {
		state.dropSlice(p[3])
	}
	r.dirtyRecord(source, name)
	if state.head == nil && len(state.slices) == 0 {
		delete(r.records[source], name)
		if len(r.records[source]) == 0 {
			delete(r.records, source)
		}
	}
}

func (r *replica) removeMember(k string) {
	p, err := parts(k, clustersPrefix, 1, 2)
	if err != nil {
		return
	}
	id := federation.ClusterID(p[0])
	if len(p) == 2 && p[1] == "credentials" {
		delete(r.secrets, id)
	}
	state := r.members[id]
	if state == nil {
		return
	}
	switch {
	case len(p) == 1:
		state.member, state.raw = nil, nil
	case p[1] == "conditions":
		state.conditions = nil
	}
	if state.member == nil && state.conditions == nil {
		delete(r.members, id)
	}
	r.dirtyMembers = true
}

func (r *replica) removeVM(k string) {
	p, err := parts(k, vmsPrefix, 2, 3)
	if err != nil {
		return
	}
	name := registry.VMName{Network: federation.Network(p[0]), Name: p[1]}
	state := r.vms[name]
	if state == nil {
		return
	}
	switch {
	case len(p) == 2:
		state.vm, state.raw = nil, nil
	case p[2] == "health":
		state.health = nil
	case p[2] == "present":
		state.present = false
	}
	if state.vm == nil && state.health == nil && !state.present {
		delete(r.vms, name)
	}
	r.dirtyVMs = true
}

// publish makes the next snapshot, which shares with the last one all that is not dirty;
// false if nothing that anybody can see has changed.
func (r *replica) publish() bool {
	if len(r.dirtyServices) == 0 && !r.dirtyMembers && !r.dirtyWork && !r.dirtyShown && !r.dirtyGateways &&
		!r.dirtyObjects && !r.dirtyAddrs && !r.dirtyVMs {
		return false
	}
	next := *r.snapshot
	next.Revision = federation.Revision(r.revision)
	var change federation.Change
	if len(r.dirtyServices) > 0 {
		next.Records = r.publishRecords(next.Records)
		change.Services = slices.Collect(maps.Keys(r.dirtyServices))
		clear(r.dirtyServices)
	}
	if r.dirtyMembers {
		next.Clusters = r.publishMembers()
	}
	if r.dirtyWork || r.dirtyShown {
		known := false
		next.Workloads, change.Workloads, known = r.publishWorkloads()
		change.AnyWorkload = !known
	}
	if r.dirtyGateways {
		next.Gateways = r.publishGateways()
	}
	if r.dirtyObjects {
		next.Objects = r.publishObjects()
	}
	if r.dirtyAddrs {
		next.Addresses = maps.Clone(r.addresses)
	}
	if r.dirtyVMs {
		r.publishVMs()
	}
	r.dirtyMembers, r.dirtyWork, r.dirtyShown, r.dirtyGateways, r.dirtyObjects, r.dirtyAddrs, r.dirtyVMs = false, false, false, false, false, false, false
	r.history.Append(&next, change)
	r.snapshot = &next
	return true
}

func (r *replica) publishRecords(last map[federation.ServiceName][]*federation.Record) map[federation.ServiceName][]*federation.Record {
	next := maps.Clone(last)
	for name := range r.dirtyServices {
		var list []*federation.Record
		for source := range r.records {
			if record := r.recordOf(source, name); record != nil {
				list = append(list, record)
			}
		}
		for source, e := range r.exposed {
			if record := e.shown.Records[name]; record != nil && r.records[source] == nil {
				list = append(list, record)
			}
		}
		if len(list) == 0 {
			delete(next, name)
			continue
		}
		slices.SortFunc(list, func(a, b *federation.Record) int {
			return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Source, b.Source))
		})
		next[name] = list
	}
	return next
}

func (r *replica) publishMembers() map[federation.ClusterID]*federation.Cluster {
	clusters := make(map[federation.ClusterID]*federation.Cluster, len(r.members))
	r.memberViews = make(map[federation.ClusterID]*registry.Member, len(r.members))
	for id, state := range r.members {
		if state.member == nil {
			continue
		}
		m := state.member.Clone()
		m.Conditions = state.conditions
		m.CredentialsVersion = r.hashes[credentialsKey(id)]
		r.memberViews[id] = m
		clusters[id] = &m.Cluster
	}
	return clusters
}

func (r *replica) publishGateways() map[federation.Network][]*federation.Gateway {
	next := map[federation.Network][]*federation.Gateway{}
	for _, g := range r.gateways {
		if e := r.exposed[g.Source]; e == nil || e.shown.Gateways == nil {
			next[g.Network] = append(next[g.Network], g)
		}
	}
	for _, e := range r.exposed {
		for _, g := range e.shown.Gateways {
			next[g.Network] = append(next[g.Network], g)
		}
	}
	for _, list := range next {
		slices.SortFunc(list, func(a, b *federation.Gateway) int {
			return cmp.Or(cmp.Compare(a.Source, b.Source), cmp.Compare(a.Name, b.Name))
		})
	}
	return next
}

func (r *replica) publishObjects() []*federation.Object {
	next := make([]*federation.Object, 0, len(r.objects))
	for k, o := range r.objects {
		if !r.hidesObject(k, o.Source) {
			next = append(next, o)
		}
	}
	for _, e := range r.exposed {
		for _, objects := range e.shown.Objects {
			next = slices.AppendSeq(next, maps.Values(objects))
		}
	}
	slices.SortFunc(next, func(a, b *federation.Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name),
			a.Created.Compare(b.Created), cmp.Compare(a.Source, b.Source), cmp.Compare(a.APIVersion, b.APIVersion))
	})
	return next
}

func (r *replica) publishVMs() {
	r.vmViews = make(map[registry.VMName]*registry.VM, len(r.vms))
	for name, state := range r.vms {
		if state.vm == nil {
			continue
		}
		vm := *state.vm
		vm.Health, vm.Present = state.health, state.present
		r.vmViews[name] = &vm
	}
}
