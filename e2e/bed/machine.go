// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// machineVar hands a VM's first process its machine.
const machineVar = "ISTHMUS_BED_MACHINE"

// machineUp is what it answers when its start scripts have run.
const machineUp = "up\n"

// layered are the folders of a VM that begin as the machine's and keep what is
// written into them; private are those that begin empty.
var (
	layered = []string{"/etc", "/var", "/usr/local"}
	private = []string{"/root", "/home", "/opt", "/srv"}
)

// A machine is what a VM's first process needs to know.
type machine struct {
	Host                string
	Disk                string // where what is written goes
	Address, Nameserver netip.Addr
	Files               map[string]string // inside: outside
}

// playMachine is process 1 of a VM: it mounts the VM's folders, runs its start
// scripts and reaps until it is killed.
func playMachine() (int, error) {
	var m machine
	if err := json.Unmarshal([]byte(os.Getenv(machineVar)), &m); err != nil {
		return 1, fmt.Errorf("environment variable %s: %w", machineVar, err)
	}
	up := os.NewFile(3, "up")
	unix.CloseOnExec(3)
	first, scripts := m.first(), m.startScripts()
	if err := m.mount(); err != nil {
		return 1, err
	}
	if err := m.identify(first); err != nil {
		return 1, err
	}
	for _, script := range scripts {
		cmd := exec.Command(script, "start")
		cmd.Env = without(without(os.Environ(), stageVar), machineVar)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintf(os.Stderr, "start script %s: %v\n", script, err)
		}
	}
	if _, err := up.WriteString(machineUp); err != nil {
		return 1, err
	}
	up.Close()
	return reap(0)
}

// mount gives the VM its folders. What comes from outside is opened before the
// folders it lies in disappear.
func (m machine) mount() error {
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// Nothing that the VM shares with the machine can be written to. The disk
	// can, until it is out of sight.
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make everything read-only: %w", err)
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/run", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make the disk writable: %w", err)
	}
	if err := mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	files := make(map[string]*os.File)
	for inside, outside := range m.Files {
		fd, err := unix.Open(outside, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", outside, err)
		}
		files[inside] = os.NewFile(uintptr(fd), outside)
		defer files[inside].Close()
	}
	for _, folder := range layered {
		if err := m.layer(folder); err != nil {
			return err
		}
	}
	for _, folder := range private {
		own := filepath.Join(m.Disk, folder)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return err
		}
		if err := mount(own, folder, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	// /run comes last, since it hides the disk.
	for _, fresh := range []struct{ folder, mode string }{{"/tmp", "1777"}, {"/dev/shm", "1777"}, {"/run", "755"}} {
		if err := mount("tmpfs", fresh.folder, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode="+fresh.mode); err != nil {
			return err
		}
	}
	for inside, file := range files {
		if err := show(file, inside); err != nil {
			return err
		}
	}
	return nil
}

// layer mounts the machine's folder with the VM's changes on top.
func (m machine) layer(folder string) error {
	upper, work := filepath.Join(m.Disk, folder), filepath.Join(m.Disk, ".work", folder)
	for _, dir := range []string{upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", folder, upper, work)
	return mount("overlay", folder, "overlay", 0, options)
}

// show makes an open file or folder of the outside visible at a path inside,
// read-only.
func show(file *os.File, inside string) error {
	source := fmt.Sprintf("/proc/self/fd/%d", file.Fd())
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(inside), 0o755); err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(inside, 0o755)
	} else if _, err = os.Stat(inside); errors.Is(err, fs.ErrNotExist) {
		err = os.WriteFile(inside, nil, 0o644)
	}
	if err != nil {
		return fmt.Errorf("make a place for %s: %w", inside, err)
	}
	if err := mount(source, inside, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return mount("", inside, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

// identify gives the VM its name and, at its first boot, the files that a
// freshly installed machine has.
func (m machine) identify(first bool) error {
	if err := unix.Sethostname([]byte(m.Host)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := os.MkdirAll("/run/lock", 0o755); err != nil {
		return err
	}
	if !first {
		return nil
	}
	for path, content := range map[string]string{
		"/etc/hostname":    m.Host + "\n",
		"/etc/hosts":       fmt.Sprintf("127.0.0.1\tlocalhost\n::1\tlocalhost\n%s\t%s\n", m.Address, m.Host),
		"/etc/resolv.conf": fmt.Sprintf("nameserver %s\noptions timeout:1 attempts:1\n", m.Nameserver),
	} {
		// It may be a link into a folder that is not there.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// first reports whether the VM has never been up.
func (m machine) first() bool {
	_, err := os.Stat(filepath.Join(m.Disk, "/etc/hostname"))
	return err != nil
}

// startScripts returns the scripts to run at boot. Those that belong to the
// machine below are not the VM's, so it looks only at what was written inside,
// and must be called while the disk is in sight.
func (m machine) startScripts() []string {
	var scripts []string
	for _, pattern := range []string{"/etc/rc2.d/S*", "/etc/rc.local"} {
		written, err := filepath.Glob(filepath.Join(m.Disk, pattern))
		if err != nil {
			continue
		}
		for _, path := range written {
			info, err := os.Lstat(path)
			if err == nil && info.Mode().Type()&^fs.ModeSymlink == 0 { // a device here marks something deleted
				scripts = append(scripts, filepath.Join("/", path[len(m.Disk):]))
			}
		}
	}
	return scripts
}

// mount is mount(2) with an error that says what and where.
func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s (%s): %w", source, target, data, err)
	}
	return nil
}
