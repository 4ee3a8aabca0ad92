// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"net"
	"os"
	"testing"
	"time"
)

func TestQueriesComeFromPortsThatTheKernelGivesToNobody(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(portRange)
	if err != nil {
		t.Fatal(err)
	}
	low, high, err := parsePorts(string(text))
	if err != nil {
		t.Fatal(err)
	}
	dial := QueryDialer(time.Second)
	for range 200 {
		conn, err := dial(t.Context(), "udp", "127.0.0.1:53")
		if err != nil {
			t.Fatal(err)
		}
		port := conn.LocalAddr().(*net.UDPAddr).Port
		if port >= low && port <= high {
			t.Errorf("port %d is within %d to %d, where a workload's query may come from", port, low, high)
		}
		conn.Close()
	}
}

func TestWithoutSparePortsTheKernelChooses(t *testing.T) {
	t.Parallel()
	if ports := spare(1, 65535); len(ports) != 0 {
		t.Errorf("%d ports", len(ports))
	}
	for _, text := range []string{"", "1", "9 8", "0 5", "1 70000"} {
		if _, _, err := parsePorts(text); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
}

func FuzzParsePorts(f *testing.F) {
	f.Add("32768\t60999\n")
	f.Fuzz(func(t *testing.T, text string) {
		if low, high, err := parsePorts(text); err == nil && (low < 1 || high > 65535 || low > high) {
			t.Errorf("%q: %d to %d", text, low, high)
		}
	})
}
