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
	at, st, width := a.GetTime().AsTime().UTC().Format(time.RFC3339), s.style(s.stdout), s.columns(s.stdout)
	verb, object := printable(a.GetVerb()), printable(a.GetObject())
	if width == 0 || width >= 120 {
		verb = fmt.Sprintf("%-16s", verb) // a column, where there is room for one
	}
	used := len(at) + 1 + st.markWidth(state) + 1 + len(verb) + 2 + len(object)
	var rest []string
	for _, part := range []string{a.GetActor(), a.GetMessage(), s.wideOnly(a.GetReplica())} {
		if part != "" {
			rest = append(rest, printable(part))
		}
	}
	text := strings.Join(rest, "  ")
	event := fmt.Sprintf("%s %s %s  %s", at, st.mark(state), verb, object)
	if width == 0 || used+2+len(text) <= width {
		fmt.Fprintln(s.stdout, strings.TrimRight(event+"  "+text, " "))
		return
	}
	// What happened on a line, who and why below it.
	const indent = 6
	fmt.Fprintln(s.stdout, strings.TrimRight(event, " "))
	if text != "" {
		fmt.Fprintf(s.stdout, "%*s%s\n", indent, "", fold(text, width, indent))
	}
}

func (s *session) wideOnly(text string) string {
	if s.output != "wide" {
		return ""
	}
	return text
}
