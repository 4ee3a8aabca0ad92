// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) clustersCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "clusters [NAME]",
		Short: "List the joined clusters and their state",
		Long: `List the joined clusters and their state.

LAG is how old what meshd knows of the cluster may be: of the kind of objects that it
has not heard of for longest. REASON (-o wide) names such kinds. CREDENTIALS says whether
meshd renews its credential for the cluster itself, and how long it is valid.
STANDING (-o wide) is how much its endpoints count for others: "fresh", "demoted"
(its API server is away: called last) or "drained" (its gateways too: called only
for what nobody else has).`,
		Example: `  mesh clusters
  mesh clusters west -o yaml
  mesh clusters -o json | jq '.items[].status.conditions[] | select(.status != "True")'`,
		Aliases: []string{"cluster"},
		Args:    arguments(0, 1, "name"), ValidArgsFunction: s.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.printWatched(cmd.Context(), watch, func(ctx context.Context) (*listing, error) {
				return s.fetchClusters(ctx, args)
			})
		},
	}
	s.addOutputFlags(cmd)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	return cmd
}

func (s *session) fetchClusters(ctx context.Context, args []string) (*listing, error) {
	var items []*api.Cluster
	var object proto.Message
	err := s.call(ctx, "cannot list clusters", func(ctx context.Context, c *connection) error {
		if len(args) == 1 {
			one, err := c.GetCluster(ctx, &api.GetClusterRequest{Name: args[0]})
			items, object = []*api.Cluster{one}, one
			return err
		}
		list, err := c.ListClusters(ctx, &api.ListClustersRequest{})
		items, object = list.GetItems(), list
		return err
	})
	if err != nil {
		return nil, err
	}
	l := &listing{
		object: object,
		empty:  "no cluster has joined yet; join one by: mesh join cluster NAME --context CONTEXT --network NETWORK",
		table: table{columns: []column{
			{head: "NAME"}, {head: "ROLE"}, {head: "STATUS"}, {head: "NETWORK", spare: 1},
			{head: "SERVICES", right: true}, {head: "ENDPOINTS", right: true}, {head: "LAG"},
			{head: "GATEWAY"}, {head: "CREDENTIALS", spare: 3}, {head: "AGE", spare: 2},
			{head: "STANDING", wide: true}, {head: "PROXIES", right: true, wide: true}, {head: "KUBERNETES", wide: true},
			{head: "API-SERVER", wide: true}, {head: "UID", wide: true}, {head: "REASON", wide: true},
		}},
	}
	for _, c := range items {
		l.table.rows = append(l.table.rows, s.clusterRow(c))
		l.names = append(l.names, "cluster/"+c.GetMetadata().GetName())
	}
	return l, nil
}

func (s *session) clusterRow(c *api.Cluster) []cell {
	st := c.GetStatus()
	return []cell{
		{text: c.GetMetadata().GetName()},
		{text: c.GetSpec().GetRole()},
		{text: st.GetPhase(), tone: phaseTone(st.GetPhase())},
		{text: c.GetSpec().GetNetwork()},
		{text: count(st.GetServices())},
		{text: count(st.GetEndpoints())},
		{text: lag(st.GetLag())},
		{text: gatewayText(c)},
		{text: s.credentialText(st)},
		{text: s.age(c.GetMetadata().GetCreated())},
		{text: st.GetStanding(), tone: phaseTone(st.GetStanding())},
		{text: count(st.GetProxies())},
		{text: st.GetKubernetesVersion()},
		{text: c.GetSpec().GetApiServer()},
		{text: c.GetMetadata().GetUid()},
		{text: reasonText(st.GetConditions())},
	}
}

// gatewayText is the first address of the cluster's gateways, and how many more
// there are.
func gatewayText(c *api.Cluster) string {
	var addresses []string
	for _, g := range c.GetStatus().GetGateways() {
		if g.GetAddress() != "" {
			addresses = append(addresses, net.JoinHostPort(g.GetAddress(), strconv.Itoa(int(g.GetPort()))))
		}
	}
	switch len(addresses) {
	case 0:
		return ""
	case 1:
		return addresses[0]
	}
	return fmt.Sprintf("%s +%d", addresses[0], len(addresses)-1)
}

func (s *session) credentialText(st *api.ClusterStatus) string {
	kind := st.GetCredentials()
	if st.GetCredentialsExpire() == nil {
		return kind
	}
	left := st.GetCredentialsExpire().AsTime().Sub(s.now())
	if left <= 0 {
		return "expired " + short(-left) + " ago"
	}
	return strings.TrimSpace(kind + " (" + short(left) + ")")
}

// reasonText is what is wrong, if anything.
func reasonText(conditions []*api.Condition) string {
	var reasons []string
	for _, c := range conditions {
		if c.GetStatus() == "True" {
			continue
		}
		reason := c.GetReason()
		if c.GetMessage() != "" {
			reason += ": " + c.GetMessage()
		}
		reasons = append(reasons, reason)
	}
	return strings.Join(reasons, "; ")
}

func phaseTone(phase string) tone {
	switch phase {
	case "Ready", "Healthy", "Connected", "Active", "synced", "fresh":
		return green
	case "Degraded", "demoted", "Joining", "Leaving", "Pending", "pending", "NotYetTranslated", "IgnoredOnRemote", "Redeemed":
		return yellow
	case "":
		return plain
	}
	return red
}
