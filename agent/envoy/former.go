// SPDX-License-Identifier: Apache-2.0

package envoy

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
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
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end former envoy %d: %w", pid, err)
	}
	for deadline := time.Now().Add(5 * time.Second); startTime(pid) == started; {
		if time.Now().After(deadline) {
			return fmt.Errorf("former envoy %d does not end", pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
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
