// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// onThread runs f on an operating system thread of its own that is thrown away
// afterwards, so that f may change the thread's namespaces and credentials. It
// is never the first thread, whose namespaces pass for those of the process.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			done <- onThread(f)
			return
		}
		done <- f() // still locked: the thread ends with this goroutine
	}()
	return <-done
}

// inNetwork runs f on a thread that has joined the network namespace behind path.
// Sockets that f opens stay in it; goroutines that f starts do not run in it.
func inNetwork(path string, f func() error) error {
	return onThread(func() error {
		if err := joinNetwork(path); err != nil {
			return err
		}
		return f()
	})
}

// joinNetwork moves the calling thread into the network namespace behind path.
func joinNetwork(path string) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("join network namespace %s: %w", path, err)
	}
	return nil
}

// dialIn connects to a literal address from within the network namespace behind path.
func dialIn(ctx context.Context, path, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := inNetwork(path, func() error {
		// FallbackDelay < 0: one socket after the other, on this thread.
		dialer := net.Dialer{FallbackDelay: -1, KeepAliveConfig: net.KeepAliveConfig{Enable: false}}
		var err error
		conn, err = dialer.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// inContainer runs f on a thread that has joined the network, mount and UTS
// namespaces of process pid, and whose children are born into its PID namespace.
func inContainer(pid int, f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("leave the shared root folder: %w", err)
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return fmt.Errorf("process %d: %w", pid, err)
		}
		defer unix.Close(fd)
		flags := unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWPID
		if err := unix.Setns(fd, flags); err != nil {
			return fmt.Errorf("join the namespaces of process %d: %w", pid, err)
		}
		return f()
	})
}

// setSysctls writes kernel parameters (with slashes for dots) inside a network namespace.
func setSysctls(path string, values map[string]string) error {
	return inNetwork(path, func() error {
		for name, value := range values {
			if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
				return fmt.Errorf("sysctl %s = %q: %w", name, value, err)
			}
		}
		return nil
	})
}

// sleep waits for d and reports whether ctx lasted that long.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
