// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"fmt"
	"sync"
	"time"
)

// maxReplay bounds the memory of tokens: about 20 MB.
const maxReplay = 100_000

// replay remembers with which key each token was first used, so that a token that leaked is of no use to anybody
// who has not the key. It is the memory of this replica.
type replay struct {
	mu     sync.Mutex
	tokens map[string]boundToken // by digest
}

type boundToken struct {
	thumbprint string
	until      time.Time
}

// bind succeeds for the first key of a token, and from then on for that key.
func (r *replay) bind(token, thumbprint string, expires, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if have, ok := r.tokens[token]; ok {
		if have.thumbprint != thumbprint {
			return fmt.Errorf("%w: keep the key across restarts, or wait for a new token", ErrReplayed)
		}
		return nil
	}
	if r.tokens == nil {
		r.tokens = make(map[string]boundToken)
	}
	if len(r.tokens) >= maxReplay {
		r.evict(now)
	}
	r.tokens[token] = boundToken{thumbprint, expires.Add(leeway)}
	return nil
}

// evict drops what has expired, or if that is nothing, what expires first.
func (r *replay) evict(now time.Time) {
	var oldest string
	for token, b := range r.tokens {
		if now.After(b.until) {
			delete(r.tokens, token)
		} else if oldest == "" || b.until.Before(r.tokens[oldest].until) {
			oldest = token
		}
	}
	if len(r.tokens) >= maxReplay {
		delete(r.tokens, oldest)
	}
}
