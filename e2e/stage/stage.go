// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Patience is how long a story waits for a condition.
const Patience = 30 * time.Second

// Config of a Stage.
type Config struct {
	// Log hears of what happens by itself; nil means silence.
	Log *slog.Logger
	// KeepLogs is a folder for the logs of all processes; see bed.WorldConfig.
	KeepLogs string
	// Flat puts all clusters that name no network on one; else each has its own.
	Flat bool
}

// Stage is one mesh in one world. Its methods may be called from several goroutines.
type Stage struct {
	World    *bed.World
	Laptop   *bed.Namespace // where mesh and kubectl are run
	programs Programs
	config   Config

	mu       sync.Mutex
	networks map[string]*bed.Network
	clusters map[string]*Cluster
	controls map[string]*Control
	vms      map[string]*bed.VM
	first    *Control // whose admin.conf the laptop uses
	loads    []*Load  // calls in the background, stopped first
}

// New makes an empty stage. The program must be inside the bed.
func New(config Config) (*Stage, error) {
	programs, err := FindPrograms()
	if err != nil {
		return nil, err
	}
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	world, err := bed.NewWorld(bed.WorldConfig{Logger: config.Log, KeepLogs: config.KeepLogs})
	if err != nil {
		return nil, err
	}
	s := &Stage{
		World: world, programs: programs, config: config,
		networks: map[string]*bed.Network{}, clusters: map[string]*Cluster{},
		controls: map[string]*Control{}, vms: map[string]*bed.VM{},
	}
	if err := s.fillShelf(); err != nil {
		return nil, errors.Join(err, world.Close())
	}
	if s.Laptop, err = world.Laptop("laptop"); err != nil {
		return nil, errors.Join(err, world.Close())
	}
	s.Laptop.Setenv("NO_COLOR", "1")
	return s, nil
}

// Close ends everything and reports what would not go.
func (s *Stage) Close() error {
	s.mu.Lock()
	loads := s.loads
	s.mu.Unlock()
	for _, l := range loads {
		l.stdin.Close()
	}
	for _, c := range s.allClusters() {
		c.stopNodes()
	}
	return s.World.Close()
}

// Network returns the network of that name, made on first use with the default ranges,
// which are those of all others.
func (s *Stage) Network(name string, config bed.NetworkConfig) (*bed.Network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.networks[name]; ok {
		return n, nil
	}
	n, err := s.World.Network(name, config)
	if err == nil {
		s.networks[name] = n
	}
	return n, err
}

// Cluster returns a cluster by name.
func (s *Stage) cluster(name string) (*Cluster, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c, ok := s.clusters[name]; ok {
		return c, nil
	}
	return nil, fmt.Errorf("there is no cluster %q on the stage", name)
}

func (s *Stage) allClusters() []*Cluster {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*Cluster
	for _, c := range s.clusters {
		all = append(all, c)
	}
	return all
}

// Result is what a program run on the laptop came to.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// Run runs a program on the laptop to its end. Its error is for programs that could not
// be run at all; a failure of the program itself is in the code.
func (s *Stage) Run(ctx context.Context, stdin io.Reader, path string, args ...string) (Result, error) {
	var stdout, stderr bytes.Buffer
	p, err := s.Laptop.Start(bed.Command{
		Name: "laptop", Path: path, Args: args, Stdin: stdin, Stdout: &stdout, Stderr: &stderr,
	})
	if err != nil {
		return Result{}, err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		err := errors.Join(ctx.Err(), p.Kill())
		<-p.Done()
		return Result{Stdout: stdout.String(), Stderr: stderr.String()}, fmt.Errorf("%s: %w\n%s%s", path, err, &stdout, &stderr)
	}
	r := Result{Stdout: stdout.String(), Stderr: stderr.String()}
	if exit := new(exec.ExitError); errors.As(p.Err(), &exit) {
		r.Code = exit.ExitCode()
	} else if p.Err() != nil {
		return r, p.Err()
	}
	return r, nil
}

// Mesh runs mesh on the laptop.
func (s *Stage) Mesh(ctx context.Context, args ...string) (Result, error) {
	return s.Run(ctx, nil, s.programs.Path("mesh"), args...)
}

// MustMesh is Mesh whose failure is an error that shows what it printed.
func (s *Stage) MustMesh(ctx context.Context, args ...string) (string, error) {
	r, err := s.Mesh(ctx, args...)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("mesh %s: exit code %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout, err
}

// Kubectl runs kubectl on the laptop, with the context of a cluster.
func (s *Stage) Kubectl(ctx context.Context, cluster string, stdin io.Reader, args ...string) (Result, error) {
	args = append([]string{"--context", cluster}, args...)
	return s.Run(ctx, stdin, s.World.Binaries().Kubectl, args...)
}

// Apply applies YAML to a cluster, with the proxy injected where inject says so.
func (s *Stage) Apply(ctx context.Context, cluster, manifests string, inject bool) error {
	if inject {
		c, err := s.cluster(cluster)
		if err != nil {
			return err
		}
		r, err := s.Run(ctx, strings.NewReader(manifests), s.programs.Path("mesh"), "inject", "--cluster", c.inMesh(), "-f", "-")
		if err != nil {
			return err
		}
		if r.Code != 0 {
			return fmt.Errorf("mesh inject: exit code %d\n%s", r.Code, r.Stderr)
		}
		manifests = r.Stdout
	}
	r, err := s.Kubectl(ctx, cluster, strings.NewReader(manifests), "apply", "-f", "-")
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("kubectl apply: exit code %d\n%s", r.Code, r.Stderr)
	}
	return err
}

// Join joins a cluster to the mesh by the command a person would type.
func (s *Stage) Join(ctx context.Context, name string, flags ...string) (string, error) {
	c, err := s.cluster(name)
	if err != nil {
		return "", err
	}
	args := append([]string{"join", "cluster", name, "--context", name, "--network", c.network, "--yes"}, flags...)
	return s.MustMesh(ctx, args...)
}

// Until repeats a condition until it holds or patience ends, and says how long it took.
func Until(ctx context.Context, patience time.Duration, condition func() error) (time.Duration, error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		err := condition()
		if err == nil {
			return time.Since(start), nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return time.Since(start), fmt.Errorf("after %v it still does not hold: %w", patience, err)
		}
	}
}

// Tails are the ends of what the replicas of the control service logged, for who has only
// a failed story's output.
func (s *Stage) Tails(lines int) string {
	var b strings.Builder
	controls := s.Controls()
	for _, name := range slices.Sorted(maps.Keys(controls)) {
		if p := controls[name].Process; p != nil {
			fmt.Fprintf(&b, "the last lines of meshd %s:\n%s\n", name, tail(p.LogFile(), lines))
		}
	}
	return b.String()
}

// tail is the end of a file.
func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
