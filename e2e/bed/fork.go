// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// The parent-death signal of Linux is sent when the *thread* that started a
// process ends, so nothing in here asks for it: threads that visited a VM are
// thrown away. What ends the processes of a bed that dies is its process 1.

// fork starts the command in the namespace and in the further ones that it has.
func (n *Namespace) fork(cmd *exec.Cmd) error {
	n.mu.Lock()
	enter := n.enter
	n.mu.Unlock()
	if enter == nil {
		return n.Do(cmd.Start)
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: this thread cannot go back
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			done <- n.fork(cmd)
			return
		}
		if err := n.visit(); err != nil {
			done <- err
			return
		}
		if err := enter(); err != nil {
			done <- err
			return
		}
		done <- cmd.Start()
	}()
	return <-done
}

// spaces are the namespaces of a running VM beside its network.
type spaces struct{ mounts, processes, host *os.File }

// openSpaces opens the namespaces of the process.
func openSpaces(pid int) (s spaces, err error) {
	for kind, file := range map[string]**os.File{"mnt": &s.mounts, "pid": &s.processes, "uts": &s.host} {
		if *file, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err != nil {
			s.close()
			return s, err
		}
	}
	return s, nil
}

// enter moves the calling thread into the namespaces; processes it starts are
// in all of them.
func (s spaces) enter() error {
	// A thread that shares its idea of folders with others may not change
	// what the folders are.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare folders: %w", err)
	}
	for _, step := range []struct {
		file *os.File
		kind int
	}{{s.processes, unix.CLONE_NEWPID}, {s.host, unix.CLONE_NEWUTS}, {s.mounts, unix.CLONE_NEWNS}} {
		if err := unix.Setns(int(step.file.Fd()), step.kind); err != nil {
			return fmt.Errorf("enter %s: %w", step.file.Name(), err)
		}
	}
	return nil
}

func (s spaces) close() {
	for _, file := range []*os.File{s.mounts, s.processes, s.host} {
		if file != nil {
			file.Close()
		}
	}
}
