// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) vmListCommand() *cobra.Command {
	var watch bool
	var req api.ListVMsRequest
	cmd := &cobra.Command{
		Use:   "list [NAME]",
		Short: "List the virtual machines and their state",
		Long: `List the virtual machines and their state.

Pending    the token has not been used yet      Redeemed   it has its certificate
Connected  its agent is there                   Healthy    it gets connections
Unhealthy  its health check fails               Lost       its agent does not report;
Expired    it needs a new token, since the one             it needs no token
           it had, or its certificate, has ended: mesh vm onboard NAME`,
		Aliases: []string{"ls"},
		Args:    arguments(0, 1, "name"), ValidArgsFunction: s.completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				req.Name = args[0]
			}
			return s.printWatched(cmd.Context(), watch, func(ctx context.Context) (*listing, error) {
				var list *api.VMList
				err := s.call(ctx, "cannot list virtual machines", func(ctx context.Context, c *connection) (err error) {
					list, err = c.ListVMs(ctx, &req)
					return err
				})
				if err != nil {
					return nil, err
				}
				return s.vmListing(list), nil
			})
		},
	}
	s.addOutputFlags(cmd)
	cmd.Flags().StringVar(&req.Network, "network", "", "only this network")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	return cmd
}
