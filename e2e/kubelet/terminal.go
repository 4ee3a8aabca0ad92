// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// terminal is a pseudo terminal, see pty(7).
type terminal struct {
	outside *os.File // the side of the person
	inside  *os.File // the side of the program
}

// openTerminal makes a pseudo terminal. The caller closes both sides.
func openTerminal() (*terminal, error) {
	outside, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	if err := unix.IoctlSetPointerInt(int(outside.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		outside.Close()
		return nil, fmt.Errorf("unlock the terminal: %w", err)
	}
	number, err := unix.IoctlGetInt(int(outside.Fd()), unix.TIOCGPTN)
	if err != nil {
		outside.Close()
		return nil, fmt.Errorf("number of the terminal: %w", err)
	}
	inside, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		outside.Close()
		return nil, fmt.Errorf("open the terminal's inside: %w", err)
	}
	return &terminal{outside: outside, inside: inside}, nil
}

// resize tells the program the size of the person's window, in characters.
func (t *terminal) resize(columns, rows uint16) error {
	return unix.IoctlSetWinsize(int(t.outside.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows})
}
