// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net"
	"os"
)

// notify tells systemd about the state of the service, as sd_notify(3) does.
// Without systemd it does nothing.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if path[0] == '@' {
		path = "\x00" + path[1:]
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = conn.Write([]byte(state)) // systemd's time-outs show if it got lost
}
