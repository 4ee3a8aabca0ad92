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
		Short: "The certificate authority: its state and its rotation",
		Args:  subcommandOnly, RunE: showHelp,
	}
	cmd.AddCommand(s.caStatusCommand(), s.caRotateCommand())
	for _, c := range rotationChanges {
		cmd.AddCommand(s.caChangeCommand(c))
	}
	return cmd
}

func (s *session) caStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "List the authorities that sign certificates, and how far their rotations are",
		Long: `List the authorities that sign certificates, and how far their rotations are.

There is one root, and below it one issuer for each cluster and each network of
virtual machines, made when it is first needed, and one for meshd itself. The
newest of each is "active"; the one before is "retiring" while certificates that
it signed may be alive.

Of a rotation (mesh ca rotate) the step is told that is being taken: prepare,
distribute, sign-new, drain-old, remove. Below it, for each cluster, how many
proxies verify others with the present roots and have a certificate by the new
authority, and who has not acknowledged the roots.`,
		Example: `  mesh ca status
  mesh ca status -o wide`,
		Args: arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := s.fetchAuthority(cmd.Context())
			if err != nil {
				return err
			}
			return s.printAuthority(report)
		},
	}
	s.addOutputFlags(cmd)
	return cmd
}

func (s *session) fetchAuthority(ctx context.Context) (report *api.AuthorityReport, err error) {
	err = s.call(ctx, "cannot read the authority", func(ctx context.Context, c *connection) (err error) {
		report, err = c.GetAuthority(ctx, &api.GetAuthorityRequest{})
		return err
	})
	return report, err
}

// printAuthority prints the issuers, and the rotations below.
func (s *session) printAuthority(report *api.AuthorityReport) error {
	if err := s.print(s.issuers(report)); err != nil || s.output != "table" && s.output != "wide" {
		return err
	}
	for _, r := range report.GetRotations() {
		if err := s.printRotation(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) issuers(report *api.AuthorityReport) *listing {
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
	return l
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
