// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"syscall"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Controls are the replicas of the control service, by name.
func (s *Stage) Controls() map[string]*Control {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.controls)
}

// Networks by name.
func (s *Stage) Networks() map[string]*bed.Network {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.networks)
}

// VMs by name.
func (s *Stage) VMs() map[string]*bed.VM {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.vms)
}

// ClusterNamed returns a cluster.
func (s *Stage) ClusterNamed(name string) (*Cluster, error) { return s.cluster(name) }

// FirstPod is the first pod of a workload, "namespace/name".
func (s *Stage) FirstPod(ctx context.Context, cluster, workload string) (string, error) {
	_, pod, err := s.callerPod(ctx, cluster, workload)
	return pod, err
}

// Exec runs a command in a container of a pod ("namespace/name"), also while the API
// server is away.
func (s *Stage) Exec(ctx context.Context, cluster, pod, container string, stdout io.Writer, command ...string) error {
	c, err := s.cluster(cluster)
	if err != nil {
		return err
	}
	var errs bytes.Buffer
	if stdout == nil {
		stdout = io.Discard
	}
	if err := c.nodes.exec(ctx, pod, container, command, nil, stdout, &errs); err != nil {
		return fmt.Errorf("%s in %s: %s: %w\n%s", container, pod, strings.Join(command, " "), err, &errs)
	}
	return nil
}

// Signal sends a signal to a container of a pod.
func (s *Stage) Signal(cluster, pod, container string, signal syscall.Signal) error {
	c, err := s.cluster(cluster)
	if err != nil {
		return err
	}
	return c.nodes.kill(pod, container, signal)
}

// ProxyContainer is the name of the container that injection adds.
const ProxyContainer = "isthmus-proxy"

// Envoy returns a page of the administration of the Envoy in a workload's first pod
// ("namespace/app"), or in the pod itself ("namespace/pod/").
func (s *Stage) Envoy(ctx context.Context, cluster, workload, page string) (string, error) {
	pod, direct := strings.CutSuffix(workload, "/")
	if !direct {
		var err error
		if pod, err = s.FirstPod(ctx, cluster, workload); err != nil {
			return "", err
		}
	}
	var out bytes.Buffer
	err := s.Exec(ctx, cluster, pod, ProxyContainer, &out, s.programs.Path("echo"), "get", "http://127.0.0.1:15000"+page)
	return out.String(), err
}

// VM makes a virtual machine on a network.
func (s *Stage) VM(_ context.Context, name, network string) (*bed.VM, error) {
	n, err := s.Network(network, bed.NetworkConfig{})
	if err != nil {
		return nil, err
	}
	vm, err := s.World.VM(name, bed.VMConfig{Network: n})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vms[name] = vm
	return vm, nil
}

// Onboard registers a VM by `mesh vm onboard`, and pastes the line it prints on the VM, the
// token on its standard input.
func (s *Stage) Onboard(ctx context.Context, name string, flags ...string) (string, error) {
	vm, ok := s.VMs()[name]
	if !ok {
		return "", fmt.Errorf("there is no VM %q", name)
	}
	file := s.World.Dir("token-" + name)
	args := append([]string{"vm", "onboard", name, "--network", vm.Network().Name(), "--token-file", file}, flags...)
	line, err := s.MustMesh(ctx, args...)
	if err != nil {
		return "", err
	}
	token, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	if err := vm.WriteFile(ctx, "/root/token", token, 0o600); err != nil {
		return "", err
	}
	out, err := vm.Run(ctx, strings.TrimSpace(line)+" --token-file /root/token")
	return line + string(out), err
}
