// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"path/filepath"
	"runtime"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/api/apiserver"
)

// wireAdmin answers people and scripts on the admin port, and agents' reports on the
// proxies' one.
func (d *daemon) wireAdmin(context.Context) (err error) {
	v, commit := version()
	ranges, err := d.config.virtual()
	if err != nil {
		return err
	}
	mode := "external"
	if d.database.Embedded() {
		mode = "embedded"
	}
	d.wirePeers()
	d.admin, err = apiserver.New(apiserver.Config{
		Store: d.store, Authority: d.authority, Authenticator: d.attestor, Tokens: d.tokens,
		Audit: d.audit, AuditPath: d.config.path("audit.jsonl"), AuditLog: d.audit, Checkpoints: d.heads,
		Sources: d.runner, Proxies: d.streams,
		Findings: d.pipeline.Findings, Certificate: d.serving.Certificate,
		Virtual: ranges, CaptureTo: []string{ranges.V4.String(), ranges.V6.String()},
		Advertised: d.config.Advertise, AdvertisedElsewhere: d.advertisedElsewhere, AdminAddress: d.config.adminAddresses()[0],
		AgentBinary: program(d.config.AgentProgram, "mesh-agent"), EnvoyBinary: program(d.config.EnvoyProgram, ""),
		Replica: d.replica, Version: v, Commit: commit, EtcdMode: mode, Started: d.started,
		Health: d.healthChecks, Peers: d.peers, Standing: d.stale.Standing, Log: d.log.With("component", "admin"),
	})
	if err != nil {
		return err
	}
	d.admin.RegisterWorkloads(d.mesh)
	d.wireRotation()
	d.run("staleness", func(ctx context.Context) error { return d.stale.run(ctx, d.pipeline.Refresh) })
	return nil
}

// pathsOf tries the ways from and to a cluster, also from where the other replicas'
// gateways are.
func (d *daemon) pathsOf(ctx context.Context, cluster string) ([]*api.Path, error) {
	report, err := d.admin.ProbePaths(ctx, &api.ProbePathsRequest{Cluster: cluster})
	return report.GetPaths(), err
}

// healthChecks are the conditions of readiness, for `mesh check`.
func (d *daemon) healthChecks() []apiserver.HealthCheck {
	var checks []apiserver.HealthCheck
	for _, c := range d.ready.list() {
		checks = append(checks, apiserver.HealthCheck{Name: c.name, Err: c.ask()})
	}
	return checks
}

// program finds what machines that onboard are given: the file named, else one beside
// meshd. It is for this machine's architecture; there is none for others.
func program(path, beside string) func(arch string) string {
	if path == "" && beside != "" {
		if self, err := os.Executable(); err == nil {
			path = filepath.Join(filepath.Dir(self), beside)
		}
	}
	return func(arch string) string {
		if path == "" || arch != runtime.GOARCH {
			return ""
		}
		if _, err := os.Stat(path); err != nil {
			return ""
		}
		return path
	}
}
