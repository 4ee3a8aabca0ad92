// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/isthmus-mesh/isthmus/registry"
)

func TestInternerSharesWhatIsEqual(t *testing.T) {
	t.Parallel()
	var in registry.Interner
	a, b := in.String(strings.Repeat("x", 3)), in.String(strings.Repeat("x", 3))
	if a != "xxx" || unsafe.StringData(a) != unsafe.StringData(b) {
		t.Errorf("%q and %q are two strings", a, b)
	}
	one := in.Labels(map[string]string{"app": "web", "version": "v1"})
	two := in.Labels(map[string]string{"version": "v1", "app": "web"})
	other := in.Labels(map[string]string{"version": "app", "web": "v1"})
	one["mark"] = "x" // only to see whether it is the same map
	if two["mark"] != "x" || other["mark"] != "" || len(other) != 2 {
		t.Errorf("got %v, %v, %v", one, two, other)
	}
	if in.Labels(nil) != nil || in.Labels(map[string]string{}) != nil || in.String("") != "" {
		t.Error("nothing is something")
	}
}

func TestInternerStaysRightWhenItBeginsAnew(t *testing.T) {
	t.Parallel()
	var in registry.Interner
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 20_000 {
				s := fmt.Sprintf("%d-%d", w, i)
				set := map[string]string{"k": s}
				if in.String(s) != s || !maps.Equal(in.Labels(set), set) {
					t.Errorf("%q became something else", s)
					return
				}
			}
		})
	}
	wg.Wait()
}
