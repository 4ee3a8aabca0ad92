// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/caserver"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/gateways"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// wireProxies serves xDS and certificates on one gRPC server: snapshots flow from the
// store through the pipeline to the streams.
func (d *daemon) wireProxies(context.Context) error {
	resolver := &gateways.Resolver{Log: d.log.With("component", "gateways")}
	d.stale = &staleness{
		policy: federation.StalePolicy{DemoteAfter: time.Duration(d.config.DemoteAfter), DrainAfter: time.Duration(d.config.DrainAfter)},
		paths:  d.pathsOf, log: d.log.With("component", "staleness"),
	}
	d.pipeline = xdsserver.NewPipeline(xdsserver.PipelineConfig{
		Generators: generators(d.config.Log.Access), Log: d.log.With("component", "xds"),
		Prepare: func(s *federation.Snapshot) *federation.Snapshot { return d.stale.judge(resolver.Resolve(s)) },
	})
	resolver.Changed = d.pipeline.Refresh
	d.run("gateway names", resolver.Run)
	d.run("pipeline", d.pipeline.Run)
	d.run("snapshots", d.follow)

	d.gate = xdsserver.NewGate(xdsserver.Limits{})
	d.streams = xdsserver.New(xdsserver.Config{
		Source: d.pipeline, Authenticate: d.authenticate, Gate: d.gate, Identifier: d.replica, Log: d.log.With("component", "xds"),
	})
	d.metrics.MustRegister(d.streams, d.pipeline, d.gate)
	d.ready.add("configuration", func() error {
		if !d.pipeline.Synced() {
			return errors.New("the first snapshot has not been computed yet")
		}
		return nil
	})
	d.run("revocations", d.enforceRevocations)
	certificates, err := caserver.New(caserver.Config{Authority: d.authority, Attestor: d.attestor, JWT: d.jwt, Log: d.log.With("component", "ca")})
	if err != nil {
		return err
	}
	options := append(xdsserver.Options(), grpc.Creds(d.gate.Credentials(credentials.NewTLS(d.serving.TLS("h2")))), grpc.ConnectionTimeout(5*time.Second))
	d.mesh = grpc.NewServer(options...)
	d.streams.Register(d.mesh)
	certificates.Register(d.mesh)
	return nil
}

// generators make resources by the role of a proxy; this is where gateways meet sidecars.
func generators(logFormat string) map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator {
	sidecar := func(r xdsserver.Restraint) xdsserver.Generator {
		return &xds.Builder{Weigh: r.Weigh, Closed: r.Closed, LogFormat: logFormat}
	}
	return map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator{
		federation.Sidecar:     sidecar,
		federation.VMRole:      sidecar,
		federation.GatewayRole: func(xdsserver.Restraint) xdsserver.Generator { return &gateways.Builder{LogFormat: logFormat} },
	}
}

// follow hands the newest snapshot to the pipeline.
func (d *daemon) follow(ctx context.Context) error {
	for {
		snapshot, changed := d.store.Snapshot()
		d.pipeline.Update(snapshot)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// authenticate says who opened a stream, from the credential alone.
func (d *daemon) authenticate(ctx context.Context) (xdsserver.Peer, error) {
	evidence, err := caserver.Evidence(ctx)
	if err != nil {
		return xdsserver.Peer{}, err
	}
	// A replica that was paused serves nobody what it knew before.
	if err := d.store.Current(ctx); err != nil {
		return xdsserver.Peer{}, status.Errorf(codes.Unavailable, "this replica has slept and is catching up: %v", err)
	}
	who, err := d.attestor.Authenticate(ctx, evidence)
	if err != nil {
		return xdsserver.Peer{}, refusal(err)
	}
	return xdsserver.Peer{
		Workload:  federation.WorkloadKey{Source: federation.SourceID(who.Source), UID: who.Instance},
		Namespace: who.Namespace, ServiceAccount: who.ServiceAccount, TrustDomain: d.authority.TrustDomain().Name(),
	}, nil
}

// refusal tells a caller whether trying again can help.
func refusal(err error) error {
	switch {
	case errors.Is(err, attest.ErrUnknown), errors.Is(err, ca.ErrUnavailable):
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, attest.ErrGone), errors.Is(err, ca.ErrRevoked), errors.Is(err, ca.ErrNotGranted):
		return status.Error(codes.PermissionDenied, err.Error())
	}
	return status.Error(codes.Unauthenticated, "credential not accepted")
}

// enforceRevocations closes the streams of whoever was cut off.
func (d *daemon) enforceRevocations(ctx context.Context) error {
	for {
		changed := d.authority.Changed()
		d.streams.Disconnect(func(p xds.Proxy) bool {
			return d.authority.Revoked(ca.Source(p.Workload.Source), p.Workload.UID) != nil
		})
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
