// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
)

// version of this build: the module's, or the commit it was built from.
func version() (version, commit string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown", ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			commit = s.Value
		}
	}
	return info.Main.Version, commit
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			v, commit := version()
			fmt.Fprintln(cmd.OutOrStdout(), "meshd", v, commit)
		},
	}
}

// buildInfo is the metric that carries the version.
func buildInfo() prometheus.Collector {
	v, commit := version()
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "mesh_build_info", Help: "Version of this meshd; always 1.",
		ConstLabels: prometheus.Labels{"version": v, "commit": commit},
	})
	g.Set(1)
	return g
}
