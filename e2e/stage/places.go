// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/api"
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
	err := s.Exec(ctx, cluster, pod, ProxyContainer, &out, "echo", "get", "http://127.0.0.1:15000"+page)
	return out.String(), err
}

// Doors are the ways in for a person's second terminal.
type Doors struct {
	Kubeconfig, MeshConfig string // files
	Programs               string // folder of mesh and kubectl
	Page                   string // host:port on the machine's loopback
}

// OpenDoors forwards the API servers, meshd's admin port and one pod's port to the
// machine's loopback, and writes the files that lead there. Files and forwarders go with
// the stage.
func (s *Stage) OpenDoors(ctx context.Context, cluster, workload string, port uint16) (Doors, error) {
	var d Doors
	// Not the bed's own folder for temporary files, which nobody outside can see.
	folder, err := bed.NewFolder("/tmp", "isthmus-demo-")
	if err != nil {
		return d, err
	}
	s.World.OnClose(folder.Remove)
	dir := folder.Path
	d.Kubeconfig, d.MeshConfig, d.Programs = filepath.Join(dir, "kubeconfig"), filepath.Join(dir, "admin.conf"), filepath.Join(dir, "bin")
	kubeconfig, err := s.World.ForwardedKubeconfig()
	if err != nil {
		return d, err
	}
	if err := s.linkPrograms(d.Programs); err != nil {
		return d, err
	}
	if err := os.WriteFile(d.Kubeconfig, kubeconfig, 0o600); err != nil {
		return d, err
	}
	admin, err := api.LoadAdminConfig(filepath.Join(s.first.dataDir, "admin.conf"))
	if err != nil {
		return d, err
	}
	door, err := s.first.Host.Forward(0, s.first.Host.Addr().String()+":8443")
	if err != nil {
		return d, err
	}
	admin.Server = "https://" + door.Addr()
	text, err := yaml.Marshal(admin)
	if err != nil {
		return d, err
	}
	if err := os.WriteFile(d.MeshConfig, text, 0o600); err != nil {
		return d, err
	}
	pods, err := s.Pods(ctx, cluster, workload)
	if err != nil || len(pods) == 0 {
		return d, fmt.Errorf("no pod of %s in %s: %w", workload, cluster, err)
	}
	c, err := s.cluster(cluster)
	if err != nil {
		return d, err
	}
	page, err := c.Network().Router().Forward(0, fmt.Sprintf("%s:%d", pods[0].Status.PodIP, port))
	if err != nil {
		return d, err
	}
	d.Page = page.Addr()
	return d, nil
}

// linkPrograms puts mesh and kubectl into a folder of their own.
func (s *Stage) linkPrograms(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for name, path := range map[string]string{"mesh": s.programs.Path("mesh"), "kubectl": s.World.Binaries().Kubectl} {
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}
