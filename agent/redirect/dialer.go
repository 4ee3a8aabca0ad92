// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dialer returns a dialer whose connections, name lookups included, are not
// captured by Rules. Without the right to mark sockets it relies on running as
// Envoy's user, which is not captured either.
func Dialer(timeout time.Duration) *net.Dialer {
	marked := &net.Dialer{Timeout: timeout, Control: Control}
	return &net.Dialer{
		Timeout: timeout,
		Control: Control,
		Resolver: &net.Resolver{
			PreferGo: true,
			Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
				return marked.DialContext(ctx, network, address)
			},
		},
	}
}

// Control marks a socket before it is connected; use it in net.Dialer and
// net.ListenConfig.
func Control(_, _ string, raw syscall.RawConn) error {
	var marking error
	err := raw.Control(func(fd uintptr) {
		marking = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, Mark)
	})
	if errors.Is(marking, unix.EPERM) {
		marking = nil // see Dialer
	}
	return errors.Join(err, marking)
}
