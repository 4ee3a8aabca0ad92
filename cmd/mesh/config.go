// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) configCommand() *cobra.Command {
	var req api.ListConfigRequest
	cmd := &cobra.Command{
		Use:   "config [KIND]",
		Short: "List configuration objects and what became of them",
		Long: `List configuration objects and what became of them.

Active            in force, but for what -o wide or yaml notes
NotYetTranslated  stored; this version of the mesh does nothing with its kind
Conflict          another primary has the same object with another content
Invalid           ignored; what was in force before it stays in force
IgnoredOnRemote   in a remote cluster, which contributes no configuration
UnknownKind       of no kind that this mesh knows`,
		Example: `  mesh config
  mesh config VirtualService -n shop`,
		Args: arguments(0, 1, "kind"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				req.Kind = args[0]
			}
			l, err := s.fetchConfig(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return s.print(l)
		},
	}
	s.addOutputFlags(cmd)
	s.addFilterFlags(cmd, &req.Namespace, &req.Cluster)
	return cmd
}

func (s *session) fetchConfig(ctx context.Context, req *api.ListConfigRequest) (*listing, error) {
	var list *api.ConfigObjectList
	err := s.call(ctx, "cannot list configuration", func(ctx context.Context, c *connection) (err error) {
		list, err = c.ListConfig(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	l := &listing{object: list, empty: "no configuration objects", table: table{columns: []column{
		{head: "KIND"}, {head: "NAMESPACE"}, {head: "NAME"}, {head: "CLUSTER"}, {head: "STATUS"}, {head: "AGE", spare: 1},
		{head: "API", wide: true}, {head: "MESSAGE", wide: true},
	}}}
	for _, o := range list.GetItems() {
		m := o.GetMetadata()
		l.table.rows = append(l.table.rows, []cell{
			{text: o.GetObjectKind()}, {text: m.GetNamespace()}, {text: m.GetName()}, {text: o.GetCluster()},
			{text: o.GetStatus(), tone: phaseTone(o.GetStatus())}, {text: s.age(m.GetCreated())},
			{text: o.GetGroupVersion()}, {text: noteText(o)},
		})
		l.names = append(l.names, o.GetObjectKind()+"/"+m.GetNamespace()+"/"+m.GetName())
	}
	return l, nil
}

// noteText is the message and the notes of an object on one line.
func noteText(o *api.ConfigObject) string {
	parts := o.GetNotes()
	if o.GetMessage() != "" {
		parts = append([]string{o.GetMessage()}, parts...)
	}
	return strings.Join(parts, "; ")
}
