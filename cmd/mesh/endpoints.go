// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) endpointsCommand() *cobra.Command {
	var watch bool
	var namespace, cluster string
	cmd := &cobra.Command{
		Use:   "endpoints [NAMESPACE/SERVICE]",
		Short: "List the endpoints of services, as their clusters report them",
		Long: `List the endpoints of services, as their clusters report them.

A service is named as NAMESPACE/SERVICE or by its DNS name, cart.shop.svc.

An address means something on its own network only; callers of other networks
reach it through the gateways of its network.`,
		Example: `  mesh endpoints shop/cart
  mesh endpoints --cluster west -o wide`,
		Aliases: []string{"endpoint", "ep"},
		Args:    arguments(0, 1, "service"), ValidArgsFunction: s.completeServices,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &api.ListEndpointsRequest{Namespace: namespace, Cluster: cluster}
			if err := splitService(args, &req.Namespace, &req.Service); err != nil {
				return err
			}
			return s.printWatched(cmd.Context(), watch, func(ctx context.Context) (*listing, error) {
				return s.fetchEndpoints(ctx, req)
			})
		},
	}
	s.addOutputFlags(cmd)
	s.addFilterFlags(cmd, &namespace, &cluster)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	return cmd
}

func (s *session) fetchEndpoints(ctx context.Context, req *api.ListEndpointsRequest) (*listing, error) {
	var list *api.EndpointList
	err := s.call(ctx, "cannot list endpoints", func(ctx context.Context, c *connection) (err error) {
		list, err = c.ListEndpoints(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	l := &listing{object: list, empty: "no endpoints", table: table{columns: []column{
		{head: "SERVICE"}, {head: "CLUSTER"}, {head: "NETWORK", spare: 2}, {head: "ADDRESS"}, {head: "PORTS", spare: 3},
		{head: "STATE"}, {head: "MESH", spare: 1}, {head: "INSTANCE"},
		{head: "STALE", wide: true}, {head: "LOCALITY", wide: true}, {head: "ACCOUNT", wide: true},
	}}}
	for _, e := range list.GetItems() {
		mesh := "no"
		if e.GetMesh() {
			mesh = "yes"
		}
		l.table.rows = append(l.table.rows, []cell{
			{text: e.GetNamespace() + "/" + e.GetService()}, {text: e.GetCluster()}, {text: e.GetNetwork()},
			{text: strings.Join(e.GetAddresses(), ",")}, {text: numbersText(e.GetPorts())},
			{text: e.GetState(), tone: phaseTone(e.GetState())}, {text: mesh}, {text: e.GetInstance()},
			{text: s.age(e.GetStaleSince())}, {text: e.GetLocality()}, {text: e.GetServiceAccount()},
		})
		l.names = append(l.names, strings.Join([]string{"endpoint", e.GetNamespace(), e.GetService(), e.GetCluster(), e.GetInstance()}, "/"))
	}
	return l, nil
}

func numbersText(numbers []uint32) string {
	var out []string
	for _, n := range numbers {
		out = append(out, fmt.Sprint(n))
	}
	return strings.Join(out, ",")
}
