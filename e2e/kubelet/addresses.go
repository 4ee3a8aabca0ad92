// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"fmt"
	"net/netip"
	"sync"
)

// addresses hands out the pod addresses of one range. An address that was given
// back is reused only after the rest of the range, as real networks do.
type addresses struct {
	mu    sync.Mutex
	pods  netip.Prefix
	next  netip.Addr
	taken map[netip.Addr]bool
}

// newAddresses leaves out the first two addresses (network and gateway) and an IPv4 broadcast address.
func newAddresses(pods netip.Prefix) *addresses {
	pods = pods.Masked()
	return &addresses{pods: pods, next: firstPod(pods), taken: map[netip.Addr]bool{}}
}

func firstPod(pods netip.Prefix) netip.Addr { return pods.Addr().Next().Next() }

// take gives the next free address.
func (a *addresses) take() (netip.Addr, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for wrapped := false; ; {
		addr := a.next
		if !a.usable(addr) {
			if wrapped {
				return netip.Addr{}, fmt.Errorf("pod range %s: all addresses are taken", a.pods)
			}
			wrapped = true
			a.next = firstPod(a.pods)
			continue
		}
		a.next = addr.Next()
		if !a.taken[addr] {
			a.taken[addr] = true
			return addr, nil
		}
	}
}

// usable reports whether a pod may have addr; an IPv4 broadcast address it may not.
func (a *addresses) usable(addr netip.Addr) bool {
	return a.pods.Contains(addr) && (!addr.Is4() || a.pods.Contains(addr.Next()))
}

// takeFixed takes a given address.
func (a *addresses) takeFixed(addr netip.Addr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.taken[addr] {
		return fmt.Errorf("address %s: another pod has it", addr)
	}
	a.taken[addr] = true
	return nil
}

// give makes an address available again.
func (a *addresses) give(addr netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.taken, addr)
}
