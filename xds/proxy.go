// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"net/netip"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Ports of the proxy that its listeners stand on.
const (
	OutboundPort = 15001
	InboundPort  = 15006
	GatewayPort  = 15443
)

// GatewayConnectionDuration bounds how long an HTTP connection that may lead to an
// east-west gateway takes new requests. Gateways must drain for more than twice as long.
const GatewayConnectionDuration = 15 * time.Second

// DefaultTrustDomain is the trust domain of a proxy that names none.
const DefaultTrustDomain = "cluster.local"

// ALPN are the application protocols that every client inside the mesh offers. The
// passthrough chain of a gateway and the inbound chains of sidecars match on them.
var ALPN = []string{"istio", "isthmus"}

// Proxy is who asks, as its credential and its workload's record say; nothing in it comes
// from what the proxy says about itself.
type Proxy struct {
	Workload       federation.WorkloadKey
	Name           string               // of the workload, for people
	Cluster        federation.ClusterID // empty for VMs
	Network        federation.Network
	Namespace      string
	ServiceAccount string
	Labels         map[string]string
	Locality       federation.Locality
	Role           federation.ProxyRole
	Addresses      []netip.Addr // decide only which address families it gets
	TrustDomain    string       // empty means DefaultTrustDomain
}

// ProxyOf is the proxy of a workload.
func ProxyOf(w *federation.Workload, trustDomain string) Proxy {
	cluster, _ := w.Source.Cluster()
	return Proxy{
		Workload:       federation.WorkloadKey{Source: w.Source, UID: w.UID},
		Name:           w.Name,
		Cluster:        cluster,
		Network:        w.Network,
		Namespace:      w.Namespace,
		ServiceAccount: w.ServiceAccount,
		Labels:         w.Labels,
		Locality:       w.Locality,
		Role:           w.Role,
		Addresses:      w.Addresses,
		TrustDomain:    trustDomain,
	}
}

// trustDomain with its default.
func (p Proxy) trustDomain() string {
	if p.TrustDomain == "" {
		return DefaultTrustDomain
	}
	return p.TrustDomain
}
