// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) activityCommand() *cobra.Command {
	var since time.Duration
	var follow bool
	cmd := &cobra.Command{
		Use:   "activity",
		Short: "Show who did what: joins, certificates, refusals",
		Long: `Show who did what: joins, certificates, refusals.

Every replica of meshd keeps an audit log of its own. The logs of all replicas that
answer are shown together, by time; -o wide says which replica wrote a record. With
-f a replica that starts later is not followed.`,
		Example: "  mesh activity --since 10m\n  mesh activity -f",
		Args:    arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.tail(cmd.Context(), &api.TailActivityRequest{Since: durationpb.New(since), Follow: follow})
		},
	}
	cmd.Flags().StringVarP(&s.output, "output", "o", "table", "output: table, wide or json (one record a line)")
	cmd.Flags().DurationVar(&since, "since", time.Hour, "only what is younger")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on as records are written")
	cmd.AddCommand(s.activityVerifyCommand())
	return cmd
}

func (s *session) tail(ctx context.Context, req *api.TailActivityRequest) error {
	c, err := s.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	stream, err := c.TailActivity(ctx, req)
	if err != nil {
		return s.rpcFailure("cannot read the activity", err)
	}
	for {
		a, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return s.rpcFailure("cannot read the activity", err)
		}
		if s.output == "json" {
			if err := writeJSONLine(s.stdout, a); err != nil {
				return err
			}
			continue
		}
		s.printActivity(a)
	}
}

func (s *session) printActivity(a *api.Activity) {
	state := "ok"
	if a.GetResult() != "ok" {
		state = "failed"
	}
	var parts []string
	replica := ""
	if s.output == "wide" {
		replica = a.GetReplica()
	}
	for _, part := range []string{a.GetVerb(), a.GetObject(), a.GetActor(), a.GetMessage(), replica} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	at, st := a.GetTime().AsTime().UTC().Format(time.RFC3339), s.style(s.stdout)
	// What stands before the text counts on its first line, and is put there after folding.
	const indent = 6
	before := strings.Repeat("~", len(at)+1+st.markWidth(state)-indent) + " "
	text := strings.TrimPrefix(fold(before+printable(strings.Join(parts, "  ")), s.columns(s.stdout), indent), before)
	fmt.Fprintf(s.stdout, "%s %s %s\n", at, st.mark(state), text)
}
