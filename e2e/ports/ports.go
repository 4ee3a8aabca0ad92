// SPDX-License-Identifier: Apache-2.0

// Package ports gives tests ports of loopback that stay theirs until they end.
//
// A port that the kernel gives away and that is closed again may be anybody's a moment
// later: the local end of some connection, or the port of another test. These here are of
// a range that the kernel gives to nobody, and tests that run at the same time, also in
// other processes, keep out of each other's way by the name of a socket.
package ports

import (
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
)

// The range is below what Linux gives away by itself (net.ipv4.ip_local_port_range begins
// at 32768), and above what well-known services and the project itself use.
const (
	first = 20000
	last  = 31999
)

// Free returns a port of 127.0.0.1 that nobody listens on, neither by TCP nor by UDP, and
// that no other caller is given before the test has ended.
func Free(t testing.TB) int {
	t.Helper()
	begin := rand.IntN(last - first + 1)
	for i := range last - first + 1 {
		if port := first + (begin+i)%(last-first+1); take(t, port) {
			return port
		}
	}
	t.Fatalf("no port of 127.0.0.1 from %d to %d is free", first, last)
	return 0
}

// take claims a port by an abstract socket, which ends with the process at the latest.
func take(t testing.TB, port int) bool {
	claim, err := net.Listen("unix", fmt.Sprintf("@isthmus-test-port-%d", port))
	if err != nil {
		return false
	}
	if !unused(port) {
		claim.Close()
		return false
	}
	t.Cleanup(func() { claim.Close() })
	return true
}

// unused tells whether all of a port can be had, as servers take it.
func unused(port int) bool {
	stream, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return false
	}
	defer stream.Close()
	packets, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
	if err != nil {
		return false
	}
	packets.Close()
	return true
}
