// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/federation"
	"pgregory.net/rapid"
)

func TestDamper(t *testing.T) {
	t.Parallel()
	key := WeightKey{Service: ServiceName{Namespace: "shop", Name: "cart"}, Port: 80, Network: "n2"}
	start := time.Unix(1000, 0)
	var d Damper
	for _, step := range []struct {
		story string
		at    time.Duration
		ready uint32
		want  uint32
		due   bool
	}{
		{"from zero at once", 0, 100, 100, false},
		{"quick changes wait", 100 * time.Millisecond, 120, 100, true},
		{"until the second is over", time.Second, 120, 120, false},
		{"small ones are none", 5 * time.Second, 125, 120, false},
		{"five per cent is a change", 6 * time.Second, 126, 126, false},
		{"held back", 6500 * time.Millisecond, 50, 126, true},
		{"and taken back", 6600 * time.Millisecond, 127, 126, false},
		{"to zero at once", 6700 * time.Millisecond, 0, 0, false},
		{"and back at once", 6800 * time.Millisecond, 1, 1, false},
	} {
		now := start.Add(step.at)
		if got := d.Weight(now, key, step.ready); got != step.want {
			t.Fatalf("%s: weight %d, want %d", step.story, got, step.want)
		}
		if _, due := d.Next(); due != step.due {
			t.Fatalf("%s: something is held back: %t", step.story, due)
		}
	}
	d.Weight(start.Add(6900*time.Millisecond), key, 9)
	if due := d.Due(start.Add(7799 * time.Millisecond)); len(due) != 0 {
		t.Errorf("due too early: %v", due)
	}
	if due := d.Due(start.Add(7800 * time.Millisecond)); len(due) != 1 || due[0] != key {
		t.Errorf("due: %v", due)
	}
	d.Forget(func(WeightKey) bool { return false })
	if _, due := d.Next(); due {
		t.Error("forgot nothing")
	}
}

// Whatever happens behind a gateway: the weight sent changes at most once a second and by
// at least 5 %, is zero exactly when nothing is there, and is within 5 % of the truth once
// the world has been quiet for a second.
func TestDamperKeepsItsWord(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var d Damper
		var key WeightKey
		now, changed := time.Unix(1000, 0), time.Time{}
		sent, ready := uint32(0), uint32(0)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 1500).Draw(t, "ms")) * time.Millisecond)
			ready = uint32(rapid.IntRange(0, 50).Draw(t, "ready"))
			got := d.Weight(now, key, ready)
			if (got == 0) != (ready == 0) {
				t.Fatalf("%d ready, sent %d", ready, got)
			}
			if got != sent && got != 0 && sent != 0 {
				if now.Sub(changed) < time.Second {
					t.Fatalf("changed after %s", now.Sub(changed))
				}
				if diff := max(got, sent) - min(got, sent); diff*100 < 5*sent {
					t.Fatalf("changed from %d to %d", sent, got)
				}
			}
			if got != sent {
				sent, changed = got, now
			}
		}
		got := d.Weight(now.Add(time.Second), key, ready)
		if diff := max(got, ready) - min(got, ready); diff*100 >= 5*max(1, got) && diff > 0 {
			t.Fatalf("settled at %d of %d", got, ready)
		}
	})
}
