// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) servicesCommand() *cobra.Command {
	var watch bool
	var namespace, cluster string
	cmd := &cobra.Command{
		Use:   "services [NAMESPACE/NAME]",
		Short: "List the services of the mesh and which clusters have them",
		Long: `List the services of the mesh and which clusters have them.

Services of one namespace and name are one service, wherever they are. CLUSTERS
has each of them with the number of its ready endpoints out of all.

One is named as NAMESPACE/NAME or by its DNS name, cart.shop.svc.`,
		Example: `  mesh services
  mesh services shop/cart -o yaml
  mesh services -n shop --cluster west`,
		Aliases: []string{"service", "svc"},
		Args:    arguments(0, 1, "service"), ValidArgsFunction: s.completeServices,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &api.ListServicesRequest{Namespace: namespace, Cluster: cluster}
			if err := splitService(args, &req.Namespace, &req.Name); err != nil {
				return err
			}
			return s.printWatched(cmd.Context(), watch, func(ctx context.Context) (*listing, error) {
				return s.fetchServices(ctx, req)
			})
		},
	}
	s.addOutputFlags(cmd)
	s.addFilterFlags(cmd, &namespace, &cluster)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	return cmd
}

// addFilterFlags gives a list -n and --cluster.
func (s *session) addFilterFlags(cmd *cobra.Command, namespace, cluster *string) {
	cmd.Flags().StringVarP(namespace, "namespace", "n", "", "only this namespace")
	cmd.Flags().StringVar(cluster, "cluster", "", "only this cluster")
	must(cmd.RegisterFlagCompletionFunc("cluster", s.completeClusters))
}

// splitService reads "namespace/name", a DNS name such as "name.namespace", or a name in the
// namespace of -n. The name of a service has no dot (RFC 1035 label), so they differ.
func splitService(args []string, namespace, name *string) error {
	if len(args) == 0 {
		return nil
	}
	ns, n, ok := strings.Cut(args[0], "/")
	if name, domain, dotted := strings.Cut(args[0], "."); dotted && !ok {
		ns, domain, ok = strings.Cut(domain, ".")
		if ok && domain != "svc" && !strings.HasPrefix(domain, "svc.") {
			return usagef("service %q, want NAMESPACE/NAME or NAME.NAMESPACE.svc", args[0])
		}
		n, ok = name, true
	}
	switch {
	case !ok:
		ns, n = *namespace, args[0]
		if ns == "" {
			ns = "default"
		}
	case *namespace != "" && *namespace != ns:
		return usagef("%q is in namespace %q, but --namespace is %q", args[0], ns, *namespace)
	}
	if ns == "" || n == "" || strings.Contains(n, "/") {
		return usagef("service %q, want NAMESPACE/NAME", args[0])
	}
	*namespace, *name = ns, n
	return nil
}

func (s *session) fetchServices(ctx context.Context, req *api.ListServicesRequest) (*listing, error) {
	var list *api.ServiceList
	err := s.call(ctx, "cannot list services", func(ctx context.Context, c *connection) (err error) {
		list, err = c.ListServices(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	l := &listing{object: list, empty: "no services", table: table{columns: []column{
		{head: "NAMESPACE"}, {head: "NAME"}, {head: "PORTS", spare: 2}, {head: "CLUSTERS"},
		{head: "READY", right: true, spare: 1}, {head: "FINDINGS"}, {head: "AGE", spare: 3},
		{head: "ADDRESSES", wide: true}, {head: "HOST", wide: true},
	}}}
	for _, v := range list.GetItems() {
		ready, total := int32(0), int32(0)
		for _, r := range v.GetRecords() {
			ready += r.GetReady()
			total += r.GetEndpoints()
		}
		readyCell := cell{text: fmt.Sprintf("%d/%d", ready, total)}
		if ready == 0 && total > 0 {
			readyCell.tone = red
		}
		m := v.GetMetadata()
		findings := cell{text: codesText(v.GetFindings())}
		if findings.text != "" {
			findings.tone = yellow
		}
		l.table.rows = append(l.table.rows, []cell{
			{text: m.GetNamespace()}, {text: m.GetName()}, {text: portsText(v.GetPorts())},
			{text: recordsText(v.GetRecords())}, readyCell,
			findings, {text: s.age(m.GetCreated())},
			{text: strings.Join(v.GetAddresses(), ",")}, {text: v.GetHost()},
		})
		l.names = append(l.names, "service/"+m.GetNamespace()+"/"+m.GetName())
	}
	return l, nil
}

func portsText(ports []*api.Port) string {
	var out []string
	for _, p := range ports {
		t := fmt.Sprint(p.GetNumber())
		if p.GetProtocol() != "" {
			t += "/" + p.GetProtocol()
		}
		out = append(out, t)
	}
	return strings.Join(out, ",")
}

// recordsText is for example "east 2/3, west 1/1 stale".
func recordsText(records []*api.Record) string {
	var out []string
	for _, r := range records {
		t := fmt.Sprintf("%s %d/%d", r.GetCluster(), r.GetReady(), r.GetEndpoints())
		if r.GetStaleSince() != nil {
			t += " stale"
		}
		if !r.GetExported() {
			t += " local"
		}
		out = append(out, t)
	}
	return strings.Join(out, ", ")
}

func codesText(findings []*api.Finding) string {
	var out []string
	for _, f := range findings {
		if !slices.Contains(out, f.GetCode()) {
			out = append(out, f.GetCode())
		}
	}
	return strings.Join(out, ",")
}
