// SPDX-License-Identifier: Apache-2.0

package envoy

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A process is known by its number together with its start time: numbers are
// given away again.

func (p *Process) remember(pid int) {
	if p.PIDFile == "" {
		return
	}
	text := fmt.Sprintf("%d %s\n", pid, startTime(pid))
	if err := os.WriteFile(p.PIDFile, []byte(text), 0o644); err != nil {
		p.Log.Warn("envoy's process number not kept", "error", err)
	}
}

func (p *Process) forget() {
	if p.PIDFile != "" {
		_ = os.Remove(p.PIDFile) // a stale one is recognised
	}
}

// endFormer ends the Envoy of an agent that died without ending it.
func (p *Process) endFormer() error {
	if p.PIDFile == "" {
		return nil
	}
	data, err := os.ReadFile(p.PIDFile)
	if err != nil {
		return nil
	}
	number, started, _ := strings.Cut(strings.TrimSpace(string(data)), " ")
	pid, err := strconv.Atoi(number)
	if err != nil || pid <= 1 || started == "" || startTime(pid) != started {
		return nil
	}
	p.Log.Warn("ending the envoy of a former agent", "pid", pid)
	if err := killAndWait(pid, started); err != nil {
		return fmt.Errorf("end former envoy %d: %w", pid, err)
	}
	return nil
}

// killAndWait ends the process that has the number and began then, which need not be a
// child of ours, and returns when it has ended. It is done too if that one is gone.
func killAndWait(pid int, started string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if startTime(pid) != started {
		return nil // gone between two looks, and its number may be another's: fd stands for one of them for good
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	const patience = 5 * time.Second
	for deadline := time.Now().Add(patience); ; {
		left := time.Until(deadline)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, left).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n > 0:
			return nil
		case left <= 0:
			return fmt.Errorf("it does not end within %v of SIGKILL", patience)
		}
	}
}

// startTime is field 22 of /proc/<pid>/stat, in clock ticks after boot; empty
// if the process is gone or a zombie.
func startTime(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The second field is the name in parentheses and may contain anything.
	text := string(data)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return ""
	}
	return fields[19]
}
