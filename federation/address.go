// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"net/netip"
	"time"
)

// VirtualAddress is the mesh-wide address of a host that has no ClusterIP where it is
// called from. It is stable across restarts and not reused for 24 h.
type VirtualAddress struct {
	Host string     `json:"host"`
	V4   netip.Addr `json:"v4"` // from 240.240.0.0/12
	V6   netip.Addr `json:"v6"` // from 2001:2::/48

	// Released is when the host was last needed; zero while it is.
	Released time.Time `json:"released,omitzero"`
}

// The default ranges of virtual addresses.
var (
	VirtualV4 = netip.MustParsePrefix("240.240.0.0/12")
	VirtualV6 = netip.MustParsePrefix("2001:2::/48")
)
