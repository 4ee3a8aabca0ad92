// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

func (s *session) vmCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vm",
		Short: "Virtual machines: onboard, list, offboard",
		Args:  subcommandOnly, RunE: showHelp,
	}
	cmd.AddCommand(s.vmOnboardCommand(), s.vmListCommand(), s.vmOffboardCommand())
	return cmd
}

// vmListing is a table of virtual machines.
func (s *session) vmListing(list *api.VMList) *listing {
	l := &listing{object: list, empty: "no virtual machines", table: table{columns: []column{
		{head: "NAME"}, {head: "NETWORK"}, {head: "SERVICE"}, {head: "PORTS", spare: 1}, {head: "STATUS"},
		{head: "ADDRESSES"}, {head: "CERTIFICATE", spare: 3}, {head: "AGE", spare: 2},
		{head: "ACCOUNT", wide: true}, {head: "AGENT", wide: true}, {head: "REPORTED", wide: true}, {head: "MESSAGE", wide: true},
	}}}
	for _, v := range list.GetItems() {
		m, st := v.GetMetadata(), v.GetStatus()
		certificate := ""
		if st.GetCertificateExpires() != nil {
			certificate = s.untilCell(st.GetCertificateExpires()).text
		}
		l.table.rows = append(l.table.rows, []cell{
			{text: m.GetName()}, {text: v.GetSpec().GetNetwork()},
			{text: v.GetSpec().GetNamespace() + "/" + v.GetSpec().GetService()}, {text: vmPortsText(v.GetSpec().GetPorts())},
			{text: st.GetPhase(), tone: phaseTone(st.GetPhase())}, {text: strings.Join(st.GetAddresses(), ",")},
			{text: certificate}, {text: s.age(m.GetCreated())},
			{text: v.GetSpec().GetServiceAccount()}, {text: st.GetAgentVersion()}, {text: s.age(st.GetLastReport())}, {text: st.GetMessage()},
		})
		l.names = append(l.names, "vm/"+m.GetName())
	}
	return l
}
