// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/agent/inject"
	"github.com/isthmus-mesh/isthmus/api"
)

// injectFlags are the flags of mesh inject.
type injectFlags struct {
	file, cluster string
	options       inject.Options
}

func (s *session) injectCommand() *cobra.Command {
	var f injectFlags
	cmd := &cobra.Command{
		Use:   "inject -f FILE",
		Short: "Write the sidecar into the pod templates of manifests",
		Long: `Write the sidecar into the pod templates of manifests.

The injected manifests go to stdout, and a word about each of them to stderr. A
template that has the sidecar already gets the present one; other documents are
copied as they are. With --cluster the network and the addresses of meshd, of all
its replicas, are asked from meshd; otherwise give --network, --cluster-id and
--meshd.`,
		Example: `  mesh inject -f shop.yaml --cluster east | kubectl --context prod-east apply -f -
  kubectl get deployment cart -o yaml | mesh inject -f - --cluster east | kubectl apply -f -`,
		Args: arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return s.inject(cmd.Context(), f) },
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.file, "filename", "f", "", "file with manifests, - for stdin (required)")
	fl.StringVar(&f.cluster, "cluster", "", "the joined cluster that the manifests are for")
	fl.StringVar(&f.options.Network, "network", "", "network of the cluster")
	fl.StringVar(&f.options.ClusterID, "cluster-id", "", "kube:UID, with the UID of the cluster's namespace kube-system")
	fl.StringVar(&f.options.Server, "meshd", "", "HOST:15012 at which the pods reach meshd; several, separated by commas, where it has replicas")
	fl.StringVar(&f.options.Image, "proxy-image", "isthmus/proxy:dev", "image of the sidecar")
	fl.StringVar(&f.options.LogLevel, "proxy-log-level", "info", "log level of the sidecar's agent")
	must(cmd.RegisterFlagCompletionFunc("cluster", s.completeClusters))
	return cmd
}

func (s *session) inject(ctx context.Context, f injectFlags) error {
	in, err := s.manifests(f.file)
	if err != nil {
		return err
	}
	if f.cluster != "" {
		if err := s.injectionFor(ctx, &f); err != nil {
			return err
		}
	}
	for flag, value := range map[string]string{"--network": f.options.Network, "--cluster-id": f.options.ClusterID, "--meshd": f.options.Server} {
		if value == "" {
			return usagef("%s is missing; with --cluster NAME it is asked from meshd", flag)
		}
	}
	var out bytes.Buffer // nothing is printed unless all of it is good
	result, err := inject.YAML(bytes.NewReader(in), &out, f.options)
	switch {
	case errors.Is(err, inject.ErrOptions):
		return usagef("%v", err)
	case err != nil:
		return &failure{exit: exitFailed, what: "cannot inject " + f.file, why: err.Error(), code: api.InvalidInput, err: err}
	}
	if _, err := s.stdout.Write(out.Bytes()); err != nil {
		return err
	}
	s.reportInjection(result)
	return nil
}

func (s *session) manifests(file string) ([]byte, error) {
	switch file {
	case "":
		return nil, usagef("-f is missing: name a file, or - for stdin")
	case "-":
		return io.ReadAll(s.stdin)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, usagef("-f: %v", err)
	}
	return data, nil
}

// injectionFor asks meshd for what all proxies of a cluster have in common.
func (s *session) injectionFor(ctx context.Context, f *injectFlags) error {
	return s.call(ctx, "cannot inject for cluster "+f.cluster, func(ctx context.Context, c *connection) error {
		cluster, err := c.GetCluster(ctx, &api.GetClusterRequest{Name: f.cluster})
		if err != nil {
			return err
		}
		v, err := c.GetVersion(ctx, &api.GetVersionRequest{})
		if err != nil {
			return err
		}
		setDefault(&f.options.Network, cluster.GetSpec().GetNetwork())
		setDefault(&f.options.ClusterID, "kube:"+cluster.GetMetadata().GetUid())
		if len(v.GetServer().GetAdvertised()) > 0 {
			setDefault(&f.options.Server, strings.Join(v.GetServer().GetAdvertised(), ","))
		}
		return nil
	})
}

func setDefault(to *string, value string) {
	if *to == "" {
		*to = value
	}
}

func (s *session) reportInjection(r inject.Result) {
	st := s.style(s.stderr)
	for _, name := range r.Injected {
		fmt.Fprintf(s.stderr, "%s %s injected\n", st.mark("done"), name)
	}
	for _, name := range r.Unchanged {
		fmt.Fprintf(s.stderr, "%s %s unchanged\n", st.mark("unchanged"), name)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Skipped)) {
		fmt.Fprintf(s.stderr, "%s %s skipped: %s\n", st.mark("warning"), name, strings.TrimSpace(r.Skipped[name]))
	}
}
