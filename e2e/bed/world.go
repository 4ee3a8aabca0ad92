// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/cache"
)

// transitRange is the network that joins all routers of a world: meshd, the
// API servers and the addresses of LoadBalancer Services live there. It is
// the range set aside for benchmarks between networks (RFC 2544), and exists
// inside the world only. Its first /24 is for hosts, each further one for what
// the router of one network answers for.
var transitRange = netip.MustParsePrefix("198.18.0.0/16")

// transitBridge is the bridge of the transit network.
const transitBridge = "transit"

// worlds counts the worlds of this process, to name them.
var worlds atomic.Int64

// WorldConfig says how a world is made.
type WorldConfig struct {
	// Binaries are the outside programs; the zero value means those that
	// e2e/prepare made.
	Binaries cache.Binaries
	// Logger hears of what the world does by itself; nil means silence.
	Logger *slog.Logger
	// KeepLogs is a folder that gets the logs of all processes when the world
	// is closed; empty means $ISTHMUS_BED_LOGS, and when that is empty too
	// they go with the world.
	KeepLogs string
}

// A World is a set of networks, joined by one transit network, with what lives
// on them. Close ends all of it. Its methods may be called from several
// goroutines.
type World struct {
	name     string
	dir      string
	binaries cache.Binaries
	logger   *slog.Logger
	keep     string
	transit  *Namespace

	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup // goroutines that act for the world
	config sync.Mutex     // held while the kubeconfig is rewritten

	mu         sync.Mutex
	namespaces []*Namespace
	processes  map[*Process]bool // running
	networks   []*Network
	clusters   []*Cluster
	closers    []func() error // in order of making; called last first
	lastHost   netip.Addr
	closed     bool
}

// NewWorld makes a world with nothing on its transit network. The program must
// be inside the bed (Enter).
func NewWorld(config WorldConfig) (*World, error) {
	if _, err := os.Stat(insideOf); err != nil {
		return nil, errors.New("a world needs the bed around it: call bed.Enter or bed.Main first")
	}
	var err error
	if config.Binaries == (cache.Binaries{}) {
		if config.Binaries, err = cache.Find(); err != nil {
			return nil, err
		}
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	if config.KeepLogs == "" {
		config.KeepLogs = os.Getenv("ISTHMUS_BED_LOGS")
	}
	name := "w" + strconv.FormatInt(worlds.Add(1), 10)
	w := &World{
		name: name, dir: filepath.Join(runDir, name), binaries: config.Binaries,
		logger: config.Logger.With("world", name), keep: config.KeepLogs,
		processes: make(map[*Process]bool), lastHost: transitRange.Addr().Next(),
	}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	for _, dir := range []string{w.dir, w.Dir("log"), w.Dir("home"), w.Dir("tmp")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(w.Dir("tmp"), 0o1777); err != nil {
		return nil, err
	}
	if w.transit, err = w.Namespace("transit"); err == nil {
		err = w.transit.bridge(transitBridge)
	}
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// Name returns the world's name, which begins the names of its namespaces
// below /run/netns.
func (w *World) Name() string { return w.name }

// Binaries returns the outside programs of the world.
func (w *World) Binaries() cache.Binaries { return w.binaries }

// Dir returns a path in the world's own folder, which goes with it.
func (w *World) Dir(elements ...string) string {
	return filepath.Join(append([]string{w.dir}, elements...)...)
}

// Host makes a namespace on the transit network, with an address of its own:
// a place for meshd, for an external etcd, for an administrator's laptop.
func (w *World) Host(name string) (*Namespace, error) {
	n, err := w.Namespace(name)
	if err != nil {
		return nil, err
	}
	addr, err := w.nextHost()
	if err != nil {
		return nil, err
	}
	prefix := netip.PrefixFrom(addr, transitRange.Bits())
	if err := n.plug("eth0", prefix, w.transit, transitBridge); err != nil {
		return nil, err
	}
	n.hold(address{netip.PrefixFrom(addr, addr.BitLen()), nil})
	return n, nil
}

// Laptop makes a host with the kubeconfig of the world's clusters in its
// environment, where an administrator runs mesh and kubectl. The programs'
// folder of Kubernetes is in its PATH.
func (w *World) Laptop(name string) (*Namespace, error) {
	n, err := w.Host(name)
	if err != nil {
		return nil, err
	}
	n.Setenv("KUBECONFIG", w.Kubeconfig())
	n.Setenv("PATH", filepath.Dir(w.binaries.Kubectl)+":"+searchPath)
	return n, nil
}

// nextHost returns the next free address of the hosts' block.
func (w *World) nextHost() (netip.Addr, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lastHost = w.lastHost.Next()
	if w.lastHost.As4()[2] != 0 {
		return netip.Addr{}, fmt.Errorf("transit network: no address left for another host in %s/24", transitRange.Addr())
	}
	return w.lastHost, nil
}

// searchPath is where programs in the world are looked for.
const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment returns what programs in a namespace of the name find, which is
// nothing of the machine's own environment.
func (w *World) environment(name string) []string {
	home := w.Dir("home", name)
	os.MkdirAll(home, 0o700)
	return []string{"PATH=" + searchPath, "HOME=" + home, "TMPDIR=" + w.Dir("tmp"), "LANG=C.UTF-8", "TERM=dumb"}
}

// logFile returns where a process's output goes.
func (w *World) logFile(namespace, name string) string {
	return w.Dir("log", strings.ReplaceAll(namespace+"-"+name, "/", "_")+".log")
}

// Logs returns the files with the output of the world's processes.
func (w *World) Logs() []string {
	files, _ := filepath.Glob(w.Dir("log", "*.log"))
	return files
}

// OnClose has fn called when the world closes, before anything that was made
// earlier than this call is taken down.
func (w *World) OnClose(fn func() error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closers = append(w.closers, fn)
}

// Go runs a task for as long as the world lives; its context ends when the
// world closes, which waits for it.
func (w *World) Go(task func(context.Context)) {
	w.tasks.Go(func() { task(w.ctx) })
}

// adopt makes a namespace part of the world, unless that is closing.
func (w *World) adopt(n *Namespace) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return fmt.Errorf("namespace %s: world %s is closed", n.name, w.name)
	}
	w.namespaces = append(w.namespaces, n)
	return nil
}

// closing reports whether Close has begun.
func (w *World) closing() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.closed
}

// forget undoes adopt.
func (w *World) forget(n *Namespace) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.namespaces = slices.DeleteFunc(w.namespaces, func(other *Namespace) bool { return other == n })
}

func (w *World) started(p *Process) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.processes[p] = true
}

func (w *World) ended(p *Process) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.processes, p)
}

// Close ends everything in the world: tasks, then, in the opposite order of
// its making, what OnClose was told, then processes, namespaces and files. What had to be
// killed although nobody started it through the world, and what is still there
// afterwards, is named in the error. Closing twice is harmless.
func (w *World) Close() error {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	w.closed = true
	closers := slices.Clone(w.closers)
	w.mu.Unlock()

	w.cancel()
	w.tasks.Wait()
	var errs []error
	for _, fn := range slices.Backward(closers) {
		errs = append(errs, fn())
	}
	errs = append(errs, w.endProcesses(), w.keepLogs())
	errs = append(errs, w.dropNamespaces(), os.RemoveAll(w.dir), w.remains())
	return errors.Join(errs...)
}

// endProcesses kills all processes at once and waits for them. Nothing in a
// world has anything to lose.
func (w *World) endProcesses() error {
	w.mu.Lock()
	running := make([]*Process, 0, len(w.processes))
	for p := range w.processes {
		running = append(running, p)
	}
	w.mu.Unlock()
	errs := make([]error, len(running))
	var group sync.WaitGroup
	for i, p := range running {
		group.Go(func() { errs[i] = p.Kill() })
	}
	group.Wait()
	return errors.Join(errs...)
}

// dropNamespaces drops all namespaces after killing the strays in them.
func (w *World) dropNamespaces() error {
	w.mu.Lock()
	namespaces := slices.Clone(w.namespaces)
	w.mu.Unlock()
	inside := make(map[string]bool)
	for _, n := range namespaces {
		inside[n.space] = true
	}
	var errs []error
	strays := killAll(inside)
	for _, p := range strays {
		w.logger.Info("killed a stray process", "process", p.String())
	}
	deadline := time.Now().Add(5 * time.Second)
	for left := strays; len(left) > 0; left = processesIn("net", inside) {
		if time.Now().After(deadline) {
			errs = append(errs, fmt.Errorf("world %s: process %s does not end", w.name, left[0]))
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	for _, n := range slices.Backward(namespaces) {
		errs = append(errs, n.Close())
	}
	return errors.Join(errs...)
}

// remains names the namespaces and mounts of the world that are still there.
func (w *World) remains() error {
	var errs []error
	paths, _ := filepath.Glob(filepath.Join(netnsDir, w.name+"-*"))
	for _, path := range append(paths, w.dir) {
		if _, err := os.Lstat(path); err == nil {
			errs = append(errs, fmt.Errorf("world %s: %s is left", w.name, path))
		}
	}
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && (strings.HasPrefix(fields[4], w.dir+"/") || strings.HasPrefix(fields[4], filepath.Join(netnsDir, w.name)+"-")) {
			errs = append(errs, fmt.Errorf("world %s: mount %s is left", w.name, fields[4]))
		}
	}
	return errors.Join(errs...)
}

// keepLogs copies the logs to where somebody wants to read them.
func (w *World) keepLogs() error {
	if w.keep == "" {
		return nil
	}
	folder := filepath.Join(w.keep, fmt.Sprintf("%s-%d", w.name, time.Now().Unix()))
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, file := range w.Logs() {
		errs = append(errs, copyFile(file, filepath.Join(folder, filepath.Base(file)), 0o644))
	}
	return errors.Join(errs...)
}

// copyFile copies one regular file.
func copyFile(from, to string, mode os.FileMode) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}
