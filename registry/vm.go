// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// VMName identifies a VM: names are unique on a network.
type VMName struct {
	Network federation.Network
	Name    string
}

func (n VMName) String() string { return string(n.Network) + "/" + n.Name }

// VM is a registered workload outside of Kubernetes.
type VM struct {
	Network        federation.Network     `json:"network"`
	Name           string                 `json:"name"`
	Service        federation.ServiceName `json:"service"`
	Ports          []VMPort               `json:"ports,omitempty"`
	ServiceAccount string                 `json:"serviceAccount"`

	// HealthCheck is how its agent probes it: "http://:8080/ready" or "tcp://:8080".
	HealthCheck string              `json:"healthCheck,omitempty"`
	Locality    federation.Locality `json:"locality,omitzero"`
	Labels      map[string]string   `json:"labels,omitempty"`
	Created     time.Time           `json:"created"`

	// Invited is until when its last token could be used; zero if that is not known.
	Invited time.Time `json:"invited,omitzero"`

	// Health is what it reported last; nil if nothing yet. It is not part of the
	// registration.
	Health *VMHealth `json:"-"`

	// Present tells that some replica has heard of it within the lease window.
	Present bool `json:"-"`
}

// VMPort is a port of the VM's service and where the VM serves it.
type VMPort struct {
	Number   uint32              `json:"number"`
	Target   uint32              `json:"target"` // 0 means Number
	Name     string              `json:"name,omitempty"`
	Protocol federation.Protocol `json:"protocol,omitempty"`
}

// VMHealth is what a VM's agent reports.
type VMHealth struct {
	Healthy   bool         `json:"healthy"`
	Message   string       `json:"message,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Version   string       `json:"version,omitempty"`
	Platform  string       `json:"platform,omitempty"`
	Since     time.Time    `json:"since"` // when Healthy last changed

	// CertificateExpires is when the certificate ends with which it can renew itself;
	// zero if that is not known.
	CertificateExpires time.Time `json:"certificateExpires,omitzero"`
}

// Same tells that two reports mean the same, whenever they were made.
func (h *VMHealth) Same(o *VMHealth) bool {
	return h.Healthy == o.Healthy && h.Message == o.Message && h.Version == o.Version &&
		h.Platform == o.Platform && slices.Equal(h.Addresses, o.Addresses) && h.CertificateExpires.Equal(o.CertificateExpires)
}

// Key names the VM.
func (v *VM) Key() VMName { return VMName{v.Network, v.Name} }

// Validate names the first field that cannot be right.
func (v *VM) Validate() error {
	for _, f := range []struct{ field, value string }{
		{"name", v.Name}, {"network", string(v.Network)}, {"service namespace", v.Service.Namespace},
		{"service name", v.Service.Name}, {"serviceAccount", v.ServiceAccount},
	} {
		if f.value == "" || len(f.value) > 63 || strings.ContainsAny(f.value, "/ ") {
			return fmt.Errorf("vm %q: %s %q must have 1 to 63 characters and no slash or space", v.Name, f.field, f.value)
		}
	}
	seen := map[uint32]bool{}
	for _, p := range v.Ports {
		if p.Number == 0 || p.Number > 65535 || p.Target > 65535 {
			return fmt.Errorf("vm %q: port %d:%d must be between 1 and 65535", v.Name, p.Number, p.Target)
		}
		if seen[p.Number] {
			return fmt.Errorf("vm %q: port %d is given twice", v.Name, p.Number)
		}
		seen[p.Number] = true
	}
	return nil
}
