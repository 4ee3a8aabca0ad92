// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) caCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "The certificate authority: its state",
		Args:  subcommandOnly, RunE: showHelp,
	}
	cmd.AddCommand(s.caStatusCommand())
	return cmd
}

func (s *session) caStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "List the authorities that sign certificates",
		Long: `List the authorities that sign certificates.

There is one root, and below it one issuer for each cluster and each network of
virtual machines, made when it is first needed, and one for meshd itself. The
newest of each is "active"; the one before is "retiring" while certificates that
it signed may be alive.`,
		Example: `  mesh ca status
  mesh ca status -o wide`,
		Args: arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := s.fetchAuthority(cmd.Context())
			if err != nil {
				return err
			}
			return s.print(l)
		},
	}
	s.addOutputFlags(cmd)
	return cmd
}

func (s *session) fetchAuthority(ctx context.Context) (*listing, error) {
	var report *api.AuthorityReport
	err := s.call(ctx, "cannot read the authority", func(ctx context.Context, c *connection) (err error) {
		report, err = c.GetAuthority(ctx, &api.GetAuthorityRequest{})
		return err
	})
	if err != nil {
		return nil, err
	}
	l := &listing{object: report, empty: "there is no authority", table: table{columns: []column{
		{head: "ISSUES FOR"}, {head: "PHASE"}, {head: "SINCE"}, {head: "ENDS IN"}, {head: "ID"},
		{head: "EPOCH", right: true, wide: true}, {head: "SCOPE", wide: true},
	}}}
	for _, i := range report.GetIssuers() {
		end := i.GetNotAfter().AsTime()
		ends := cell{text: short(end.Sub(s.now()))}
		// The last tenth of its life is when mesh check begins to warn.
		if end.Sub(s.now()) < end.Sub(i.GetNotBefore().AsTime())/10 {
			ends.tone = yellow
		}
		l.table.rows = append(l.table.rows, []cell{
			{text: i.GetName()}, {text: i.GetPhase(), tone: issuerTone(i.GetPhase())}, {text: s.age(i.GetSince()) + " ago"},
			ends, {text: i.GetId()}, {text: fmt.Sprint(i.GetEpoch())}, {text: i.GetScope()},
		})
		l.names = append(l.names, "issuer/"+i.GetId())
	}
	return l, nil
}

func issuerTone(phase string) tone {
	switch phase {
	case "active":
		return green
	case "tainted", "revoked":
		return red
	}
	return plain
}
