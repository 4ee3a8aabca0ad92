// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"net"

	"golang.org/x/sys/unix"
)

// OuterGet asks for a page from where the machine's users are.
func OuterGet(address string) (string, error) {
	dial := func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = onThread(func() error {
			if err := unix.Setns(int(outerNet.Load().Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			conn, err = new(net.Dialer).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
	_, body, err := get(context.Background(), httpClient(dial, nil), "http://"+address+"/")
	return body, err
}
