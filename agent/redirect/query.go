// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// portRange is where the kernel takes the ports of sockets that ask for none.
const portRange = "/proc/sys/net/ipv4/ip_local_port_range"

// QueryDialer returns what dials resolvers past the redirection. Its UDP sockets have
// ports that the kernel gives to nobody: connection tracking remembers a query that was
// not redirected for half a minute, and the workload's own query from the same port to the
// same resolver would not be redirected either.
func QueryDialer(timeout time.Duration) func(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := Dialer(timeout)
	text, err := os.ReadFile(portRange)
	ports := spare(32768, 60999)
	if err == nil {
		if low, high, err := parsePorts(string(text)); err == nil {
			ports = spare(low, high)
		}
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if !strings.HasPrefix(network, "udp") || len(ports) == 0 {
			return dialer.DialContext(ctx, network, address)
		}
		for range 16 {
			one := *dialer
			one.LocalAddr = &net.UDPAddr{Port: ports[rand.IntN(len(ports))]}
			conn, err := one.DialContext(ctx, network, address)
			if !errors.Is(err, syscall.EADDRINUSE) {
				return conn, err
			}
		}
		return dialer.DialContext(ctx, network, address)
	}
}

// lowestSpare keeps off the ports that programs like to listen on.
const lowestSpare = 20000

// spare lists the ports around the kernel's range.
func spare(low, high int) []int {
	var ports []int
	for p := lowestSpare; p <= 65535; p++ {
		if p < low || p > high {
			ports = append(ports, p)
		}
	}
	return ports
}

// parsePorts reads the kernel's range.
func parsePorts(text string) (low, high int, err error) {
	if _, err := fmt.Sscan(text, &low, &high); err != nil {
		return 0, 0, fmt.Errorf("%s: %q: %w", portRange, text, err)
	}
	if low < 1 || high < low || high > 65535 {
		return 0, 0, fmt.Errorf("%s: %q: want two ports, the lower one first", portRange, text)
	}
	return low, high, nil
}
