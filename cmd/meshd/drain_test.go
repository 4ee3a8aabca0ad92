// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"
)

func TestStreamsAreClosedOverATimeThatOthersCanBear(t *testing.T) {
	t.Parallel()
	for streams, want := range map[int]time.Duration{
		0: 2500 * time.Millisecond, 1000: 2500 * time.Millisecond, 5000: 10 * time.Second, 9500: 19 * time.Second, 100000: 20 * time.Second,
	} {
		if got := drainSpread(streams); got != want {
			t.Errorf("%d streams: %v, want %v", streams, got, want)
		}
	}
}
