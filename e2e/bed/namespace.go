// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A Namespace is a network namespace of a world: a host on the transit
// network, a router, a pod or a VM. Programs are started in it, and
// connections made and accepted in it, without leaving this process. Its
// methods may be called from several goroutines.
type Namespace struct {
	name  string
	path  string // /run/netns/…, for `ip netns exec`
	world *World
	file  *os.File // the open namespace
	space string   // as the kernel writes it: net:[…]
	links *netlink.Handle
	env   []string // what its programs find in their environment

	mu        sync.Mutex
	addresses []address
	faults    map[Fault]bool
	enter     func() error // joins further namespaces (a VM's), on a thread that is thrown away
	closed    bool
}

// An address means something only together with the network it is on; nil is
// the transit network. A router's is the whole block that it answers for.
type address struct {
	prefix netip.Prefix
	on     *Network
}

// Namespace makes a network namespace that is connected to nothing: loopback
// is up, and that is all.
func (w *World) Namespace(name string) (*Namespace, error) {
	path := filepath.Join(netnsDir, w.name+"-"+name)
	n := &Namespace{name: name, path: path, world: w, env: w.environment(name), faults: make(map[Fault]bool)}
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	if err := onThread(func() error { return makeNamespace(path) }); err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	if err := n.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("namespace %s: %w", name, err), n.Close())
	}
	if err := w.adopt(n); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// makeNamespace makes a network namespace, keeps it by a mount at path, and
// sets it up. The calling thread is in it from then on.
func makeNamespace(path string) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount at %s: %w", path, err)
	}
	// An address that moves from one pod to the next must not wait for
	// neighbours to forget, and IPv6 not for duplicates to be looked for.
	for key, value := range map[string]string{
		"net/ipv4/conf/all/arp_notify":         "1",
		"net/ipv4/conf/default/arp_notify":     "1",
		"net/ipv4/conf/all/rp_filter":          "0",
		"net/ipv4/conf/default/rp_filter":      "0",
		"net/ipv6/conf/default/accept_dad":     "0",
		"net/ipv6/conf/default/accept_ra":      "0",
		"net/ipv4/ip_unprivileged_port_start":  "0",
		"net/ipv4/ping_group_range":            "0 2147483647",
		"net/bridge/bridge-nf-call-iptables":   "0",
		"net/ipv4/conf/all/send_redirects":     "0",
		"net/ipv4/conf/default/send_redirects": "0",
	} {
		if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set %s: %w", key, err)
		}
	}
	return nil
}

// open keeps the namespace open and brings loopback up.
func (n *Namespace) open() (err error) {
	if n.file, err = os.Open(n.path); err != nil {
		return err
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &stat); err != nil {
		return err
	}
	n.space = fmt.Sprintf("net:[%d]", stat.Ino)
	if n.links, err = netlink.NewHandleAt(netns.NsHandle(n.file.Fd()), unix.NETLINK_ROUTE); err != nil {
		return err
	}
	lo, err := n.links.LinkByName("lo")
	if err != nil {
		return err
	}
	return n.links.LinkSetUp(lo)
}

// Name returns the name the namespace was made with.
func (n *Namespace) Name() string { return n.name }

// Path returns the file that stands for the namespace below /run/netns.
func (n *Namespace) Path() string { return n.path }

// World returns the world the namespace is part of.
func (n *Namespace) World() *World { return n.world }

// Addr returns the namespace's first address, the zero Addr when it has none.
func (n *Namespace) Addr() netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.addresses) == 0 {
		return netip.Addr{}
	}
	return n.addresses[0].prefix.Addr()
}

// Setenv sets a variable in the environment of the programs started from now
// on.
func (n *Namespace) Setenv(name, value string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.env = append(without(n.env, name), name+"="+value)
}

// Do calls fn on a thread that is in the namespace: what fn opens there stays
// there, whoever uses it later. Goroutines that fn starts are not in it.
func (n *Namespace) Do(fn func() error) error {
	return onThread(func() error {
		if err := n.visit(); err != nil {
			return err
		}
		return fn()
	})
}

// visit moves the calling thread into the namespace. A namespace that is closed
// meanwhile is not somebody else's with the same descriptor.
func (n *Namespace) visit() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("enter namespace %s: %w", n.name, os.ErrClosed)
	}
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", n.name, err)
	}
	return nil
}

// onThread calls fn on a thread of its own and takes the thread back to where
// it came from; a thread for which that fails is thrown away. It is never the
// first thread of the process, which is what others take for all of it.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			done <- onThread(fn)
			return
		}
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		err = fn()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Dial connects from inside the namespace. The address holds an IP address:
// nobody resolves names on this machine's behalf in there.
func (n *Namespace) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if err := literal(network, address); err != nil {
		return nil, err
	}
	err = n.Do(func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace.
func (n *Namespace) Listen(network, address string) (listener net.Listener, err error) {
	err = n.Do(func() error {
		listener, err = net.Listen(network, address)
		return err
	})
	return listener, err
}

// ListenPacket listens for datagrams inside the namespace.
func (n *Namespace) ListenPacket(network, address string) (conn net.PacketConn, err error) {
	err = n.Do(func() error {
		conn, err = net.ListenPacket(network, address)
		return err
	})
	return conn, err
}

// literal refuses addresses that would have to be resolved, which happens on
// other threads, in another namespace.
func literal(network, address string) error {
	if strings.HasPrefix(network, "unix") {
		return nil
	}
	if _, err := netip.ParseAddrPort(address); err != nil {
		return fmt.Errorf("dial %s %q: want an IP address and a port: %w", network, address, err)
	}
	return nil
}

// Close ends every process in the namespace and drops it.
func (n *Namespace) Close() error {
	n.mu.Lock()
	closed := n.closed
	n.closed = true
	n.mu.Unlock()
	if closed {
		return nil
	}
	if n.space != "" {
		killAll(map[string]bool{n.space: true})
	}
	if n.links != nil {
		if !n.world.closing() {
			n.unplug()
		}
		n.links.Close()
	}
	if n.file != nil {
		n.file.Close()
	}
	n.world.forget(n)
	err := unix.Unmount(n.path, unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) {
		err = nil // it was never mounted
	}
	return errors.Join(err, os.Remove(n.path))
}

// unplug removes the namespace's interfaces at once, so that its name and
// addresses are free: the kernel clears a namespace when it finds the time.
func (n *Namespace) unplug() {
	links, err := n.links.LinkList()
	if err != nil {
		return // what remains goes with the namespace
	}
	for _, link := range links {
		if link.Type() == "veth" {
			n.links.LinkDel(link)
		}
	}
}

// killAll kills the processes in the network namespaces and names them.
func killAll(spaces map[string]bool) []stray {
	found := processesIn("net", spaces)
	for _, p := range found {
		syscall.Kill(p.pid, syscall.SIGKILL)
	}
	return found
}

// hold records that the namespace has an address.
func (n *Namespace) hold(a address) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !slices.Contains(n.addresses, a) {
		n.addresses = append(n.addresses, a)
	}
}

// held returns the addresses of the namespace.
func (n *Namespace) held() []address {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.addresses)
}
