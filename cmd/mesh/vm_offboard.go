// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) vmOffboardCommand() *cobra.Command {
	var yes bool
	var req api.OffboardVMRequest
	cmd := &cobra.Command{
		Use:   "offboard NAME",
		Short: "Take a virtual machine out: its streams are closed, its certificate is not renewed",
		Args:  arguments(1, 1, "the name of the virtual machine"), ValidArgsFunction: s.completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			if err := s.confirm(yes, "Take "+req.Name+" out of the mesh?", req.Name); err != nil {
				return err
			}
			var out *api.OffboardVMResponse
			err := s.call(cmd.Context(), "cannot offboard "+req.Name, func(ctx context.Context, c *connection) (err error) {
				out, err = c.OffboardVM(ctx, &req)
				return err
			})
			if err != nil {
				return err
			}
			spec := out.GetVm().GetSpec()
			fmt.Fprintf(s.stdout, "%s %s is out: %s closed, %s/%s no longer has it\n", s.style(s.stdout).mark("done"),
				printable(req.Name), noun(int(out.GetStreamsClosed()), "stream"), spec.GetNamespace(), spec.GetService())
			fmt.Fprintln(s.stdout, "  on the machine, remove what is left by: mesh-onboard.sh --uninstall")
			return nil
		},
	}
	cmd.Flags().StringVar(&req.Network, "network", "", "the machine's network, where the name alone is not unique")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}
