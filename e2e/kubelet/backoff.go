// SPDX-License-Identifier: Apache-2.0

package kubelet

import "time"

// Backoff says how long a container waits before it is started again.
type Backoff struct {
	First time.Duration // before the first restart; zero means 1 s. It doubles from one to the next.
	Max   time.Duration // the longest wait; zero means 10 s. A container that ran twice as long begins anew.
}

func (b Backoff) withDefaults() Backoff {
	if b.First == 0 {
		b.First = time.Second
	}
	if b.Max == 0 {
		b.Max = 10 * time.Second
	}
	return b
}

// next gives the wait after a run of length ran that followed a wait of last.
func (b Backoff) next(last, ran time.Duration) time.Duration {
	if last == 0 || ran >= 2*b.Max {
		return min(b.First, b.Max)
	}
	return min(2*last, b.Max)
}
