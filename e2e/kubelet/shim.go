// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// shimName is argv[0] of a process that is to become a container.
const shimName = "isthmus-container-shim"

// Descriptors that a shim inherits besides its standard streams.
const (
	shimSpecFD  = 3 // the spec as JSON, until end of file
	shimErrorFD = 4 // what went wrong; closed without a word when the program starts
)

// oldRoot is where the shim keeps the machine's root until all mounts are made.
const oldRoot = "/.before"

// shimSpec tells a shim which container to become.
type shimSpec struct {
	NetNS      string      `json:"netns"`
	Hostname   string      `json:"hostname"`
	Scratch    string      `json:"scratch"`  // an empty folder, hidden by the overlay's tmpfs
	Visible    []string    `json:"visible"`  // paths that must exist inside although they lie on a hidden file system
	Mounts     []bindMount `json:"mounts"`   // in order
	Identity   identity    `json:"identity"` // of the program
	WorkingDir string      `json:"workingDir"`
	Args       []string    `json:"args"` // Args[0] is the program, looked up in the PATH of Env
	Env        []string    `json:"env"`
}

// bindMount shows a folder or file of the machine inside a container.
type bindMount struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly"`
}

// Shim turns the process into a container if a [Kubelet] started it for that
// purpose, and otherwise returns at once. A program that uses this package
// calls it first thing in main, before any other re-execution of itself.
func Shim() {
	if len(os.Args) == 0 || os.Args[0] != shimName {
		return
	}
	// The thread that joins the namespaces must be the one that calls execve.
	runtime.LockOSThread()
	failure := os.NewFile(shimErrorFD, "error")
	syscall.CloseOnExec(shimErrorFD)
	err := becomeContainer(os.NewFile(shimSpecFD, "spec"))
	fmt.Fprintf(failure, "%v", err)
	os.Exit(128)
}

// becomeContainer never returns unless something failed.
func becomeContainer(from io.ReadCloser) error {
	var spec shimSpec
	if err := json.NewDecoder(from).Decode(&spec); err != nil {
		return fmt.Errorf("container spec: %w", err)
	}
	from.Close()
	if err := joinNetwork(spec.NetNS); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("host name %q: %w", spec.Hostname, err)
	}
	if err := makeRoot(spec); err != nil {
		return err
	}
	if err := os.Chdir(spec.WorkingDir); err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	if err := spec.Identity.assume(); err != nil {
		return err
	}
	program, err := lookProgram(spec.Args[0], spec.Env)
	if err != nil {
		return err
	}
	return fmt.Errorf("exec %s: %w", program, unix.Exec(program, spec.Args, spec.Env))
}

// makeRoot gives the process a root folder of its own: an overlay of the
// machine's, with fresh /proc and /sys, the machine's devices, and the
// container's mounts.
func makeRoot(spec shimSpec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	below, err := diskMounts()
	if err != nil {
		return err
	}
	if err := unix.Mount("container", spec.Scratch, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("tmpfs %s: %w", spec.Scratch, err)
	}
	root := filepath.Join(spec.Scratch, "root")
	if err := overlay(spec.Scratch, "0", "/", root); err != nil {
		return err
	}
	for i, dir := range below {
		layOver(spec.Scratch, fmt.Sprint(i+1), dir, root+dir)
	}
	if err := resolveSources(spec.Mounts); err != nil {
		return err
	}
	if err := os.MkdirAll(root+oldRoot, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, root+oldRoot); err != nil {
		return fmt.Errorf("pivot to %s: %w", root, err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := mountSystem(); err != nil {
		return err
	}
	if err := mountAll(spec); err != nil {
		return err
	}
	if err := unix.Unmount(oldRoot, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the machine's root: %w", err)
	}
	return os.Remove(oldRoot)
}

// overlay mounts a writable view of lower at target; layers live below scratch.
func overlay(scratch, layer, lower, target string) error {
	upper, work := filepath.Join(scratch, "upper"+layer), filepath.Join(scratch, "work"+layer)
	for _, dir := range []string{upper, work, target} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work)
	if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
		return fmt.Errorf("overlay of %s (does this kernel have overlayfs?): %w", lower, err)
	}
	return nil
}

// layOver shows another file system of the machine (say /home) inside the new
// root: writable where overlays allow it, else read-only, else not at all.
func layOver(scratch, layer, lower, target string) {
	if info, err := os.Stat(target); err != nil || !info.IsDir() {
		return
	}
	if overlay(scratch, layer, lower, target) == nil {
		return
	}
	_ = bind(lower, target, true)
}

// mountSystem mounts /proc, /sys and /dev inside the new root.
func mountSystem() error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", "/proc", "proc", safe, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", safe|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if err := unix.Mount(oldRoot+"/dev", "/dev", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind /dev: %w", err)
	}
	if err := unix.Mount("shm", "/dev/shm", "tmpfs", safe, "mode=1777"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mount /dev/shm: %w", err)
	}
	return nil
}

// resolveSources follows links now, while they still mean the machine's root.
func resolveSources(mounts []bindMount) error {
	for i := range mounts {
		source, err := filepath.EvalSymlinks(mounts[i].Source)
		if err != nil {
			return fmt.Errorf("mount at %s: %w", mounts[i].Target, err)
		}
		mounts[i].Source = source
	}
	return nil
}

// mountAll binds the container's mounts and the paths that must be visible.
func mountAll(spec shimSpec) error {
	for _, path := range spec.Visible {
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if err := bind(oldRoot+path, path, true); err != nil {
			return err
		}
	}
	for _, m := range spec.Mounts {
		if err := bind(oldRoot+m.Source, m.Target, m.ReadOnly); err != nil {
			return err
		}
	}
	return nil
}

// bind shows source at target, which is made if it is missing.
func bind(source, target string, readOnly bool) error {
	info, err := os.Stat(source)
	if err != nil {
		return fmt.Errorf("mount at %s: %w", target, err)
	}
	if err := makeMountPoint(target, info.IsDir()); err != nil {
		return fmt.Errorf("mount at %s: %w", target, err)
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s at %s: %w", source, target, err)
	}
	if !readOnly {
		return nil
	}
	if err := unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", target, err)
	}
	return nil
}

// makeMountPoint makes an empty folder or file at path, replacing a link that
// leads nowhere (such as /etc/resolv.conf on machines with systemd-resolved).
func makeMountPoint(path string, dir bool) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	if dir {
		return os.MkdirAll(path, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o644)
}

// diskMounts lists the machine's mounted folders, other than the root, that
// hold files on disk: /home or /usr on some machines, none on most.
func diskMounts() ([]string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return parseDiskMounts(file)
}

// onDisk are the file systems that [diskMounts] looks for.
var onDisk = []string{"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "overlay", "squashfs", "erofs", "9p", "virtiofs", "nfs", "nfs4", "vfat"}

// parseDiskMounts reads proc_pid_mountinfo(5).
func parseDiskMounts(r io.Reader) ([]string, error) {
	var found []string
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		front, back, ok := strings.Cut(lines.Text(), " - ")
		fields, tail := strings.Fields(front), strings.Fields(back)
		if !ok || len(fields) < 5 || len(tail) < 1 {
			continue
		}
		dir := unescapeMount(fields[4])
		if dir == "/" || !slices.Contains(onDisk, tail[0]) || slices.Contains(found, dir) {
			continue
		}
		if hidden := slices.ContainsFunc([]string{"/proc", "/sys", "/dev", "/run"}, func(top string) bool {
			return dir == top || strings.HasPrefix(dir, top+"/")
		}); !hidden {
			found = append(found, dir)
		}
	}
	return found, lines.Err()
}

// unescapeMount undoes the kernel's octal escapes of space, tab, newline and backslash.
func unescapeMount(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

// lookProgram finds an executable in the PATH of env, as execvp(3) would.
func lookProgram(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := defaultPath
	for _, entry := range env {
		if value, ok := strings.CutPrefix(entry, "PATH="); ok {
			path = value
		}
	}
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("program %q: not found in PATH %s", name, path)
}
