// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"testing"
)

// said is what "go test -json" prints of a test.
func said(action, name, test, output string) string {
	pkg := "github.com/isthmus-mesh/isthmus/" + name
	return fmt.Sprintf("{\"Action\":\"run\",\"Package\":%[2]q,\"Test\":%[3]q}\n{\"Action\":\"output\",\"Package\":%[2]q,\"Test\":%[3]q,\"Output\":%[4]q}\n{\"Action\":%[1]q,\"Package\":%[2]q,\"Test\":%[3]q}\n",
		action, pkg, test, output)
}

func TestTally(t *testing.T) {
	t.Parallel()
	passes := said("pass", "e2e", "TestScripts/leave", "")
	for name, c := range map[string]struct {
		lines string
		again string // what is run again
		print string
	}{
		"all is green": {
			passes + said("skip", "ca", "TestFull", "no /dev/full here\n"),
			"",
			"skipped: ca TestFull: no /dev/full here\n2 tests ran\n1 passed (0 of them flaky), 0 failed, 1 skipped\n",
		},
		"one story fails": {
			passes + said("fail", "e2e", "TestScripts/overlap", "boom\n"),
			"e2e TestScripts/overlap",
			"failed: e2e TestScripts/overlap\n2 tests ran\n1 passed (0 of them flaky), 1 failed, 0 skipped\n",
		},
		"a story panics, and the others did not run": {
			passes + said("fail", "e2e", "TestScripts/overlap", "panic: test timed out\n"),
			"",
			"failed: e2e TestScripts/overlap\n2 tests ran\n1 passed (0 of them flaky), 1 failed, 0 skipped\n",
		},
		"a room's own test fails beside a story": {
			said("fail", "e2e", "TestScripts/overlap", "boom\n") + said("fail", "registry", "TestGrants", "boom\n"),
			"",
			"failed: e2e TestScripts/overlap\nfailed: registry TestGrants\n2 tests ran\n0 passed (0 of them flaky), 2 failed, 0 skipped\n",
		},
		"three stories fail": {
			said("fail", "e2e", "TestScripts/a", "") + said("fail", "e2e", "TestScripts/b", "") + said("fail", "e2e", "TestScripts/c", ""),
			"",
			"failed: e2e TestScripts/a\nfailed: e2e TestScripts/b\nfailed: e2e TestScripts/c\n3 tests ran\n0 passed (0 of them flaky), 3 failed, 0 skipped\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var counted tally
			counted.read(strings.NewReader(c.lines))
			var again []string
			for _, f := range counted.again() {
				again = append(again, f.String())
			}
			if got := strings.Join(again, ", "); got != c.again {
				t.Errorf("runs %q again, want %q", got, c.again)
			}
			var out strings.Builder
			counted.print(&out)
			if out.String() != c.print {
				t.Errorf("prints\n%s, want\n%s", out.String(), c.print)
			}
		})
	}
}

func TestTallySettles(t *testing.T) {
	t.Parallel()
	var counted tally
	counted.settle(failure{name: "e2e", test: "TestScripts/a"}, true)
	counted.settle(failure{name: "e2e", test: "TestScripts/b"}, false)
	var out strings.Builder
	counted.print(&out)
	want := "flaky: e2e TestScripts/a failed, and passed when it was run again; what it said first is above, and is a bug\n" +
		"failed: e2e TestScripts/b\n2 tests ran\n1 passed (1 of them flaky), 1 failed, 0 skipped\n"
	if out.String() != want {
		t.Errorf("prints\n%s, want\n%s", out.String(), want)
	}
}
