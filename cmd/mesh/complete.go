// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

// completionTimeout bounds how long the Tab key may take.
const completionTimeout = 2 * time.Second

// completeFrom asks meshd for names; a shell gets none when that fails.
func (s *session) completeFrom(cmd *cobra.Command, f func(context.Context, *connection) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	var names []string
	err := s.call(ctx, "", func(ctx context.Context, c *connection) (err error) {
		names, err = f(ctx, c)
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (s *session) completeClusters(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return s.completeFrom(cmd, func(ctx context.Context, c *connection) ([]string, error) {
		list, err := c.ListClusters(ctx, &api.ListClustersRequest{})
		var names []string
		for _, v := range list.GetItems() {
			names = append(names, v.GetMetadata().GetName())
		}
		return names, err
	})
}

func (s *session) completeServices(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return s.completeFrom(cmd, func(ctx context.Context, c *connection) ([]string, error) {
		list, err := c.ListServices(ctx, &api.ListServicesRequest{})
		var names []string
		for _, v := range list.GetItems() {
			names = append(names, v.GetMetadata().GetNamespace()+"/"+v.GetMetadata().GetName())
		}
		return names, err
	})
}

func (s *session) completeVMs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return s.completeFrom(cmd, func(ctx context.Context, c *connection) ([]string, error) {
		list, err := c.ListVMs(ctx, &api.ListVMsRequest{})
		var names []string
		for _, v := range list.GetItems() {
			names = append(names, v.GetMetadata().GetName())
		}
		return names, err
	})
}
