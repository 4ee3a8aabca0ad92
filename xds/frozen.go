// SPDX-License-Identifier: Apache-2.0

//go:build race && linux

package xds

import (
	"crypto/sha256"
	"fmt"
	"os"
	"sync"
	"syscall"
)

// ice is where fragments are kept in programs that are built with the race detector, as
// tests are: memory that nobody can write to. Fragments are shared by all proxies and
// sent again and again, so whoever changes one would change what others are told; here he
// is stopped. What has once been frozen stays, equal fragments once.
var ice struct {
	mu     sync.Mutex
	region []byte
	used   int
	known  map[[sha256.Size]byte][]byte
}

// iceSize is how much address space is set aside; memory is taken as it is used.
const iceSize = 16 << 30

func freeze(fragment []byte) []byte {
	if len(fragment) == 0 {
		return fragment
	}
	ice.mu.Lock()
	defer ice.mu.Unlock()
	sum := sha256.Sum256(fragment)
	if known := ice.known[sum]; known != nil {
		return known
	}
	if ice.region == nil {
		region, err := syscall.Mmap(-1, 0, iceSize, syscall.PROT_NONE, syscall.MAP_ANON|syscall.MAP_PRIVATE|syscall.MAP_NORESERVE)
		if err != nil {
			panic(fmt.Sprintf("xds: no memory for frozen fragments: %v", err))
		}
		ice.region, ice.known = region, map[[sha256.Size]byte][]byte{}
	}
	page, start, end := os.Getpagesize(), ice.used, ice.used+len(fragment)
	pages := ice.region[start/page*page : (end+page-1)/page*page]
	protect(pages, syscall.PROT_READ|syscall.PROT_WRITE)
	copy(ice.region[start:end], fragment)
	protect(pages, syscall.PROT_READ)
	frozen := ice.region[start:end:end]
	ice.used, ice.known[sum] = end, frozen
	return frozen
}

func protect(pages []byte, how int) {
	if err := syscall.Mprotect(pages, how); err != nil {
		panic(fmt.Sprintf("xds: protecting frozen fragments: %v", err))
	}
}
