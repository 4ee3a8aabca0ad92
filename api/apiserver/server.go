// SPDX-License-Identifier: Apache-2.0

// Package apiserver answers the admin API of meshd: to the command line and to
// scripts, on the admin port; and the reports and probes of agents, on the port
// of ADS.
//
// It keeps nothing itself. What it says comes from the store, the authority, the
// sources and the proxies of this replica, and what it changes it changes there.
package apiserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// Authority is what is asked of the certificate authority; *ca.Authority is one.
type Authority interface {
	Bundle() ca.Bundle
	Issuers() []ca.Issuer
	Verify(chain []*x509.Certificate) (ca.Identity, error)
	RevokedIdentity(ca.Identity) error
	Revoke(ctx context.Context, source ca.Source, instance, reason string) error
	Reinstate(ctx context.Context, source ca.Source, instance, reason string) error
	Changed() <-chan struct{}
	// Confirmed is when the authorities were last read from the store.
	Confirmed() time.Time

	Rotations(ca.Standing) []ca.Rotation
	DrainTime(scope string) time.Duration
	Rotate(ctx context.Context, scope, by string) error
	PauseRotation(ctx context.Context, scope, by string) error
	ResumeRotation(ctx context.Context, scope, by string) error
	RollBack(ctx context.Context, scope, by string, s ca.Standing) error
	Proceed(ctx context.Context, scope, by string, named []string, s ca.Standing) error
}

// Authenticator finds out who calls on the port of ADS; *attest.Attestor is one.
type Authenticator interface {
	Authenticate(ctx context.Context, e attest.Evidence) (attest.Identity, error)
}

// Tokens keeps join tokens; *etcd.Tokens of ca/etcd is one.
type Tokens interface {
	Create(ctx context.Context, what ca.JoinToken, ttl time.Duration) (string, ca.JoinToken, error)
	List(ctx context.Context) ([]ca.JoinToken, error)
	Void(ctx context.Context, network, name string) (int, error)
}

// Sources tells how the sources are that this replica syncs; *registry.Runner
// does.
type Sources interface {
	Sources() []registry.SourceState
}

// Proxies are the proxies that are connected to this replica; *xdsserver.Server
// has them.
type Proxies interface {
	Proxies() []xdsserver.ProxyStatus
	// Disconnect ends the streams of the proxies that which wants to go, and
	// returns how many there were.
	Disconnect(which func(xds.Proxy) bool) int
}

// Peers asks the other replicas for what only they know; *PeerGroup does.
// Replicas that do not answer in time are left out. Streams need no asking: every
// replica closes those of whoever is revoked.
type Peers interface {
	Proxies(ctx context.Context) []*api.Proxy
	Clusters(ctx context.Context) []*api.Cluster
	Paths(ctx context.Context, cluster string) []*api.Path
	// TailActivity hands over what their audit logs have, one record at a time. With
	// req.Follow it goes on until ctx ends.
	TailActivity(ctx context.Context, req *api.TailActivityRequest, found func(*api.Activity))
	Activity(ctx context.Context) []*api.AuditLog
	// Trust is what their agents say, and which replicas do not answer.
	Trust(ctx context.Context) (answers []*api.TrustList, missing []string)
}

// HealthCheck is one of the conditions of meshd's own readiness.
type HealthCheck struct {
	Name string // "etcd", "authority", ...
	Err  error  // nil: good
}

// Config of a Server. Fields that are not said to be optional are required.
type Config struct {
	Store         registry.Store
	Authority     Authority
	Authenticator Authenticator
	Tokens        Tokens
	Audit         ca.Audit

	// AuditPath is the file of this replica's audit log, for TailActivity; empty
	// means that there is none.
	AuditPath string

	// AuditLog is what Audit writes to, for VerifyActivity, and Checkpoints has the
	// heads of all replicas' logs; optional.
	AuditLog    AuditLog
	Checkpoints Checkpoints

	// Optional: without Sources ages and lags are unknown, without Proxies there
	// are none, without Peers this replica is the only one.
	Sources Sources
	Proxies Proxies
	Peers   Peers

	// Findings of other rooms, for example of the translation to xDS; optional.
	Findings func() []federation.Finding

	// Standing is how much a silent source counts for others; optional.
	Standing func(federation.SourceID) federation.Standing

	// Certificate is what meshd's own probes of gateways present; optional.
	Certificate func() *tls.Certificate

	// Advertised are the "host:port" at which proxies find this replica, and
	// AdvertisedElsewhere (optional) those of the others: proxies are given all of
	// them. AdminAddress is the one at which virtual machines find the onboarding
	// script.
	Advertised          []string
	AdvertisedElsewhere func() []string
	AdminAddress        string

	// Virtual are the ranges of virtual addresses; zero means the defaults.
	Virtual federation.VirtualRanges

	// CaptureTo are the ranges of addresses that virtual machines send through
	// the mesh; empty means the default ranges of virtual addresses.
	CaptureTo []string

	// AgentBinary and EnvoyBinary are paths of the programs that virtual machines
	// fetch, for an architecture in Go's spelling; "" if there is none. Optional.
	AgentBinary, EnvoyBinary func(arch string) string

	Replica  string
	Version  string
	Commit   string
	EtcdMode string // "embedded" or "external"
	Started  time.Time

	// Health are the conditions of meshd's readiness; optional.
	Health func() []HealthCheck

	// DrainPause is how long a leaving cluster is kept after the last proxy has
	// stopped sending to it, for connections that are under way. 15 s if zero.
	DrainPause time.Duration

	Clock func() time.Time // time.Now if nil
	Log   *slog.Logger     // slog.Default() if nil
}

// Server answers the admin API. Its methods may be called concurrently.
type Server struct {
	api.UnimplementedAdminServer
	cfg    Config
	grpc   *grpc.Server
	routes http.Handler
	probes *probeHub
	trust  *trustHub

	refused rate.Sometimes // keeps the log small

	mu       sync.Mutex
	findings snapshotFindings // of the newest snapshot that was looked at

	configuration *config.Index // of indexed
	indexed       *federation.Snapshot
}

var _ api.AdminServer = (*Server)(nil)

// New makes a server.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Store == nil, cfg.Authority == nil, cfg.Authenticator == nil, cfg.Tokens == nil, cfg.Audit == nil:
		return nil, errors.New("apiserver: Config.Store, Authority, Authenticator, Tokens and Audit are required")
	case len(cfg.Advertised) == 0 || cfg.AdminAddress == "":
		return nil, errors.New("apiserver: Config.Advertised and AdminAddress are required")
	}
	if cfg.DrainPause == 0 {
		cfg.DrainPause = 15 * time.Second
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s := &Server{
		cfg: cfg, probes: newProbeHub(), trust: newTrustHub(),
		refused: rate.Sometimes{First: 10, Interval: 10 * time.Second},
	}
	s.grpc = grpc.NewServer(
		grpc.ChainUnaryInterceptor(s.unaryAdmin), grpc.ChainStreamInterceptor(s.streamAdmin),
		grpc.MaxRecvMsgSize(maxRequest),
	)
	api.RegisterAdminServer(s.grpc, s)
	s.routes = s.mux()
	return s, nil
}

// advertised are the addresses of all replicas that live, in an order that does not depend
// on which of them is asked.
func (s *Server) advertised() []string {
	out := slices.Clone(s.cfg.Advertised)
	if s.cfg.AdvertisedElsewhere != nil {
		out = append(out, s.cfg.AdvertisedElsewhere()...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// maxRequest bounds what a caller may send, in bytes.
const maxRequest = 8 << 20

// RegisterWorkloads puts the service for agents on the gRPC server of the port
// of ADS.
func (s *Server) RegisterWorkloads(r grpc.ServiceRegistrar) {
	api.RegisterWorkloadsServer(r, &workloads{server: s})
}

// Handler answers everything on the admin port: gRPC, JSON, and what virtual
// machines fetch. It must be served with TLS that asks for client certificates.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			s.grpc.ServeHTTP(w, r)
			return
		}
		s.routes.ServeHTTP(w, r)
	})
}

// shutdownGrace is how long calls may take to end when Serve ends.
const shutdownGrace = 5 * time.Second

// Serve answers on l until ctx ends; then it lets running calls end for a few
// seconds. It always closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener, config *tls.Config) error {
	srv := &http.Server{
		Handler: s.Handler(), TLSConfig: config,
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 5 * time.Minute,
		ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		// Streams learn that the server ends.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), shutdownGrace)
		defer cancel()
		err := srv.Shutdown(grace)
		if err != nil {
			err = srv.Close()
		}
		stopped <- err
	})
	err := srv.ServeTLS(l, "", "")
	if stop() { // it ended by itself
		return err
	}
	return <-stopped
}
