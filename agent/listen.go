// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// listening is the sockets of one agent.
type listening struct {
	socket, ready, status net.Listener
	probe                 net.Listener // gateway only
	workload              net.Listener // where it is asked for
	packets               []net.PacketConn
	streams               []net.Listener
}

// open opens all or none.
func (l *listening) open(ctx context.Context, c *Config) (err error) {
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.socket, err = listenSocket(ctx, c); err != nil {
		return err
	}
	var config net.ListenConfig
	if l.ready, err = config.Listen(ctx, "tcp", c.ReadyAddress); err != nil {
		return fmt.Errorf("readiness: %w", err)
	}
	if l.status, err = config.Listen(ctx, "tcp", c.StatusAddress); err != nil {
		return fmt.Errorf("status: %w", err)
	}
	if c.Role == Gateway {
		if l.probe, err = config.Listen(ctx, "tcp", c.ProbeAddress); err != nil {
			return fmt.Errorf("probes: %w", err)
		}
	}
	if c.WorkloadSocket != "" {
		if l.workload, err = listenWorkload(ctx, c.WorkloadSocket); err != nil {
			return err
		}
	}
	if c.NoDNS {
		return nil
	}
	for _, address := range c.DNSAddresses {
		if err = l.openDNS(ctx, address); err != nil {
			if strings.HasPrefix(address, "[::1]") {
				continue // IPv6 is switched off here
			}
			return fmt.Errorf("dns: %w", err)
		}
	}
	return nil
}

func (l *listening) openDNS(ctx context.Context, address string) error {
	var config net.ListenConfig
	packets, err := config.ListenPacket(ctx, "udp", address)
	if err != nil {
		return err
	}
	l.packets = append(l.packets, packets)
	streams, err := config.Listen(ctx, "tcp", packets.LocalAddr().String())
	if err != nil {
		return err
	}
	l.streams = append(l.streams, streams)
	return nil
}

func (l *listening) close() {
	for _, one := range append([]net.Listener{l.socket, l.ready, l.status, l.probe, l.workload}, l.streams...) {
		if one != nil {
			one.Close()
		}
	}
	for _, one := range l.packets {
		one.Close()
	}
}

// listenSocket opens the socket on which the private key is handed out: its
// mode lets only root and Envoy's group in, and peers are checked once more,
// since a folder may be shared in ways a mode does not show.
func listenSocket(ctx context.Context, c *Config) (net.Listener, error) {
	path := c.socket()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove former socket: %w", err)
	}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for envoy: %w", err)
	}
	err = os.Chmod(path, 0o660)
	if err == nil && os.Geteuid() == 0 {
		err = os.Chown(path, 0, c.EnvoyUID)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("protect socket: %w", err)
	}
	return &known{Listener: l, users: []uint32{0, uint32(os.Geteuid()), uint32(c.EnvoyUID)}}, nil
}

// known accepts connections of certain users only.
type known struct {
	net.Listener
	users []uint32
}

func (k *known) Accept() (net.Conn, error) {
	for {
		conn, err := k.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if k.knows(conn) {
			return conn, nil
		}
		conn.Close()
	}
}

func (k *known) knows(conn net.Conn) bool {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	found := false
	err = raw.Control(func(fd uintptr) {
		peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return
		}
		for _, user := range k.users {
			found = found || peer.Uid == user
		}
	})
	return err == nil && found
}

// makeDirs makes the folders if they are missing. The state folder is root's
// alone; Envoy's group may enter the other one to reach socket and bootstrap.
func makeDirs(c *Config) error {
	if err := os.MkdirAll(c.RunDir, 0o750); err != nil {
		return fmt.Errorf("run folder: %w", err)
	}
	if os.Geteuid() == 0 {
		// Whatever the umask of who started us: Envoy's group must be able to enter.
		if err := errors.Join(os.Chown(c.RunDir, 0, c.EnvoyUID), os.Chmod(c.RunDir, 0o750)); err != nil {
			return fmt.Errorf("run folder: %w", err)
		}
	}
	if c.StateDir == c.RunDir {
		return nil
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	return nil
}
