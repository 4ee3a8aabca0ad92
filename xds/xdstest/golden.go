// SPDX-License-Identifier: Apache-2.0

package xdstest

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/xds"
)

// Golden compares resources with those that a file remembers: a line for each with type,
// name, version and size. Versions are hashes of the encoding, so another line is bytes
// that every proxy is sent again when it meets the new program: of that, an upgrade should
// know. With update it writes the file instead.
func Golden(t *testing.T, path string, update bool, resources map[string]xds.Resources) {
	t.Helper()
	var out strings.Builder
	for _, whose := range slices.Sorted(maps.Keys(resources)) {
		fmt.Fprintf(&out, "# %s\n", whose)
		for _, typeURL := range slices.Sorted(maps.Keys(resources[whose])) {
			for _, r := range resources[whose][typeURL] {
				fmt.Fprintf(&out, "%s %s %s %d\n", typeURL[strings.LastIndexByte(typeURL, '.')+1:], r.Name, r.Version, len(r.Body))
			}
		}
	}
	if update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	is, old := strings.Split(out.String(), "\n"), strings.Split(string(was), "\n")
	for _, line := range old {
		if !slices.Contains(is, line) {
			t.Errorf("%s: no more: %s", path, line)
		}
	}
	for _, line := range is {
		if !slices.Contains(old, line) {
			t.Errorf("%s: new: %s", path, line)
		}
	}
	if out.String() != string(was) {
		t.Errorf("%s is not what is made now: every proxy will be sent that again; if it is meant, run this test with -update", path)
	}
}
