// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// VMConfig says how a VM is made.
type VMConfig struct {
	// Network is where the VM is plugged in. It must be set.
	Network *Network
	// Address is its address there; zero means a free one.
	Address netip.Addr
	// Files are further files and folders of the VM: the path inside, and
	// what is shown there, read-only. A program under test comes in this way.
	Files map[string]string
	// Nameserver is written into resolv.conf; zero means the router, where
	// nothing answers.
	Nameserver netip.Addr
}

// A VM is a machine of its own as far as a script can tell: host name,
// network, processes, and its own /etc, /var, /usr/local, /opt, /root, /home
// and /srv, which outlive a reboot, /tmp and /run, which do not. The rest (/usr,
// /bin, /lib) is the machine's, and read-only. There is no Kubernetes and no
// systemd in it.
//
// When it boots it runs /etc/rc.local and the start scripts /etc/rc2.d/S* that
// something inside has put there.
//
// Its Run, Start, Shell, Dial, Listen and Capture work inside.
type VM struct {
	*Namespace
	network *Network
	disk    string // the world's folder with what the VM has written
	config  VMConfig

	mu     sync.Mutex
	init   *Process
	spaces spaces
}

// VM makes a VM and boots it.
func (w *World) VM(name string, config VMConfig) (*VM, error) {
	if config.Network == nil {
		return nil, fmt.Errorf("VM %s: Network is not set", name)
	}
	var err error
	if !config.Address.IsValid() {
		if config.Address, err = config.Network.Address(); err != nil {
			return nil, fmt.Errorf("VM %s: %w", name, err)
		}
	}
	if !config.Nameserver.IsValid() {
		config.Nameserver = config.Network.Gateway()
	}
	n, err := w.Namespace(name)
	if err != nil {
		return nil, err
	}
	if err := config.Network.Attach(n, config.Address); err != nil {
		return nil, fmt.Errorf("VM %s: %w", name, err)
	}
	for variable, value := range map[string]string{"HOME": "/root", "TMPDIR": "/tmp", "USER": "root"} {
		n.Setenv(variable, value)
	}
	vm := &VM{Namespace: n, network: config.Network, disk: w.Dir("vm-" + name), config: config}
	w.OnClose(vm.PowerOff)
	if err := vm.PowerOn(); err != nil {
		return nil, err
	}
	return vm, nil
}

// Network returns the network that the VM is plugged into.
func (vm *VM) Network() *Network { return vm.network }

// Run runs a shell script on the VM as root, as Shell does.
func (vm *VM) Run(ctx context.Context, script string) ([]byte, error) { return vm.Shell(ctx, script) }

// WriteFile writes a file on the VM.
func (vm *VM) WriteFile(ctx context.Context, path string, content []byte, mode os.FileMode) error {
	_, err := vm.Namespace.Run(ctx, Command{
		Name: "write-file", Path: "/bin/sh", Stdin: strings.NewReader(string(content)),
		Args: []string{"-euc", `mkdir -p "$(dirname "$1")"; cat >"$1"; chmod "$2" "$1"`, "sh", path, fmt.Sprintf("%o", mode.Perm())},
	})
	return err
}

// ReadFile reads a file of the VM.
func (vm *VM) ReadFile(ctx context.Context, path string) ([]byte, error) {
	return vm.Namespace.Run(ctx, Command{Name: "read-file", Path: "cat", Args: []string{"--", path}})
}

// Reboot kills everything that runs on the VM at once, as a loss of power
// does, and boots it again.
func (vm *VM) Reboot() error { return errors.Join(vm.PowerOff(), vm.PowerOn()) }

// PowerOff kills everything that runs on the VM. Its network stays plugged in.
func (vm *VM) PowerOff() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.init == nil {
		return nil
	}
	// The kernel ends the other processes of the VM with its first one, and
	// lets that be collected only when they are gone.
	err := vm.init.Kill()
	vm.Namespace.join(nil)
	vm.spaces.close()
	vm.init, vm.spaces = nil, spaces{}
	return err
}

// PowerOn boots the VM.
func (vm *VM) PowerOn() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.init != nil {
		return nil
	}
	machine, err := json.Marshal(machine{
		Host: vm.name, Disk: vm.disk, Address: vm.config.Address, Nameserver: vm.config.Nameserver, Files: vm.config.Files,
	})
	if err != nil {
		return err
	}
	said, says, err := os.Pipe()
	if err != nil {
		return err
	}
	defer said.Close()
	init, err := vm.Namespace.Start(Command{
		Name: "console", Path: "/proc/self/exe",
		Env:         []string{stageVar + "=" + stageMachine, machineVar + "=" + string(machine)},
		ExtraFiles:  []*os.File{says},
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC},
	})
	says.Close()
	if err != nil {
		return fmt.Errorf("VM %s: %w", vm.name, err)
	}
	if err := booted(said); err != nil {
		return errors.Join(fmt.Errorf("VM %s does not boot: %w: %s", vm.name, err, init.Log()), init.Kill())
	}
	spaces, err := openSpaces(init.Pid())
	if err != nil {
		return errors.Join(fmt.Errorf("VM %s: %w", vm.name, err), init.Kill())
	}
	vm.init, vm.spaces = init, spaces
	vm.Namespace.join(spaces.enter)
	return nil
}

// booted waits until the VM says that it is up.
func booted(said *os.File) error {
	if err := said.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	line, err := bufio.NewReader(said).ReadString('\n')
	if err != nil {
		return err
	}
	if line != machineUp {
		return fmt.Errorf("it says %q", line)
	}
	return nil
}

// join makes the namespace's programs enter further namespaces from now on.
func (n *Namespace) join(enter func() error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.enter = enter
}

// Processes lists what runs on the VM, for a person.
func (vm *VM) Processes() []string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.init == nil {
		return nil
	}
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", vm.init.Pid()))
	if err != nil {
		return nil
	}
	var names []string
	for _, p := range processesIn("pid", map[string]bool{space: true}) {
		names = append(names, p.command)
	}
	slices.Sort(names)
	return names
}

// Disk returns the path, outside of the VM, of what it has written below a
// folder that outlives reboots, such as /etc.
func (vm *VM) Disk(path string) string { return filepath.Join(vm.disk, path) }
