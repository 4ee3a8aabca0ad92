// SPDX-License-Identifier: Apache-2.0

package ports

import (
	"fmt"
	"net"
	"testing"
)

func TestAPortIsOneCallersOnly(t *testing.T) {
	t.Parallel()
	seen := map[int]bool{}
	for range 200 {
		port := Free(t)
		if seen[port] || port < first || port > last {
			t.Fatalf("port %d was given before, or is out of range", port)
		}
		seen[port] = true
	}
}

func TestAPortInUseIsNotGiven(t *testing.T) {
	t.Parallel()
	port := Free(t)
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if unused(port) {
		t.Errorf("port %d passes for unused while somebody listens on it", port)
	}
	if take(t, port) {
		t.Errorf("port %d was given twice", port)
	}
}

// Not parallel: the others might be given what this one has just given back.
func TestAPortIsGivenBack(t *testing.T) {
	var port int
	t.Run("one test", func(t *testing.T) { port = Free(t) })
	if !take(t, port) {
		t.Errorf("port %d is not free after its test", port)
	}
}
