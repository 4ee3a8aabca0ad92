// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// follower is a replica: it makes what changes from what it made before.
type follower struct {
	builder *xds.Builder
	view    *federation.View
	index   *config.Index
	classes map[int]xds.Class // of the proxies that it has, as far as it was told of changes
}

// crowd are proxies of several classes. Two of them alternate in being connected.
var crowd = func() []xds.Proxy {
	var out []xds.Proxy
	for i, namespace := range []string{"shop", "shop", "other", "third"} {
		p := client
		p.Namespace, p.Workload.UID = namespace, fmt.Sprint("a", i)
		p.Addresses = []netip.Addr{netip.MustParseAddr(fmt.Sprint("10.1.0.", i+2))}
		out = append(out, p)
	}
	out[3].Addresses = append(out[3].Addresses, netip.MustParseAddr("fd00::1"))
	return out
}()

// TestChangeLogOfAnything plays commits through replicas that believe the change log, and
// that come, go and skip some: each proxy must get the bytes of a full computation.
func TestChangeLogOfAnything(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w, history := newWorld(), &federation.History{}
		held := map[string]bool{} // services that callers must not hear of
		closed := func(k federation.WeightKey) bool { return held[k.Service.Name] }
		replicas := []*follower{{builder: &xds.Builder{Closed: closed}}, {builder: &xds.Builder{Closed: closed}}}
		for step := range rapid.IntRange(2, 15).Draw(t, "steps") {
			before := w.Records
			what := anyChange(t, w)
			if rapid.IntRange(0, 5).Draw(t, "config") == 0 {
				what += " and " + anyConfig(t, w)
			}
			s := w.Snapshot
			s.Revision = federation.Revision(step + 2)
			change := federation.Change{Services: differing(before, s.Records)}
			change.Services = append(change.Services, federation.ServiceName{Namespace: "shop", Name: rapid.SampledFrom([]string{"a", "z"}).Draw(t, "too much")})
			history.Append(&s, change)
			if name := rapid.SampledFrom([]string{"", "", "", "a", "b"}).Draw(t, "held"); name != "" {
				held[name] = !held[name]
				for _, r := range replicas {
					r.builder.Forget(federation.ServiceName{Namespace: "shop", Name: name})
				}
			}
			for i, r := range replicas {
				switch rapid.IntRange(0, 7).Draw(t, "replica") {
				case 0: // it skips this commit
				case 1: // it starts anew
					replicas[i] = &follower{builder: &xds.Builder{Closed: closed}}
					replicas[i].check(t, &s, closed, fmt.Sprintf("step %d, %s, after a restart", step, what))
				default:
					r.check(t, &s, closed, fmt.Sprintf("step %d, %s", step, what))
				}
			}
		}
	})
}

func (r *follower) check(t *rapid.T, s *federation.Snapshot, closed func(federation.WeightKey) bool, what string) {
	r.view, r.index = s.ViewFrom(r.view, client.Scope()), config.NewFrom(r.index, s)
	if r.classes == nil {
		r.classes = map[int]xds.Class{}
	}
	moved, all := r.builder.Moved(r.view, r.index)
	for i, p := range crowd {
		if _, ok := r.classes[i]; all || !ok || slices.Contains(moved, p.Workload) {
			r.classes[i] = r.builder.Class(r.view, r.index, p)
		}
	}
	view, index := s.View(client.Scope()), config.New(s)
	for i, p := range crowd {
		fresh := &xds.Builder{Closed: closed}
		if want := fresh.Class(view, index, p); r.classes[i] != want {
			t.Fatalf("%s: proxy %d is taken for %v, and is %v", what, i, r.classes[i], want)
		}
		if i > 1 && rapid.IntRange(0, 3).Draw(t, "away") == 0 {
			continue
		}
		got, gotFindings := r.builder.BuildClass(r.view, r.index, r.classes[i])
		want, wantFindings := fresh.Build(view, index, p)
		for typeURL := range want {
			if !slices.EqualFunc(got[typeURL], want[typeURL], func(x, y xds.Resource) bool { return x.Name == y.Name && x.Version == y.Version }) {
				t.Fatalf("%s, proxy %d: %s differs", what, i, typeURL)
			}
		}
		if len(got) != len(want) || !slices.Equal(gotFindings, wantFindings) {
			t.Fatalf("%s, proxy %d: other types or findings", what, i)
		}
		again, _ := r.builder.BuildClass(r.view, r.index, r.classes[i])
		if fmt.Sprintf("%p", again) != fmt.Sprintf("%p", got) {
			t.Fatalf("%s, proxy %d: made again without a change", what, i)
		}
	}
}

// differing are the services whose records differ.
func differing(a, b map[federation.ServiceName][]*federation.Record) []federation.ServiceName {
	out := map[federation.ServiceName]bool{}
	for _, one := range []map[federation.ServiceName][]*federation.Record{a, b} {
		for name := range one {
			if !slices.Equal(a[name], b[name]) {
				out[name] = true
			}
		}
	}
	return slices.Collect(maps.Keys(out))
}

// anyConfig writes or removes an object that makes one service depend on another, or
// splits classes.
func anyConfig(t *rapid.T, w *world) string {
	objects := slices.Clone(w.Objects)
	what := rapid.SampledFrom([]string{"route", "route", "rule", "policy", "nothing left"}).Draw(t, "object")
	name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "of")
	to := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "to")
	w.Objects = slices.DeleteFunc(objects, func(o *federation.Object) bool { return o.Name == name })
	switch what {
	case "route":
		w.object("VirtualService", name, fmt.Sprintf(`{"hosts":[%q],"http":[{"route":[{"destination":{"host":%q}}]}]}`, name, to))
	case "rule":
		w.object("DestinationRule", name, fmt.Sprintf(`{"host":%q,"subsets":[{"name":"v1","labels":{"n":"0"}}]}`, name))
	case "policy":
		w.object("PeerAuthentication", name, `{"selector":{"matchLabels":{"n":"0"}},"mtls":{"mode":"DISABLE"}}`)
	default:
		w.Objects = nil
	}
	return what
}

// TestOneChangeIsSharedByAllClasses sees that what does not differ between classes is made
// once, and stays so while things change.
func TestOneChangeIsSharedByAllClasses(t *testing.T) {
	t.Parallel()
	w, history := newWorld(), &federation.History{}
	pay := w.add("east", "pay", http80, "10.1.0.2", "10.1.0.3")
	w.add("east", "cart", http80, "10.1.0.4")
	secret := w.add("east", "secret", http80, "10.1.0.5")
	secret.ExportTo = []string{"."}
	b := &xds.Builder{}
	var view *federation.View
	build := func(namespace string) xds.Resources {
		p := client
		p.Namespace = namespace
		r, _ := b.Build(view, nil, p)
		return r
	}
	commit := func(r *federation.Record, change func(*federation.Record)) {
		s := w.Snapshot
		s.Records = maps.Clone(s.Records)
		if r != nil {
			next := *r
			next.Endpoints = slices.Clone(r.Endpoints)
			change(&next)
			s.Records[r.Name] = []*federation.Record{&next}
		}
		history.Append(&s, federation.Change{Services: []federation.ServiceName{pay.Name, secret.Name}})
		w.Snapshot = s
		view = s.ViewFrom(view, client.Scope())
	}
	same := func(a, b xds.Resources, typeURL string) bool { return &a[typeURL][0] == &b[typeURL][0] }
	commit(nil, nil)
	one, two, shop := build("one"), build("two"), build("shop")
	for range 3 {
		if !same(one, two, xds.EndpointType) || !same(one, two, xds.ClusterType) || !same(one, two, xds.NameTableType) || !same(one, two, xds.ListenerType) {
			t.Error("two classes that see the same do not share it")
		}
		if same(one, shop, xds.EndpointType) {
			t.Error("a class that sees more has the same list")
		}
		before := one
		commit(pay, func(r *federation.Record) {
			r.Endpoints[0].ServiceAccount = fmt.Sprint(len(before[xds.EndpointType]), view.Revision)
		})
		one, two, shop = build("one"), build("two"), build("shop")
	}
	before := build("one")
	commit(secret, func(r *federation.Record) { r.Endpoints[0].Health = federation.NotReady })
	if after := build("one"); fmt.Sprintf("%p", after) != fmt.Sprintf("%p", before) {
		t.Error("a class was made anew for a service that it does not see")
	}
	if after := build("shop"); same(after, shop, xds.EndpointType) {
		t.Error("the class that sees the service has not been told")
	} else if !same(after, shop, xds.ListenerType) {
		t.Error("an endpoint changed the listeners")
	}
}
