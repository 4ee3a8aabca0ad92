// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/agent/dns"
	"github.com/isthmus-mesh/isthmus/agent/envoy"
	"github.com/isthmus-mesh/isthmus/agent/health"
	"github.com/isthmus-mesh/isthmus/agent/identity"
	"github.com/isthmus-mesh/isthmus/agent/redirect"
	"github.com/isthmus-mesh/isthmus/agent/relay"
	"github.com/isthmus-mesh/isthmus/agent/report"
	"github.com/isthmus-mesh/isthmus/agent/sds"
	"github.com/isthmus-mesh/isthmus/ca/workloadapi"
)

// dialTimeout bounds each attempt to reach meshd.
const dialTimeout = 5 * time.Second

// meshProtocols are what clients inside the mesh offer (ALPN) and gateways ask for.
var meshProtocols = []string{"istio", "isthmus"}

// Agent is the running whole. Make it with New.
type Agent struct {
	config Config
	log    *slog.Logger

	keeper  *identity.Keeper
	relay   *relay.Relay
	memory  *relay.Memory
	secrets *sds.Server
	names   *dns.Server // nil without DNS
	process *envoy.Process
	status  *health.Server
	checker *report.Checker     // VM only
	svids   *workloadapi.Server // nil without a socket for it
	tokens  *identity.Tokens    // likewise
	metrics *prometheus.Registry

	listening listening
}

// New checks the configuration and puts the parts together. Nothing runs and
// nothing is opened yet.
func New(c Config, log *slog.Logger) (*Agent, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := c.complete(); err != nil {
		return nil, err
	}
	probes, err := health.ParseProbes(c.Probes)
	if err != nil {
		return nil, err
	}
	a := &Agent{config: c, log: log, metrics: prometheus.NewRegistry()}
	a.keeper = a.newKeeper()
	a.secrets = &sds.Server{Source: a.keeper, Log: log}
	a.memory = &relay.Memory{Path: c.memoryPath(), Node: c.bootstrapConfig().NodeID() + "~" + c.Network, Log: log}
	a.relay = &relay.Relay{
		Servers:     c.servers,
		Credentials: identity.Credentials(a.keeper),
		Ready:       a.certified,
		Dial:        dialMeshd,
		Expires:     a.expires,
		Beside:      a.keepTrust,
		Memory:      a.memory,
		Log:         log,
	}
	if !c.NoDNS {
		a.names = &dns.Server{
			Namespace:     c.Namespace,
			Domain:        c.Domain,
			ResolvConf:    c.ResolvConf,
			Authoritative: c.Role == VM,
			Dial:          redirect.QueryDialer(dialTimeout),
			Metrics:       dns.NewMetrics(a.metrics),
			Log:           log,
		}
		a.relay.Names = a.names.SetNames
	}
	a.process = &envoy.Process{
		Path:         c.Envoy,
		Bootstrap:    c.bootstrapPath(),
		Admin:        c.adminAddress(),
		UID:          c.EnvoyUID,
		PIDFile:      c.pidFile(),
		LogLevel:     c.EnvoyLogLevel,
		Concurrency:  c.Concurrency,
		Drain:        c.Drain,
		DrainAtLeast: c.DrainAtLeast,
		InboundOnly:  c.Role != Gateway,
		Log:          log,
	}
	if c.Role == VM {
		a.checker = a.newChecker()
	}
	if c.WorkloadSocket != "" {
		a.tokens = &identity.Tokens{Servers: c.servers, Keeper: a.keeper, Dial: dialMeshd, Log: log}
		a.svids = a.newWorkloadAPI()
	}
	a.status = a.newStatus(probes)
	a.register()
	return a, nil
}

// newKeeper keeps the identity on disk in all roles: on a VM for the reboot, in
// a pod for the restart of this container, whose token meshd binds to the key.
// What is trusted besides the answer is the mounted file in a pod; on a VM that
// file is only what the first contact was pinned to.
func (a *Agent) newKeeper() *identity.Keeper {
	c := &a.config
	k := &identity.Keeper{
		Store: &identity.Store{Path: c.identityPath()},
		Log:   a.log,
	}
	if c.Role == VM {
		k.FirstRootsFile = c.RootCertFile
	} else {
		k.RootsFile = c.RootCertFile
	}
	k.Issuer = &identity.GRPC{
		Servers:   c.servers,
		TokenFile: c.TokenFile,
		Roots:     k.Roots,
		Cluster:   c.ClusterID,
		Dial:      dialMeshd,
	}
	return k
}

func dialMeshd(ctx context.Context, address string) (net.Conn, error) {
	return redirect.Dialer(dialTimeout).DialContext(ctx, "tcp", address)
}

func (a *Agent) certified(ctx context.Context) error {
	_, err := a.keeper.Wait(ctx)
	return err
}

// expires is when the present certificate ends, zero without one, and a channel that is
// closed at the next one.
func (a *Agent) expires() (time.Time, <-chan struct{}) {
	changed := a.keeper.Changed()
	cert, err := a.keeper.Current()
	if err != nil {
		return time.Time{}, changed
	}
	return cert.Leaf.NotAfter, changed
}

func (a *Agent) connection() report.Connection {
	return report.Connection{
		Servers:     a.config.servers,
		Credentials: identity.Credentials(a.keeper),
		Ready:       a.certified,
		Dial:        dialMeshd,
		Log:         a.log,
	}
}

// Run opens the sockets, starts everything, and returns when ctx has ended and
// Envoy is drained and gone, or when a part cannot go on.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.prepare(ctx); err != nil {
		return err
	}
	defer a.listening.close()
	// Whatever Envoy and the workload need during the drain lives in this
	// second context, which ends after Envoy.
	live, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	parts, live := errgroup.WithContext(live)
	// A part that fails ends live, and that must end Envoy too.
	running, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(live, stop)()
	defer context.AfterFunc(ctx, a.leave)()

	a.serve(live, parts)
	parts.Go(func() error {
		defer cancel() // the end of Envoy is the end of all
		return a.process.Run(running)
	})
	notify("READY=1\nSTATUS=running")
	a.log.Info("agent running", "role", a.config.Role, "server", a.config.Server, "workload", a.config.Name+"."+a.config.Namespace, "version", a.config.Version)
	err := parts.Wait()
	notify("STOPPING=1")
	return err
}

// Renew renews the workload's certificate now, by the one it has.
func (a *Agent) Renew() { a.keeper.Renew() }

// leave tells everybody who asks that we are going, before Envoy begins to.
func (a *Agent) leave() {
	a.status.Drain()
	if a.checker != nil {
		a.checker.Leave("the agent is being stopped")
	}
}

// serve starts everything but Envoy.
func (a *Agent) serve(live context.Context, parts *errgroup.Group) {
	parts.Go(func() error { return a.keeper.Run(live) })
	parts.Go(func() error { return a.memory.Run(live) })
	parts.Go(func() error { return a.serveSocket(live) })
	parts.Go(func() error { return serveHTTP(live, a.listening.ready, a.status.ReadyHandler()) })
	parts.Go(func() error { return serveHTTP(live, a.listening.status, a.status.Handler()) })
	if a.names != nil {
		parts.Go(func() error { return a.names.Serve(live, a.listening.packets, a.listening.streams) })
	}
	if a.svids != nil {
		parts.Go(func() error { return a.tokens.Run(live) })
		parts.Go(func() error { return a.svids.Serve(live, a.listening.workload) })
	}
	if a.config.Redirect {
		parts.Go(func() error { return a.keepRedirected(live) })
	}
	switch a.config.Role {
	case VM:
		parts.Go(func() error { return a.checker.Run(live) })
		parts.Go(func() error { return a.newReporter().Run(live) })
	case Gateway:
		prober := &report.Prober{Connection: a.connection(), TLS: a.keeper.TLS}
		parts.Go(func() error { return prober.Run(live) })
		answerer := &report.Answerer{TLS: a.keeper.TLS, Protocols: meshProtocols, Log: a.log}
		parts.Go(func() error { return answerer.Serve(live, a.listening.probe) })
	}
}

// serveSocket is what Envoy talks to: secrets and discovery on one socket.
func (a *Agent) serveSocket(ctx context.Context) error {
	server := grpc.NewServer(grpc.ForceServerCodecV2(relay.Codec{}), grpc.MaxRecvMsgSize(1<<30), grpc.MaxSendMsgSize(1<<30))
	secretv3.RegisterSecretDiscoveryServiceServer(server, a.secrets)
	a.relay.Register(server)
	defer context.AfterFunc(ctx, server.Stop)()
	if err := server.Serve(a.listening.socket); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve envoy: %w", err)
	}
	return nil
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// prepare makes the folders, writes the bootstrap and opens all sockets, so
// that what cannot work is said before anything runs.
func (a *Agent) prepare(ctx context.Context) error {
	c := &a.config
	if err := makeDirs(c); err != nil {
		return err
	}
	a.memory.Load()
	data, err := c.bootstrapConfig().JSON()
	if err != nil {
		return err
	}
	// Nothing in it is secret, and Envoy must be able to read it whatever our umask is.
	if err := errors.Join(os.WriteFile(c.bootstrapPath(), data, 0o644), os.Chmod(c.bootstrapPath(), 0o644)); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	return a.listening.open(ctx, c)
}
