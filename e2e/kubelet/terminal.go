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
	number := 0
	err = control(outside, func(fd int) (err error) {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return fmt.Errorf("unlock the terminal: %w", err)
		}
		number, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		return err
	})
	if err != nil {
		outside.Close()
		return nil, fmt.Errorf("open a terminal: %w", err)
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
	return control(t.outside, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows})
	})
}

// control calls f with the descriptor of a file that is kept open meanwhile
// and that, unlike with Fd, stays one that Close can interrupt.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}
