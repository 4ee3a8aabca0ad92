// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/xds"
)

// lists of few names and versions, so that they have much in common.
var someList = rapid.Custom(func(t *rapid.T) []xds.Resource {
	versions := rapid.MapOfN(rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f"}), rapid.SampledFrom([]string{"1", "2"}), 0, 6).Draw(t, "versions")
	var out []xds.Resource
	for _, name := range slices.Sorted(maps.Keys(versions)) {
		out = append(out, xds.Resource{Name: name, Version: versions[name]})
	}
	return out
})

func versions(list []xds.Resource) map[string]string {
	out := map[string]string{}
	for _, r := range list {
		out[r.Name] = r.Version
	}
	return out
}

func TestADifferenceMakesOneListOfAnother(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		from, to := someList.Draw(t, "from"), someList.Draw(t, "to")
		known := &differences{}
		d := known.between(from, to)
		if known.between(from, to) != d {
			t.Fatal("worked out twice")
		}
		got := versions(from)
		for _, r := range d.changed {
			if got[r.Name] == r.Version {
				t.Fatalf("%s has not changed", r.Name)
			}
			got[r.Name] = r.Version
		}
		for _, n := range d.gone {
			delete(got, n)
		}
		if want := versions(to); !maps.Equal(got, want) {
			t.Fatalf("%v, want %v", got, want)
		}
	})
}

func TestAHoldingIsWhatWasPutIntoIt(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var h holding
		model := map[string]string{}
		t.Repeat(map[string]func(*rapid.T){
			"rebase": func(t *rapid.T) {
				list := someList.Draw(t, "list")
				h.rebase(list)
				model = versions(list)
			},
			"set": func(t *rapid.T) {
				for _, r := range someList.Draw(t, "some") {
					h.set(r)
					model[r.Name] = r.Version
				}
			},
			"remove": func(t *rapid.T) {
				for _, r := range someList.Draw(t, "some") {
					h.remove(r.Name)
					delete(model, r.Name)
				}
			},
			"": func(t *rapid.T) {
				all := h.among(func(string) bool { return true })
				if got := versions(all); !maps.Equal(got, model) {
					t.Fatalf("holds %v, want %v", got, model)
				}
				if !slices.IsSortedFunc(all, func(a, b xds.Resource) int { return cmpNames(a, b) }) {
					t.Fatalf("not ordered: %v", all)
				}
				for _, n := range []string{"a", "b", "z"} {
					if r, ok := h.get(n); ok != (model[n] != "") || r.Version != model[n] {
						t.Fatalf("%s is %v, want %q", n, r, model[n])
					}
				}
			},
		})
	})
}

func cmpNames(a, b xds.Resource) int {
	return slices.Compare([]string{a.Name}, []string{b.Name})
}

func TestEqualSetsOfNamesAreShared(t *testing.T) {
	t.Parallel()
	known := &differences{}
	var sets [3]names
	for i := range sets {
		for n := range 100 {
			sets[i].put(fmt.Sprintf("name-%d", n*(1+i/2)), true)
		}
		known.share(&sets[i])
		if len(sets[i].except) != 0 || len(sets[i].common) != 100 {
			t.Fatalf("set %d: %d common, %d beside", i, len(sets[i].common), len(sets[i].except))
		}
	}
	if &sets[0].common[0] != &sets[1].common[0] {
		t.Error("equal sets are not shared")
	}
	if &sets[0].common[0] == &sets[2].common[0] {
		t.Error("unequal sets are shared")
	}
	sets[0].put("name-7", false)
	sets[0].put("another", true)
	if sets[0].has("name-7") || !sets[0].has("another") || !sets[1].has("name-7") || sets[1].has("another") {
		t.Error("what one puts in or takes out is its own")
	}
	if n := len(slices.Collect(sets[0].each)); n != 100 {
		t.Errorf("%d names", n)
	}
	sets[0].put("name-7", true)
	sets[0].put("another", false)
	if len(sets[0].except) != 0 {
		t.Errorf("undone, but %v is left", sets[0].except)
	}
}
