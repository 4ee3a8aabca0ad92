// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Where a VM has the echo program, and the scripts that its owner lets it run at boot.
const (
	vmEcho      = "/opt/echo"
	vmServe     = "/etc/rc2.d/S10echo"
	vmStartMesh = "/etc/rc2.d/S20mesh-agent"
)

// VM makes a virtual machine on a network. Its address is a free one unless it is given.
func (s *Stage) VM(_ context.Context, name, network string, address ...netip.Addr) (*bed.VM, error) {
	n, err := s.Network(network, bed.NetworkConfig{})
	if err != nil {
		return nil, err
	}
	config := bed.VMConfig{Network: n, Files: map[string]string{vmEcho: s.programs.Path("echo")}}
	if len(address) > 0 {
		config.Address = address[0]
	}
	vm, err := s.World.VM(name, config)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vms[name] = vm
	return vm, nil
}

// VMNamed returns a VM.
func (s *Stage) VMNamed(name string) (*bed.VM, error) {
	vm, ok := s.VMs()[name]
	if !ok {
		return nil, fmt.Errorf("there is no VM %q", name)
	}
	return vm, nil
}

// Invitation is what `mesh vm onboard` prints for the owner of a machine.
type Invitation struct {
	Line  string // to paste
	Token string // to type when the line asks for it
}

// Invite registers a VM by `mesh vm onboard`.
func (s *Stage) Invite(ctx context.Context, name string, flags ...string) (Invitation, error) {
	var invited Invitation
	vm, err := s.VMNamed(name)
	if err != nil {
		return invited, err
	}
	args := append([]string{"vm", "onboard", name, "--network", vm.Network().Name(), "-o", "json"}, flags...)
	text, err := s.MustMesh(ctx, args...)
	if err != nil {
		return invited, err
	}
	if err := json.Unmarshal([]byte(text), &invited); err != nil {
		return invited, fmt.Errorf("mesh vm onboard -o json: %w\n%s", err, text)
	}
	return invited, nil
}

// Paste runs a line on a VM, as root in its home, and types what it asks for.
func (s *Stage) Paste(ctx context.Context, name, line, typed string) (string, error) {
	vm, err := s.VMNamed(name)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	_, err = vm.Namespace.Run(ctx, bed.Command{
		Name: "paste", Path: "/bin/sh", Args: []string{"-c", line}, Dir: "/root",
		Stdin: strings.NewReader(typed + "\n"), Stdout: &out, Stderr: &out,
	})
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, &out)
	}
	return out.String(), err
}

// Onboard registers a VM, pastes the printed line on it, and lets the machine start the
// agent at boot: without systemd that is left to its owner.
func (s *Stage) Onboard(ctx context.Context, name string, flags ...string) (string, error) {
	invited, err := s.Invite(ctx, name, flags...)
	if err != nil {
		return "", err
	}
	out, err := s.Paste(ctx, name, invited.Line, invited.Token)
	if err != nil {
		return out, err
	}
	return invited.Line + "\n" + out, s.StartMeshAtBoot(ctx, name)
}

// StartMeshAtBoot is what the onboarding script asks of owners of machines without systemd.
func (s *Stage) StartMeshAtBoot(ctx context.Context, name string) error {
	vm, err := s.VMNamed(name)
	if err != nil {
		return err
	}
	return vm.WriteFile(ctx, vmStartMesh, []byte("#!/bin/sh\nexec /usr/local/sbin/mesh-agent-service start\n"), 0o755)
}

// Serve runs the echo program on a VM, now and after each reboot.
func (s *Stage) Serve(vm *bed.VM, args ...string) error {
	ctx := context.Background()
	line := fmt.Sprintf("#!/bin/sh\n%s %s >/var/log/echo.log 2>&1 &\n", vmEcho, strings.Join(args, " "))
	if err := vm.WriteFile(ctx, vmServe, []byte(line), 0o755); err != nil {
		return err
	}
	_, err := vm.Run(ctx, vmServe)
	return err
}

// CallFromVM runs `echo call` on a VM.
func (s *Stage) CallFromVM(ctx context.Context, name string, args ...string) (Report, error) {
	vm, err := s.VMNamed(name)
	if err != nil {
		return Report{}, err
	}
	var out, errs bytes.Buffer
	_, err = vm.Namespace.Run(ctx, bed.Command{Name: "call", Path: vmEcho, Args: append([]string{"call"}, args...), Stdout: &out, Stderr: &errs})
	if err != nil {
		err = fmt.Errorf("%s: call %s: %w\n%s%s", name, strings.Join(args, " "), err, &errs, &out)
	}
	return Report{Text: out.String(), Err: err}, nil
}
