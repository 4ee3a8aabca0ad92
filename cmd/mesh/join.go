// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/spf13/cobra"

func (s *session) joinCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "join",
		Short: "Make a cluster a member of the mesh",
		Args:  subcommandOnly, RunE: showHelp,
	}
	cmd.AddCommand(s.joinClusterCommand())
	return cmd
}

func (s *session) leaveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "Take a cluster out of the mesh",
		Args:  subcommandOnly, RunE: showHelp,
	}
	cmd.AddCommand(s.leaveClusterCommand())
	return cmd
}
