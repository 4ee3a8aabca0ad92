// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Control is one replica of the control service on a host of its own.
type Control struct {
	Process *bed.Process
	Host    *bed.Namespace

	name    string
	dataDir string
	program string // meshd
}

// ControlConfig says how a replica runs.
type ControlConfig struct {
	// Etcd is an external etcd that replicas share; nil means an embedded one.
	Etcd *bed.Etcd
	// Front, if any, is the load balancer under whose address all replicas are known.
	Front *Front
	// Flags are added to meshd's.
	Flags []string
}

// Control starts meshd on a host of its own and waits until it is ready. The first one's
// admin.conf goes to the laptop. Replicas share the first one's sealing key.
func (s *Stage) Control(ctx context.Context, name string, config ControlConfig) (*Control, error) {
	host, err := s.World.Host(name)
	if err != nil {
		return nil, err
	}
	c := &Control{Host: host, name: name, dataDir: s.World.Dir("meshd-" + name), program: s.programs.Path("meshd")}
	if err := os.MkdirAll(c.dataDir, 0o700); err != nil {
		return nil, err
	}
	s.mu.Lock()
	first := s.first
	if first == nil {
		s.first = c
	}
	s.controls[name] = c
	s.mu.Unlock()
	if config.Front != nil {
		config.Front.add(host.Addr())
	}
	c.Process, err = host.Start(bed.Command{Name: "meshd", Path: s.programs.Path("meshd"), Args: c.flags(s, first, config)})
	if err != nil {
		return nil, err
	}
	if err := c.WaitReady(ctx); err != nil {
		return nil, err
	}
	if first == nil {
		s.Laptop.Setenv("MESH_CONFIG", c.AdminFile())
	}
	return c, nil
}

// flags are those of meshd. Its hosts share one host name, so that each replica is given
// its own.
func (c *Control) flags(s *Stage, first *Control, config ControlConfig) []string {
	var flags []string
	if config.Front != nil {
		flags = append(flags, "--advertise", config.Front.Addr().String()+":15012")
	}
	flags = append(flags,
		"--data-dir", c.dataDir, "--replica", c.name, "--advertise", c.Host.Addr().String()+":15012",
		"--envoy-program", s.World.Binaries().Envoy, "--agent-program", s.programs.Path("mesh-agent"),
	)
	if first != nil {
		// All replicas are one service: each is known under the first one's address too.
		flags = append(flags, "--advertise", first.Host.Addr().String()+":15012", "--sealing-key", filepath.Join(first.dataDir, "sealing.key"))
	}
	if e := config.Etcd; e != nil {
		flags = append(flags, "--etcd-endpoints", strings.Join(e.Endpoints(), ","),
			"--etcd-cacert", e.CAFile, "--etcd-cert", e.CertFile, "--etcd-key", e.KeyFile)
	}
	return append(flags, config.Flags...)
}

// WaitReady waits until the replica says that it is ready.
func (c *Control) WaitReady(ctx context.Context) error {
	_, err := Until(ctx, Patience, func() error {
		if !c.Process.Running() {
			return fmt.Errorf("meshd %s ended: %v\n%s", c.name, c.Process.Err(), tail(c.Process.LogFile(), 20))
		}
		status, body, err := c.Host.Get(ctx, "http://127.0.0.1:15014/readyz?verbose")
		if err == nil && status != 200 {
			err = fmt.Errorf("meshd %s: /readyz: %d\n%s", c.name, status, body)
		}
		return err
	})
	return err
}

// Restart starts a replica that was killed or stopped, and tells how long it took to be ready.
func (c *Control) Restart(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	if err := c.Process.Start(); err != nil {
		return 0, err
	}
	err := c.WaitReady(ctx)
	return time.Since(start), err
}

// AdminFile is the admin.conf that leads to this very replica.
func (c *Control) AdminFile() string { return filepath.Join(c.dataDir, "admin.conf") }

// DataDir is where the replica keeps its state.
func (c *Control) DataDir() string { return c.dataDir }

// Metric returns the sum of all series of a metric.
func (c *Control) Metric(ctx context.Context, name string) (float64, error) {
	_, body, err := c.Host.Get(ctx, "http://127.0.0.1:15014/metrics")
	if err != nil {
		return 0, err
	}
	return sumSeries(body, name)
}

// sumSeries adds up the series of one metric in the text format.
func sumSeries(text, name string) (float64, error) {
	var sum float64
	found := false
	for line := range strings.SplitSeq(text, "\n") {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		var value float64
		if _, err := fmt.Sscan(rest[strings.LastIndexByte(rest, ' ')+1:], &value); err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += value
		found = true
	}
	if !found {
		return 0, fmt.Errorf("there is no metric %s", name)
	}
	return sum, nil
}
