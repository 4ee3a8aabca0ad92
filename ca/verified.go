// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509"
	"runtime"
	"slices"
	"sync"
	"time"
	"weak"
)

// verified remembers chains that led to the present roots, as long as somebody has them: a connection keeps its
// peer's, and asks again with every call. Two signatures are checked once then, not each time; whether the chain
// has expired or was revoked is still looked at each time.
type verified struct {
	mu     sync.Mutex
	roots  *x509.CertPool // what they led to
	leaves map[weak.Pointer[x509.Certificate]]verifiedChain
}

// verifiedChain is what was found out. It holds no certificate, or none would ever be forgotten.
type verifiedChain struct {
	above    []weak.Pointer[x509.Certificate]
	identity Identity
	from, to time.Time // while every certificate of the path is valid
}

// maxVerified bounds what is remembered at once.
const maxVerified = 100_000

// get gives the identity of a chain that was verified against these roots.
func (v *verified) get(roots *x509.CertPool, chain []*x509.Certificate, now time.Time) (Identity, bool) {
	if len(chain) == 0 {
		return Identity{}, false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.roots != roots {
		return Identity{}, false
	}
	c, ok := v.leaves[weak.Make(chain[0])]
	if !ok || now.Before(c.from) || now.After(c.to) || !slices.Equal(c.above, pointers(chain[1:])) {
		return Identity{}, false
	}
	return c.identity, true
}

// put remembers a chain, whose path to a root is valid from and to.
func (v *verified) put(roots *x509.CertPool, chain []*x509.Certificate, identity Identity, from, to time.Time) {
	leaf := weak.Make(chain[0])
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.roots != roots || v.leaves == nil || len(v.leaves) >= maxVerified {
		v.roots, v.leaves = roots, make(map[weak.Pointer[x509.Certificate]]verifiedChain)
	}
	if _, known := v.leaves[leaf]; !known {
		runtime.AddCleanup(chain[0], v.forget, leaf)
	}
	v.leaves[leaf] = verifiedChain{pointers(chain[1:]), identity, from, to}
}

func (v *verified) forget(leaf weak.Pointer[x509.Certificate]) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.leaves, leaf)
}

func pointers(chain []*x509.Certificate) []weak.Pointer[x509.Certificate] {
	out := make([]weak.Pointer[x509.Certificate], len(chain))
	for i, cert := range chain {
		out[i] = weak.Make(cert)
	}
	return out
}
