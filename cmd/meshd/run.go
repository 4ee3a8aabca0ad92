// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/caserver"
	caetcd "github.com/isthmus-mesh/isthmus/ca/etcd"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// daemon is everything one meshd runs. It is wired top down: state, identity, sources,
// proxies, people.
type daemon struct {
	config  Configuration
	log     *slog.Logger
	replica string
	started time.Time

	live, ready health
	metrics     *prometheus.Registry

	database  *etcd.Database
	sealer    *ca.FileSealer
	store     *etcd.Store
	audit     *ca.AuditLog
	heads     *ca.Checkpoints
	authority *ca.Authority
	jwt       *ca.JWTAuthority
	attestor  *attest.Attestor
	tokens    *caetcd.Tokens
	serving   *caserver.Serving
	runner    *registry.Runner
	pipeline  *xdsserver.Pipeline
	stale     *staleness
	gate      *xdsserver.Gate
	streams   *xdsserver.Server
	peers     *apiserver.PeerGroup
	admin     *apiserver.Server
	mesh      *grpc.Server

	// run starts a loop that goes on until meshd ends; its failure ends meshd.
	run func(name string, loop func(context.Context) error)
}

// serve runs meshd until ctx ends, drains, and returns. The plain listener comes first, so
// that whoever waits can see what is missing; members are never waited for.
func serve(ctx context.Context, c Configuration, stderr io.Writer) (err error) {
	d, err := newDaemon(c, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	diagnosing, err := d.diagnose()
	if err != nil {
		return err
	}
	defer diagnosing.Close()
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, running := errgroup.WithContext(running)
	d.run = func(name string, loop func(context.Context) error) {
		group.Go(func() error {
			if err := loop(running); err != nil && running.Err() == nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	if err := d.wire(ctx, running); err != nil {
		stop()
		return errors.Join(err, ignoreStop(group.Wait()))
	}
	if err := d.listen(running); err != nil {
		stop()
		return errors.Join(err, ignoreStop(group.Wait()))
	}
	d.log.Info("meshd is up", "replica", d.replica, "mesh", c.Listen.Mesh, "admin", c.Listen.Admin, "advertised", c.Advertise)
	select {
	case <-ctx.Done():
		d.drain()
	case <-running.Done():
	}
	stop()
	return ignoreStop(group.Wait())
}

// wire puts meshd together. The first signal ends a start that waits for something.
func (d *daemon) wire(ctx, running context.Context) error {
	starting, cancel := context.WithCancel(running)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	for _, step := range []struct {
		name string
		wire func(context.Context) error
	}{
		{"etcd", d.openState}, {"authority", d.openAuthority}, {"sources", d.wireSources},
		{"proxies", d.wireProxies}, {"admin", d.wireAdmin},
	} {
		if err := step.wire(starting); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

func ignoreStop(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func newDaemon(c Configuration, stderr io.Writer) (*daemon, error) {
	log, err := newLog(c.Log, stderr)
	if err != nil {
		return nil, err
	}
	replica, err := c.replica()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("--data-dir %s: %w", c.DataDir, err)
	}
	d := &daemon{config: c, log: log, replica: replica, started: time.Now(), metrics: prometheus.NewRegistry()}
	d.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), buildInfo())
	return d, nil
}

func newLog(c LogConfiguration, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, err
	}
	options := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return slog.New(slog.NewTextHandler(w, options)), nil
}

// diagnose serves health and metrics, before anything else can be asked.
func (d *daemon) diagnose() (*http.Server, error) {
	d.ready.add("started", func() error {
		if d.streams == nil {
			return errStarting
		}
		return nil
	})
	l, err := net.Listen("tcp", d.config.Listen.Diagnostics)
	if err != nil {
		return nil, fmt.Errorf("--listen-diagnostics: %w", err)
	}
	server := &http.Server{Handler: diagnostics(&d.live, &d.ready, d.metrics), ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			d.log.Error("diagnostics ended", "err", err)
		}
	}()
	return server, nil
}

// listen opens the two ports for proxies and for people.
func (d *daemon) listen(ctx context.Context) error {
	mesh, err := net.Listen("tcp", d.config.Listen.Mesh)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	admin, err := net.Listen("tcp", d.config.Listen.Admin)
	if err != nil {
		return errors.Join(fmt.Errorf("--listen-admin: %w", err), mesh.Close())
	}
	context.AfterFunc(ctx, d.mesh.Stop)
	d.run("proxies' port", func(context.Context) error { return d.mesh.Serve(d.gate.Listener(mesh)) })
	d.run("admin port", func(ctx context.Context) error { return d.admin.Serve(ctx, admin, d.serving.TLS("h2", "http/1.1")) })
	d.run("replica", d.announce)
	return nil
}

// drain lets whoever balances over replicas learn that this one ends, then moves its
// streams to the others, spread over some seconds.
func (d *daemon) drain() {
	d.log.Info("draining", "delay", time.Duration(d.config.DrainDelay))
	draining := errors.New("draining")
	d.ready.add("draining", func() error { return draining })
	<-time.After(time.Duration(d.config.DrainDelay))
	spread := drainSpread(d.streams.Streams())
	ctx, cancel := context.WithTimeout(context.Background(), spread+drainMargin)
	defer cancel()
	if err := d.streams.Drain(ctx, spread); err != nil {
		d.log.Warn("not all proxies have moved", "err", err)
	}
}

// How long streams are closed: so many at a time that the other replicas can take them in
// as they come, but not so long that whoever stops meshd loses patience.
const (
	drainPerStream = 2 * time.Millisecond
	drainAtLeast   = 2500 * time.Millisecond
	drainAtMost    = 20 * time.Second
	drainMargin    = 2500 * time.Millisecond // for the last ones to go
)

// drainSpread is what closing so many streams is spread over.
func drainSpread(streams int) time.Duration {
	return min(max(drainAtLeast, time.Duration(streams)*drainPerStream), drainAtMost)
}

// close ends what has no loop, last opened first.
func (d *daemon) close() error {
	var errs []error
	if d.peers != nil {
		errs = append(errs, d.peers.Close())
	}
	if d.audit != nil {
		errs = append(errs, d.audit.Close())
	}
	if d.database != nil {
		errs = append(errs, d.database.Close())
	}
	return errors.Join(errs...)
}
