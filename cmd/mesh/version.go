// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

// version of this program, from the build information that Go embeds.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

func (s *session) versionCommand() *cobra.Command {
	var clientOnly bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show the versions of mesh, meshd, and the members",
		Long: `Show the versions of mesh, meshd, and the members.

PROXIES and AGENTS are what the connected proxies say of themselves. What is of
another version than meshd, or than the rest, is named in a line that begins with
"skew".`,
		Args: arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.showVersion(cmd.Context(), clientOnly)
		},
	}
	cmd.Flags().StringVarP(&s.output, "output", "o", "table", "output: table, json or yaml")
	cmd.Flags().BoolVar(&clientOnly, "client", false, "only the version of this program")
	return cmd
}

func (s *session) showVersion(ctx context.Context, clientOnly bool) error {
	if s.output == "table" {
		fmt.Fprintf(s.stdout, "mesh    %s (%s, %s/%s)\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	}
	report := &api.VersionReport{}
	if !clientOnly {
		err := s.call(ctx, "cannot ask meshd for its version", func(ctx context.Context, c *connection) (err error) {
			report, err = c.GetVersion(ctx, &api.GetVersionRequest{})
			return err
		})
		var f *failure
		if errors.As(err, &f) && f.code == api.NoAdminConfig && s.output == "table" {
			fmt.Fprintln(s.stdout, "meshd   not known: there is no admin.conf")
			return nil
		}
		if err != nil {
			return err
		}
	}
	switch s.output {
	case "json":
		return writeJSON(s.stdout, report)
	case "yaml":
		return writeYAML(s.stdout, report)
	}
	if clientOnly {
		return nil
	}
	srv := report.GetServer()
	fmt.Fprintf(s.stdout, "meshd   %s (%s, replica %s, etcd %s)\n", srv.GetVersion(), srv.GetGoVersion(), srv.GetReplica(), srv.GetEtcd())
	if srv.GetVersion() != version() {
		fmt.Fprintln(s.stdout, "skew    mesh and meshd are of different versions")
	}
	for _, line := range skew(report) {
		fmt.Fprintln(s.stdout, "skew   ", line)
	}
	t := table{columns: []column{{head: "CLUSTER"}, {head: "KUBERNETES"}, {head: "PROXIES"}, {head: "AGENTS"}}}
	for _, m := range report.GetMembers() {
		t.rows = append(t.rows, text(m.GetCluster(), m.GetKubernetes(), versionsText(m.GetProxies()), versionsText(m.GetAgents())))
	}
	if len(t.rows) == 0 {
		return nil
	}
	return t.write(s.stdout, s.style(s.stdout), false, true)
}

// versionsText is for example "6 × envoy 1.40.0, 1 × envoy 1.38.1".
func versionsText(versions map[string]int32) string {
	var out []string
	for _, v := range slices.Sorted(maps.Keys(versions)) {
		out = append(out, fmt.Sprintf("%d × %s", versions[v], v))
	}
	return strings.Join(out, ", ")
}

// skew says which agents are not of meshd's version, and where Envoys are of several.
func skew(report *api.VersionReport) []string {
	var out []string
	envoys := map[string]bool{}
	for _, m := range report.GetMembers() {
		for v := range m.GetProxies() {
			envoys[v] = v != "unknown"
		}
		for _, v := range slices.Sorted(maps.Keys(m.GetAgents())) {
			if v != report.GetServer().GetVersion() && v != "unknown" {
				out = append(out, fmt.Sprintf("%s in %s: %s, meshd %s", counted(m.GetAgents()[v], "agent"), m.GetCluster(), v, report.GetServer().GetVersion()))
			}
		}
	}
	delete(envoys, "unknown")
	if len(envoys) > 1 {
		out = append(out, "proxies are of several versions: "+strings.Join(slices.Sorted(maps.Keys(envoys)), ", "))
	}
	return out
}
