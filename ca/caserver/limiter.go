// SPDX-License-Identifier: Apache-2.0

package caserver

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// maxLimited bounds how many callers are remembered.
const maxLimited = 100_000

// limiter limits each caller for itself.
type limiter struct {
	every time.Duration
	burst int

	mu      sync.Mutex
	callers map[string]*limited
}

type limited struct {
	limit   *rate.Limiter
	skipped int
}

func newLimiter(every time.Duration, burst int) *limiter {
	return &limiter{every: every, burst: burst, callers: make(map[string]*limited)}
}

func (l *limiter) allow(caller string) bool {
	_, ok := l.allowCounting(caller)
	return ok
}

// allowCounting also tells how many calls were not allowed since the last one that was.
func (l *limiter) allowCounting(caller string) (skipped int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.callers[caller]
	if c == nil {
		if len(l.callers) >= maxLimited {
			l.forget()
		}
		c = &limited{limit: rate.NewLimiter(rate.Every(l.every), l.burst)}
		l.callers[caller] = c
	}
	if !c.limit.Allow() {
		c.skipped++
		return 0, false
	}
	skipped, c.skipped = c.skipped, 0
	return skipped, true
}

// forget drops callers who have all their burst back, and if there are none, everybody.
func (l *limiter) forget() {
	for caller, c := range l.callers {
		if c.limit.Tokens() >= float64(l.burst) {
			delete(l.callers, caller)
		}
	}
	if len(l.callers) >= maxLimited {
		clear(l.callers)
	}
}
