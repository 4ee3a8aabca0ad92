// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// WorkloadsPerKey is how many workloads share a key. A key costs etcd and us some hundred
// bytes of memory whatever its value; a workload that changes writes those beside it too.
const WorkloadsPerKey = 16

// workloadsValue is some workloads of a source. What they have in common stands in tables;
// a workload names the row, and row 0 goes without saying.
type workloadsValue struct {
	version
	Namespaces []string      `json:"ns"`
	Networks   []string      `json:"n"`
	Accounts   []string      `json:"s"`
	Localities [][3]string   `json:"z"`
	Pairs      []string      `json:"k"` // "key=value"
	Labels     [][]int       `json:"l"` // rows of Pairs
	Workloads  []workloadRow `json:"w"`
}

type workloadRow struct {
	UID       string `json:"u"`
	Name      string `json:"w"`
	Namespace int    `json:"ns,omitempty"`
	Role      string `json:"r,omitempty"` // empty means sidecar
	Account   int    `json:"s,omitempty"`
	Network   int    `json:"n,omitempty"`
	Locality  int    `json:"z,omitempty"`
	Addresses string `json:"a,omitempty"` // separated by spaces
	Labels    int    `json:"l,omitempty"`
	Ready     bool   `json:"y,omitempty"`
}

func encodeWorkloads(list []*federation.Workload) ([]byte, error) {
	v := workloadsValue{version: version{schema}}
	namespaces, networks, accounts := map[string]int{}, map[string]int{}, map[string]int{}
	localities, pairs := map[[3]string]int{}, map[string]int{}
	for _, w := range list {
		row := workloadRow{
			UID: w.UID, Name: w.Name, Ready: w.Ready,
			Namespace: intern(namespaces, &v.Namespaces, w.Namespace),
			Account:   intern(accounts, &v.Accounts, w.ServiceAccount),
			Network:   intern(networks, &v.Networks, string(w.Network)),
			Locality:  intern(localities, &v.Localities, [3]string{w.Locality.Region, w.Locality.Zone, w.Locality.Subzone}),
			Addresses: encodeAddresses(w.Addresses),
			Labels:    internLabels(pairs, &v.Pairs, &v.Labels, w.Labels),
		}
		if w.Role != federation.Sidecar {
			row.Role = string(w.Role)
		}
		v.Workloads = append(v.Workloads, row)
	}
	return encode(&v)
}

// decodeWorkloads is the inverse of encodeWorkloads. Names that many workloads have are
// shared.
func decodeWorkloads(data []byte, source federation.SourceID, names *registry.Interner) ([]*federation.Workload, error) {
	var v workloadsValue
	if err := decode(data, &v, &v.version); err != nil {
		return nil, err
	}
	labels, err := decodeLabels(v.Pairs, v.Labels, names)
	if err != nil {
		return nil, err
	}
	list := make([]*federation.Workload, len(v.Workloads))
	for i := range v.Workloads {
		if list[i], err = v.workload(&v.Workloads[i], labels, names); err != nil {
			return nil, fmt.Errorf("workload %d: %w", i, err)
		}
		list[i].Source = source
	}
	return list, nil
}

func (v *workloadsValue) workload(row *workloadRow, labels []map[string]string, names *registry.Interner) (*federation.Workload, error) {
	namespace, err1 := at(v.Namespaces, row.Namespace, "namespace")
	account, err2 := at(v.Accounts, row.Account, "account")
	network, err3 := at(v.Networks, row.Network, "network")
	locality, err4 := at(v.Localities, row.Locality, "locality")
	set, err5 := at(labels, row.Labels, "labels")
	addresses, err6 := decodeAddresses(row.Addresses)
	if err := errors.Join(err1, err2, err3, err4, err5, err6); err != nil {
		return nil, err
	}
	w := &federation.Workload{
		UID: row.UID, Name: row.Name, Namespace: names.String(namespace), ServiceAccount: names.String(account),
		Network: federation.Network(names.String(network)), Locality: internLocality(names, locality),
		Addresses: addresses, Labels: set, Ready: row.Ready, Role: federation.ProxyRole(names.String(row.Role)),
	}
	if w.Role == "" {
		w.Role = federation.Sidecar
	}
	if w.UID == "" {
		return nil, errors.New("without a UID")
	}
	return w, nil
}

func internLocality(names *registry.Interner, row [3]string) federation.Locality {
	return federation.Locality{Region: names.String(row[0]), Zone: names.String(row[1]), Subzone: names.String(row[2])}
}

func encodeAddresses(list []netip.Addr) string {
	var b strings.Builder
	for i, a := range list {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(a.String())
	}
	return b.String()
}

func decodeAddresses(text string) ([]netip.Addr, error) {
	if text == "" {
		return nil, nil
	}
	list := make([]netip.Addr, 0, 1+strings.Count(text, " "))
	for a := range strings.FieldsSeq(text) {
		ip, err := netip.ParseAddr(a)
		if err != nil {
			return nil, err
		}
		list = append(list, ip)
	}
	return list, nil
}

func (r *replica) takeWorkloads(k string, value []byte) error {
	p, err := parts(k, workloadsPrefix, 2, 2)
	if err != nil {
		return err
	}
	list, err := decodeWorkloads(value, federation.SourceID(p[0]), &r.names)
	if err == nil {
		r.setBundle(k, list)
	}
	return err
}

// setBundle replaces the workloads of a key. Those of the snapshot follow when it is
// published: a workload may move from one key to another within a revision.
func (r *replica) setBundle(k string, list []*federation.Workload) {
	if _, noted := r.leaving[k]; !noted {
		r.leaving[k] = r.bundles[k]
	}
	if len(list) == 0 {
		delete(r.bundles, k)
	} else {
		r.bundles[k] = list
	}
	r.dirtyWork = true
}

// gatherWorkloads brings the workloads up to date with the bundles that changed, and tells
// which may have. The map of before is left as it was.
func (r *replica) gatherWorkloads() (changed []federation.WorkloadKey, known bool) {
	if len(r.leaving) == 0 {
		return nil, true
	}
	known = true
	next := maps.Clone(r.workloads)
	for _, list := range r.leaving {
		for _, w := range list {
			k := federation.WorkloadKey{Source: w.Source, UID: w.UID}
			delete(next, k)
			changed = append(changed, k)
		}
	}
	for k := range r.leaving {
		for _, w := range r.bundles[k] {
			k := federation.WorkloadKey{Source: w.Source, UID: w.UID}
			next[k] = w
			changed = append(changed, k)
		}
	}
	total := 0
	for _, list := range r.bundles {
		total += len(list)
	}
	if total != len(next) { // one is in two bundles, or was: damage that the next session mends
		clear(next)
		for _, k := range slices.Sorted(maps.Keys(r.bundles)) {
			for _, w := range r.bundles[k] {
				next[federation.WorkloadKey{Source: w.Source, UID: w.UID}] = w
			}
		}
		known = false
	}
	r.workloads = next
	r.leaving = map[string][]*federation.Workload{}
	return changed, known
}

// takeBundles collects the workloads that are stored for a source. A bundle that cannot be
// right is stale: it is written again with the next level that knows workloads.
func (b *baseline) takeBundles(source federation.SourceID, r *replica) {
	prefix := key(workloadsPrefix, string(source)) + "/"
	seen := map[string]bool{}
	for _, k := range slices.Sorted(maps.Keys(b.hashes)) {
		name, ok := strings.CutPrefix(k, prefix)
		if !ok {
			continue
		}
		if n, err := strconv.Atoi(name); err == nil && n >= b.nextBundle {
			b.nextBundle = n + 1
		}
		_, corrupt := r.quarantine[k]
		b.stale[name] = corrupt || len(r.bundles[k]) == 0
		var list []*federation.Workload
		for _, w := range r.bundles[k] {
			if seen[w.UID] {
				b.stale[name] = true
				continue
			}
			seen[w.UID] = true
			list = append(list, w)
		}
		b.bundles[name] = list
	}
}

// planWorkloads writes the bundles whose workloads changed. Workloads stay where they are;
// new ones go where something changes anyway, then where there is room.
func (b *baseline) planWorkloads(source federation.SourceID, workloads map[string]*federation.Workload, add adder) error {
	if workloads == nil {
		return nil
	}
	next, stored := b.changedBundles(workloads)
	if stored < len(workloads) {
		b.placeWorkloads(next, b.freshWorkloads(workloads))
	}
	for _, name := range slices.Sorted(maps.Keys(next)) {
		g := &group{}
		after := map[string][]*federation.Workload{}
		if err := b.planBundle(g, source, name, next[name], after); err != nil {
			return err
		}
		g.done = func() {
			delete(b.stale, name)
			for name, list := range after {
				if b.bundles[name] = list; len(list) == 0 {
					delete(b.bundles, name)
				}
			}
		}
		add(g, nil)
	}
	return nil
}

// changedBundles are the bundles that are stored otherwise than a level wants them, as it
// wants them, and how many of its workloads are stored at all.
func (b *baseline) changedBundles(workloads map[string]*federation.Workload) (next map[string][]*federation.Workload, stored int) {
	next = map[string][]*federation.Workload{}
	for name, list := range b.bundles {
		changed := b.stale[name]
		for _, w := range list {
			now := workloads[w.UID]
			changed = changed || now != w
			if now != nil {
				stored++
			}
		}
		if !changed {
			continue
		}
		next[name] = nil
		for _, w := range list {
			if now := workloads[w.UID]; now != nil {
				next[name] = append(next[name], now)
			}
		}
	}
	return next, stored
}

// freshWorkloads are those of a level that no bundle has, neighbours beside each other:
// they have much in common.
func (b *baseline) freshWorkloads(workloads map[string]*federation.Workload) []*federation.Workload {
	stored := make(map[string]bool, len(workloads))
	for _, list := range b.bundles {
		for _, w := range list {
			stored[w.UID] = true
		}
	}
	var fresh []*federation.Workload
	for uid, w := range workloads {
		if !stored[uid] {
			fresh = append(fresh, w)
		}
	}
	slices.SortFunc(fresh, func(a, c *federation.Workload) int {
		return cmp.Or(cmp.Compare(a.Namespace, c.Namespace), cmp.Compare(a.Name, c.Name), cmp.Compare(a.UID, c.UID))
	})
	return fresh
}

// placeWorkloads finds a bundle for each of those that have none.
func (b *baseline) placeWorkloads(next map[string][]*federation.Workload, fresh []*federation.Workload) {
	fill := func(name string, list []*federation.Workload) {
		if n := min(WorkloadsPerKey-len(list), len(fresh)); n > 0 {
			next[name] = slices.Concat(list, fresh[:n])
			fresh = fresh[n:]
		}
	}
	for _, name := range slices.Sorted(maps.Keys(next)) {
		fill(name, next[name])
	}
	if len(fresh) == 0 {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(b.bundles)) {
		if _, changes := next[name]; !changes {
			fill(name, b.bundles[name])
		}
	}
	for len(fresh) > 0 {
		fill(b.newBundle(), nil)
	}
}

func (b *baseline) newBundle() string {
	b.nextBundle++
	return strconv.Itoa(b.nextBundle - 1)
}

// planBundle writes one bundle, and moves what is too much for it to others. after is what
// bundles are then.
func (b *baseline) planBundle(g *group, source federation.SourceID, name string, list []*federation.Workload, after map[string][]*federation.Workload) error {
	k := key(workloadsPrefix, string(source)) + "/" + name // as it is: it may be garbage
	if len(list) == 0 {
		if _, ok := b.hashes[k]; ok {
			g.deletes = append(g.deletes, k)
		}
		after[name] = nil
		return nil
	}
	slices.SortFunc(list, func(a, c *federation.Workload) int { return strings.Compare(a.UID, c.UID) })
	value, err := encodeWorkloads(list)
	if err != nil {
		return err
	}
	if len(value) > sliceBytes && len(list) > 1 {
		half := len(list) / 2
		if err := b.planBundle(g, source, name, slices.Clone(list[:half]), after); err != nil {
			return err
		}
		return b.planBundle(g, source, b.newBundle(), slices.Clone(list[half:]), after)
	}
	after[name] = list
	g.put(b, k, value, list)
	return nil
}
