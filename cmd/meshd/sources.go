// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/kube"
	"github.com/isthmus-mesh/isthmus/registry/vm"
)

// wireSources syncs every member and every network of VMs, and gives addresses to what
// needs one.
func (d *daemon) wireSources(context.Context) error {
	d.runner = registry.NewRunner(registry.RunnerConfig{
		Store: d.store, Log: d.log.With("component", "registry"),
		Cluster: func(m *registry.Member) registry.Source {
			return kube.NewSource(kube.SourceConfig{
				Store: d.store, ID: m.ID, Replica: d.replica, Log: d.log.With("component", "kube", "name", m.Name),
				Roots: func() []byte { return d.authority.Bundle().PEM() }, UnknownKeys: d.attestor.UnknownKeys,
			})
		},
		VMs: func(n federation.Network) registry.Source { return vm.NewSource(d.store, n) },
	})
	d.metrics.MustRegister(d.runner)
	d.run("sources", d.runner.Run)
	ranges, err := d.config.virtual()
	if err != nil {
		return err
	}
	d.run("addresses", registry.Allocator{Store: d.store, Ranges: ranges, Log: d.log.With("component", "addresses")}.Run)
	return nil
}
