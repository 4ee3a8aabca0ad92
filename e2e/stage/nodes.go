// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/dns"
	"github.com/isthmus-mesh/isthmus/e2e/kubelet"
)

// nodes are the kubelet and the DNS of one cluster.
type nodes struct {
	kubelet *kubelet.Kubelet
	cancel  context.CancelFunc
	done    sync.WaitGroup

	mu   sync.Mutex
	pods map[string]string // a workload's first pod, by workload
}

// startNodes runs the kubelet and the DNS of a cluster and waits for its nodes.
func (s *Stage) startNodes(ctx context.Context, c *bed.Cluster, config ClusterConfig) (*nodes, error) {
	client, err := kubelet.NewClient(c.Config())
	if err != nil {
		return nil, err
	}
	running, cancel := context.WithCancel(context.Background())
	n := &nodes{cancel: cancel, pods: map[string]string{}}
	server, err := s.startDNS(running, n, c)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("cluster DNS: %w", err)
	}
	dir := s.World.Dir("kubelet-" + c.Name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		cancel()
		return nil, err
	}
	members, err := s.nodesOf(c, config)
	if err != nil {
		cancel()
		return nil, err
	}
	n.kubelet, err = kubelet.New(kubelet.Config{
		Client: client, Nodes: members, Network: kubelet.InBed(c.Network()), Images: s.images(), Dir: dir,
		DNS: []netip.Addr{server}, Env: []string{"CLUSTER=" + c.Name()},
		APIServer: netip.AddrPortFrom(c.Addr(), 6443), ProbeFrom: c.Network().Router(), Log: s.config.Log,
	})
	if err != nil {
		cancel()
		return nil, err
	}
	failed := make(chan error, 1)
	n.done.Go(func() { failed <- n.kubelet.Run(running) })
	select {
	case <-n.kubelet.Ready():
		return n, nil
	case err := <-failed:
		cancel()
		return nil, errors.Join(errors.New("the kubelet ended"), err)
	case <-ctx.Done():
		cancel()
		return nil, ctx.Err()
	}
}

func (s *Stage) nodesOf(c *bed.Cluster, config ClusterConfig) ([]kubelet.Node, error) {
	var all []kubelet.Node
	for i := range max(1, config.Nodes) {
		pods, err := c.Network().NodeRange()
		if err != nil {
			return nil, err
		}
		labels := map[string]string{}
		if config.Region != "" {
			labels["topology.kubernetes.io/region"] = config.Region
		}
		if config.Zone != "" {
			labels["topology.kubernetes.io/zone"] = config.Zone
		}
		listener, err := c.Namespace().Listen("tcp", netip.AddrPortFrom(c.Addr(), uint16(10250+i)).String())
		if err != nil {
			return nil, err
		}
		all = append(all, kubelet.Node{
			Name: fmt.Sprintf("%s-%d", c.Name(), i), Pods: []netip.Prefix{pods}, Labels: labels, Address: c.Addr(), Listener: listener,
		})
	}
	return all, nil
}

// startDNS answers for the services of the cluster, at an address on the pods' bridge
// that stands for the ClusterIP of its DNS service.
func (s *Stage) startDNS(ctx context.Context, n *nodes, c *bed.Cluster) (netip.Addr, error) {
	return dns.InBed(ctx, &n.done, c)
}

// shelf is where the programs of images lie, on the bed's private /run. Users of containers
// cannot go through a home directory, where checkouts and caches often are; and proxies
// mount a volume over /run/isthmus, where the world's own folder is.
func (s *Stage) shelf(name string) string {
	return filepath.Join(bed.ProgramsDir, s.World.Name(), name)
}

// fillShelf shows every program there.
func (s *Stage) fillShelf() error {
	if err := os.MkdirAll(s.shelf(""), 0o755); err != nil {
		return err
	}
	for name, path := range map[string]string{
		"echo": s.programs.Path("echo"), "mesh-agent": s.programs.Path("mesh-agent"), "envoy": s.World.Binaries().Envoy,
	} {
		place := s.shelf(name)
		if err := os.WriteFile(place, nil, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(path, place, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("show %s at %s: %w", path, place, err)
		}
		s.World.OnClose(func() error { return unix.Unmount(place, unix.MNT_DETACH) })
	}
	return nil
}

// images are the names that manifests of the stories use.
func (s *Stage) images() map[string]kubelet.Image {
	path := "PATH=" + s.shelf("") + ":/usr/sbin:/usr/bin:/sbin:/bin"
	all := []string{s.shelf("echo"), s.shelf("mesh-agent"), s.shelf("envoy")}
	return map[string]kubelet.Image{
		"isthmus/echo":  {Path: s.shelf("echo"), Env: []string{path}, Files: all},
		"isthmus/proxy": {Path: s.shelf("mesh-agent"), Env: []string{path}, Files: all},
	}
}

// exec runs a command in a container of "namespace/name", also while the API server is away.
func (n *nodes) exec(ctx context.Context, pod, container string, command []string, stdin io.Reader, stdout, stderr io.Writer) error {
	namespace, name, _ := strings.Cut(pod, "/")
	return n.kubelet.Exec(ctx, namespace, name, container, command, stdin, stdout, stderr)
}

// kill sends a signal to the processes of a container.
func (n *nodes) kill(pod, container string, signal syscall.Signal) error {
	namespace, name, _ := strings.Cut(pod, "/")
	return n.kubelet.Signal(namespace, name, container, signal)
}

func (n *nodes) remember(workload, pod string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods[workload] = pod
}

func (n *nodes) remembered(workload string) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	pod, ok := n.pods[workload]
	return pod, ok
}

// stopNodes ends the kubelet with its pods, and the DNS.
func (c *Cluster) stopNodes() {
	c.nodes.cancel()
	ended := make(chan struct{})
	go func() { c.nodes.done.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(Patience): // the world's end kills what is left, and says so
	}
}
