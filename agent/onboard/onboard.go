// SPDX-License-Identifier: Apache-2.0

// Package onboard holds what a machine outside Kubernetes needs to know to join
// the mesh, and the one line with which its owner starts.
//
// meshd serves a Config for each registered machine; the onboarding script
// stores it, and the agent reads it at every start. It holds no secret.
package onboard

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/isthmus-mesh/isthmus/agent/servers"
)

// Version is the schema version of Config.
const Version = 1

// ErrInvalid means that a Config cannot be used.
var ErrInvalid = errors.New("invalid onboarding configuration")

// Config is served as JSON at GET /onboard/<name>/config.
type Config struct {
	// V is the schema version, Version.
	V int `json:"v"`
	// Name of the machine, for example "web-1".
	Name string `json:"name"`
	// Namespace and ServiceAccount make its identity, Service its name.
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	// Service is the service of the namespace that it belongs to; empty for a
	// machine that only calls.
	Service string `json:"service,omitempty"`
	// Network that its addresses belong to.
	Network string `json:"network"`
	// Server is host:port of meshd for discovery and certificates; several, separated by
	// commas, where it has replicas.
	Server string `json:"server"`
	// TrustDomain and Domain; empty means cluster.local.
	TrustDomain string `json:"trustDomain,omitempty"`
	Domain      string `json:"clusterDomain,omitempty"`
	// Ports on which the workload listens.
	Ports []Port `json:"ports,omitempty"`
	// Health is how the agent finds out whether the workload works. Without
	// it, a connection to the first port decides.
	Health *Health `json:"health,omitempty"`
	// Labels of the workload.
	Labels map[string]string `json:"labels,omitempty"`
	// CaptureTo are the destinations that go through the mesh, as CIDR; empty
	// means the mesh's virtual addresses (see VirtualRanges).
	CaptureTo []string `json:"captureTo,omitempty"`
	// Locality, where known: region, zone, subzone, separated by slashes.
	Locality string `json:"locality,omitempty"`
}

// Port is one port of the workload.
type Port struct {
	// Name as in the service, for example "http".
	Name string `json:"name,omitempty"`
	// Port of the machine, on which the workload listens.
	Port uint16 `json:"port"`
	// Protocol in Istio's spelling, for example "HTTP"; empty means TCP.
	Protocol string `json:"protocol,omitempty"`
}

// Health is one check, repeated.
type Health struct {
	// Port to connect to on the machine itself; 0 means the first port.
	Port uint16 `json:"port,omitempty"`
	// Path makes it an HTTP GET that must answer 200 to 399; empty means that
	// a connection suffices.
	Path string `json:"path,omitempty"`
	// IntervalSeconds and TimeoutSeconds; 0 means 2 and 1.
	IntervalSeconds int `json:"intervalSeconds,omitempty"`
	TimeoutSeconds  int `json:"timeoutSeconds,omitempty"`
	// Failures and successes in a row that change the verdict; 0 means 2 and 1.
	FailureThreshold int `json:"failureThreshold,omitempty"`
	SuccessThreshold int `json:"successThreshold,omitempty"`
}

// VirtualRanges are where the mesh's virtual addresses come from by default.
func VirtualRanges() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("240.240.0.0/12"), netip.MustParsePrefix("2001:2::/48")}
}

// Parse decodes and checks a Config. Unknown fields are from a newer meshd and
// are ignored.
func Parse(data []byte) (*Config, error) {
	var c Config
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if c.V != Version {
		return nil, fmt.Errorf("%w: schema version %d: this agent understands %d", ErrInvalid, c.V, Version)
	}
	for _, field := range []struct{ name, value string }{
		{"name", c.Name}, {"namespace", c.Namespace}, {"serviceAccount", c.ServiceAccount}, {"network", c.Network},
	} {
		if field.value == "" {
			return nil, fmt.Errorf("%w: %s is empty", ErrInvalid, field.name)
		}
	}
	if _, err := servers.Parse(c.Server); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	for _, p := range c.Ports {
		if p.Port == 0 {
			return nil, fmt.Errorf("%w: port %q has number 0", ErrInvalid, p.Name)
		}
	}
	if _, err := c.Capture(); err != nil {
		return nil, err
	}
	return &c, nil
}

// Capture returns the destinations that go through the mesh.
func (c *Config) Capture() ([]netip.Prefix, error) {
	if len(c.CaptureTo) == 0 {
		return VirtualRanges(), nil
	}
	var prefixes []netip.Prefix
	for _, text := range c.CaptureTo {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("%w: captureTo %q: want a range such as 10.0.0.0/8", ErrInvalid, text)
		}
		prefixes = append(prefixes, p.Masked())
	}
	return prefixes, nil
}
