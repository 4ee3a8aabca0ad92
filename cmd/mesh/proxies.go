// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) proxiesCommand() *cobra.Command {
	var watch bool
	var req api.ListProxiesRequest
	cmd := &cobra.Command{
		Use:   "proxies [NAME]",
		Short: "List the connected proxies and what they have acknowledged",
		Long: `List the connected proxies and what they have acknowledged.

STATUS is "synced" if the proxy has accepted everything it was sent, "pending" if
it has not answered yet, and "rejected" if it refused something; -o yaml has the
versions of every type and Envoy's own words. With -o wide ENVOY, AGENT and
CERTIFICATE are the versions and how long the workload's certificate is valid, as
its agent says.`,
		Example: `  mesh proxies
  mesh proxies --troubled
  mesh proxies -n shop --cluster west -o wide`,
		Aliases: []string{"proxy"},
		Args:    arguments(0, 1, "name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				req.Name = args[0]
			}
			return s.printWatched(cmd.Context(), watch, func(ctx context.Context) (*listing, error) {
				return s.fetchProxies(ctx, &req)
			})
		},
	}
	s.addOutputFlags(cmd)
	s.addFilterFlags(cmd, &req.Namespace, &req.Cluster)
	cmd.Flags().BoolVar(&req.Troubled, "troubled", false, "only proxies that are not synced")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	return cmd
}

func (s *session) fetchProxies(ctx context.Context, req *api.ListProxiesRequest) (*listing, error) {
	var list *api.ProxyList
	err := s.call(ctx, "cannot list proxies", func(ctx context.Context, c *connection) (err error) {
		list, err = c.ListProxies(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	l := &listing{object: list, empty: "no proxies", table: table{columns: []column{
		{head: "NAMESPACE"}, {head: "NAME"}, {head: "ROLE", spare: 1}, {head: "CLUSTER"}, {head: "NETWORK", spare: 3},
		{head: "STATUS"}, {head: "AGE", spare: 2}, {head: "REPLICA", wide: true}, {head: "ENVOY", wide: true},
		{head: "AGENT", wide: true}, {head: "CERTIFICATE", wide: true}, {head: "TYPES", wide: true}, {head: "IDENTITY", wide: true},
	}}}
	for _, p := range list.GetItems() {
		state := proxyState(p)
		l.table.rows = append(l.table.rows, []cell{
			{text: p.GetMetadata().GetNamespace()}, {text: p.GetMetadata().GetName()}, {text: p.GetRole()},
			{text: p.GetCluster()}, {text: p.GetNetwork()}, {text: state, tone: phaseTone(state)},
			{text: s.age(p.GetConnected())}, {text: p.GetReplica()}, {text: p.GetEnvoyVersion()},
			{text: p.GetAgentVersion()}, s.untilCell(p.GetCertificateExpires()), {text: typesText(p.GetTypes())}, {text: p.GetIdentity()},
		})
		l.names = append(l.names, "proxy/"+p.GetMetadata().GetNamespace()+"/"+p.GetMetadata().GetName())
	}
	return l, nil
}

// untilCell is how long something is still valid; "" if that is not known.
func (s *session) untilCell(t *timestamppb.Timestamp) cell {
	if t == nil {
		return cell{}
	}
	left := t.AsTime().Sub(s.now())
	if left <= 0 {
		return cell{text: "expired " + short(-left) + " ago", tone: red}
	}
	return cell{text: short(left)}
}

// proxyState is the worst state of its types.
func proxyState(p *api.Proxy) string {
	state := "synced"
	if !p.GetSynced() {
		state = "pending"
	}
	for _, t := range p.GetTypes() {
		switch t.GetState() {
		case "rejected":
			return "rejected"
		case "pending":
			state = "pending"
		}
	}
	return state
}

// typesText is for example "CDS,LDS,EDS!" where the mark means not synced.
func typesText(types []*api.ProxyType) string {
	var out []string
	for _, t := range types {
		name := t.GetType()
		if t.GetState() != "synced" {
			name += "!"
		}
		out = append(out, name)
	}
	return strings.Join(out, ",")
}
