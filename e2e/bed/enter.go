// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The bed's own folders on the private /run of the inside.
const (
	runDir   = "/run/isthmus"
	tmpDir   = runDir + "/tmp"
	netnsDir = "/run/netns" // where `ip netns` looks
	insideOf = runDir + "/inside"

	// ProgramsDir is for programs that containers are to find at a place of their own.
	ProgramsDir = "/run/programs"
)

// Environment variables between the stages of a program that enters the bed.
const (
	stageVar  = "ISTHMUS_BED_STAGE"     // which stage to play; empty: the program itself
	outerVar  = "ISTHMUS_BED_OUTER_NET" // descriptor of the machine's network namespace
	anotherIn = "ISTHMUS_BED_ANOTHER"   // set: make a bed inside this bed (the bed's own test)
)

// Stages. Each is this same program, started again.
const (
	stageInit    = "init"    // process 1 of the bed: mounts, reaps, passes signals on
	stageMachine = "machine" // process 1 of a VM
)

// outerNet is the machine's own network namespace, for loopback forwarders.
var outerNet atomic.Pointer[os.File]

// Main is the body of a TestMain: it runs the tests inside a bed and ends the
// process with their exit code.
func Main(m *testing.M) {
	Enter()
	os.Exit(m.Run())
}

// Inside is Main for a TestMain that has more to do: Run of the result enters
// the bed first, and outside of it returns the exit code of the inside.
func Inside(m interface{ Run() int }) interface{ Run() int } { return insider{m} }

type insider struct{ m interface{ Run() int } }

func (i insider) Run() int {
	if code, outside := enter(); outside {
		return code
	}
	return i.m.Run()
}

// Enter moves the program into a bed: it returns only in there. Outside, where
// the program was started, it waits for the inside, passes on the signals that
// arrive and ends the process with the inside's exit code, or with 128 and the
// signal that ended it. It needs root and must be called from main or TestMain
// before anything else.
func Enter() {
	if code, outside := enter(); outside {
		os.Exit(code)
	}
}

// Outside reports whether this process is the one that a person started, before it enters
// the bed: the place for what needs the machine's network.
func Outside() bool {
	_, err := os.Stat(insideOf)
	return os.Getenv(stageVar) == "" && (err != nil || os.Getenv(anotherIn) != "")
}

// enter plays the stage that this process is for.
func enter() (code int, outside bool) {
	switch os.Getenv(stageVar) {
	case stageInit:
		return report(playInit()), true
	case stageMachine:
		return report(playMachine()), true
	}
	if _, err := os.Stat(insideOf); err == nil && os.Getenv(anotherIn) == "" {
		if err := arrive(); err != nil {
			return report(0, err), true
		}
		return 0, false
	}
	return report(playOuter()), true
}

// report prints what kept a stage from doing its work.
func report(code int, err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, "test bed:", err)
		return max(code, 1)
	}
	return code
}

// playOuter starts the inside and waits for it. The thread that starts it must
// live as long as it does, since its death is what the kernel tells the child.
func playOuter() (int, error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("network namespaces, mounts and nftables need root: run again with sudo")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := observe()
	if err != nil {
		return 1, err
	}
	outer, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return 1, err
	}
	defer outer.Close()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{outer}
	cmd.Env = append(without(os.Environ(), anotherIn), stageVar+"="+stageInit)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // Ctrl-C comes to us alone, once
	}
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("start the inside: %w: the kernel must allow mount, process and network namespaces", err)
	}
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", cmd.Process.Pid))
	if err != nil {
		cmd.Process.Kill()
		return 1, errors.Join(err, cmd.Wait())
	}
	code, err := attend(cmd, signals)
	if err != nil {
		return code, err
	}
	if left := before.left(space); len(left) > 0 {
		return max(code, 1), fmt.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	return code, nil
}

// attend passes signals on until the inside has ended. Who asks three times
// gets it killed.
func attend(cmd *exec.Cmd, signals <-chan os.Signal) (int, error) {
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for asked := 0; ; {
		select {
		case s := <-signals:
			if asked++; asked >= 3 {
				s = syscall.SIGKILL
			}
			cmd.Process.Signal(s)
		case err := <-ended:
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				return 1, err
			}
			return exitCode(syscall.WaitStatus(cmd.ProcessState.Sys().(syscall.WaitStatus))), nil
		}
	}
}

// exitCode is what a shell would say.
func exitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// playInit is process 1 of the bed. It furnishes the inside, starts the
// program proper and reaps whatever loses its parent. When the program has
// ended so does this process, and with it, by the kernel, all others.
func playInit() (int, error) {
	if err := furnish(); err != nil {
		return 1, err
	}
	const outerFD = 3
	child, err := os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{
		Env:   append(without(os.Environ(), stageVar), outerVar+"="+strconv.Itoa(outerFD), "TMPDIR="+tmpDir),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, os.NewFile(outerFD, "outer network namespace")},
	})
	if err != nil {
		return 1, fmt.Errorf("start the program inside: %w", err)
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	go func() {
		for s := range signals {
			child.Signal(s)
		}
	}()
	return reap(child.Pid)
}

// reap waits for every child until the one that matters has ended; with pid 0,
// for ever.
func reap(pid int) (int, error) {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		var status syscall.WaitStatus
		ended, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.ECHILD):
			<-children // none now, but orphans may come
		case err != nil:
			return 1, fmt.Errorf("reap: %w", err)
		case ended == pid:
			return exitCode(status), nil
		}
	}
}

// furnish gives the inside its own view of processes and devices, and folders
// that are gone with it.
func furnish() error {
	mounts := []struct {
		kind, target string
		flags        uintptr
		data         string
	}{
		{"", "/", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	}
	for _, m := range mounts {
		if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	for _, dir := range []string{netnsDir, runDir, tmpDir, "/run/lock"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(tmpDir, 0o1777); err != nil {
		return err
	}
	if err := os.WriteFile(insideOf, nil, 0o644); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("isthmus")); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// arrive is the first thing the program does inside: it keeps the way out
// (which only loopback forwarders use) from the programs it will start.
func arrive() error {
	value := os.Getenv(outerVar)
	if value == "" {
		return nil // a command of the program, started inside by itself
	}
	fd, err := strconv.Atoi(value)
	if err != nil {
		return fmt.Errorf("environment variable %s=%q: want a descriptor", outerVar, value)
	}
	syscall.CloseOnExec(fd)
	outerNet.Store(os.NewFile(uintptr(fd), "outer network namespace"))
	return os.Unsetenv(outerVar)
}

// without returns the environment without the variable.
func without(environ []string, name string) []string {
	kept := make([]string, 0, len(environ))
	for _, v := range environ {
		if !strings.HasPrefix(v, name+"=") {
			kept = append(kept, v)
		}
	}
	return kept
}

// traces are what a bed could leave on a machine. What others do there meanwhile is none
// of its business.
type traces struct {
	interfaces map[string]int
	mounts     map[string]int // how many lie on one another
	files      map[string]int
}

// ownInterface matches the names that portName gives, and the bridges'.
var ownInterface = regexp.MustCompile(`^(.{1,6}-[0-9a-f]{8}|` + transitBridge + `|` + podBridge + `)$`)

// ownMounts are the places that the bed, its VMs and its containers mount over, in mount
// namespaces of their own.
var ownMounts = slices.Concat([]string{"/", "/proc", "/sys", "/run", "/tmp", "/dev/shm"}, layered, private)

// worldPattern matches the names of worlds' namespaces.
const worldPattern = "w[0-9]*-*"

func ownMount(target string) bool {
	named, _ := filepath.Match(filepath.Join(netnsDir, worldPattern), target) // the pattern is good
	return named || slices.Contains(ownMounts, target) || strings.HasPrefix(target, runDir+"/") || strings.HasPrefix(target, ProgramsDir+"/")
}

// observe notes what is there now.
func observe() (traces, error) {
	t := traces{make(map[string]int), make(map[string]int), make(map[string]int)}
	links, err := netlink.LinkList()
	if err != nil {
		return t, fmt.Errorf("list interfaces: %w", err)
	}
	for _, link := range links {
		if name := link.Attrs().Name; ownInterface.MatchString(name) {
			t.interfaces[name]++
		}
	}
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return t, err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 4 && ownMount(fields[4]) {
			t.mounts[fields[4]]++
		}
	}
	for pattern, counts := range map[string]func(string) bool{
		runDir + "/*":                            nil,
		filepath.Join(netnsDir, worldPattern):    nil,
		filepath.Join(os.TempDir(), "*isthmus*"): abandonedFolder,
	} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return t, err
		}
		for _, path := range paths {
			if counts == nil || counts(path) {
				t.files[path]++
			}
		}
	}
	return t, nil
}

// left names what there is now and was not before: interfaces, mounts, files
// of ours, and processes of the process namespace of a bed that has ended
// (written as the kernel does, "pid:[4026532000]").
func (before traces) left(space string) []string {
	now, err := observe()
	if err != nil {
		return []string{err.Error()}
	}
	var left []string
	list := func(kind string, now, before map[string]int) {
		for name, n := range now {
			if n > before[name] {
				left = append(left, kind+" "+name)
			}
		}
	}
	list("interface", now.interfaces, before.interfaces)
	list("mount", now.mounts, before.mounts)
	list("file", now.files, before.files)
	for _, p := range processesIn("pid", map[string]bool{space: true}) {
		left = append(left, "process "+p.String())
	}
	return left
}
