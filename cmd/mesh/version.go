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
		Args:  arguments(0, 0, ""),
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
	t := table{columns: []column{{head: "CLUSTER"}, {head: "KUBERNETES"}, {head: "PROXIES"}}}
	for _, m := range report.GetMembers() {
		var proxies []string
		for _, v := range slices.Sorted(maps.Keys(m.GetProxies())) {
			proxies = append(proxies, fmt.Sprintf("%d × %s", m.GetProxies()[v], v))
		}
		t.rows = append(t.rows, text(m.GetCluster(), m.GetKubernetes(), strings.Join(proxies, ", ")))
	}
	if len(t.rows) == 0 {
		return nil
	}
	return t.write(s.stdout, s.style(s.stdout), false, true)
}
