// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"net/netip"
	"time"
)

// Protocol is a port's application protocol, in Istio's spelling. What a source cannot
// tell is Unsupported, and travels as TCP unless it sniffs as HTTP (see xds).
type Protocol string

// The protocols a port can have. UDP ports are not part of the mesh.
const (
	HTTP    Protocol = "HTTP"
	HTTP2   Protocol = "HTTP2"
	GRPC    Protocol = "GRPC"
	GRPCWeb Protocol = "GRPC-Web"
	HTTPS   Protocol = "HTTPS"
	TLS     Protocol = "TLS"
	TCP     Protocol = "TCP"
	Mongo   Protocol = "Mongo"
	Redis   Protocol = "Redis"
	MySQL   Protocol = "MySQL"
	Unknown Protocol = "" // no name and no appProtocol: to be sniffed
)

// IsHTTP tells whether requests of this protocol can be routed one by one.
func (p Protocol) IsHTTP() bool {
	return p == HTTP || p == HTTP2 || p == GRPC || p == GRPCWeb
}

// Port is one port of a service. The number is its key across sources.
type Port struct {
	Number   uint32   `json:"number"`
	Name     string   `json:"name,omitempty"`
	Protocol Protocol `json:"protocol,omitempty"`
}

// ServiceType tells how a service is addressed where it is defined.
type ServiceType string

// The service types.
const (
	ClusterIP    ServiceType = "ClusterIP" // also NodePort and LoadBalancer
	Headless     ServiceType = "Headless"
	ExternalName ServiceType = "ExternalName" // never merges
)

// Record is one service as one source reports it. A Record is immutable once handed on.
type Record struct {
	Source SourceID    `json:"source"`
	Name   ServiceName `json:"name"`
	Type   ServiceType `json:"type"`

	// Created is when the service was made in its source. The oldest record decides
	// where records disagree.
	Created time.Time `json:"created"`

	Ports []Port `json:"ports,omitempty"` // ordered by number

	// ClusterIPs are meaningful only inside the source's cluster.
	ClusterIPs []netip.Addr `json:"clusterIPs,omitempty"`

	ExternalName string            `json:"externalName,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`

	// ClusterLocal services are seen by the source's own cluster only.
	ClusterLocal bool `json:"clusterLocal,omitempty"`

	// ExportTo lists namespaces (or "." for its own, "*" for all, "~" for none) that may
	// see the service; empty means all (annotation networking.istio.io/exportTo).
	ExportTo []string `json:"exportTo,omitempty"`

	// PublishNotReady is Kubernetes' publishNotReadyAddresses.
	PublishNotReady bool `json:"publishNotReady,omitempty"`

	Endpoints []Endpoint `json:"endpoints,omitempty"` // ordered by Key
}

// Port returns the port with that number.
func (r *Record) Port(number uint32) (Port, bool) {
	for _, p := range r.Ports {
		if p.Number == number {
			return p, true
		}
	}
	return Port{}, false
}

// Health of an endpoint, as its source judges it.
type Health string

// The healths, best first. Only Ready endpoints get new traffic, unless all the endpoints
// of a service that are left are Terminating ones that still serve (as kube-proxy does).
const (
	Ready       Health = "Ready"
	Terminating Health = "Terminating" // shutting down, still serving
	NotReady    Health = "NotReady"
)

// Endpoint is one workload behind a service.
type Endpoint struct {
	// Workload is the pod's or the VM's name; with the record's source and namespace it
	// is the key of a Workload. UID tells incarnations apart.
	Workload string `json:"workload,omitempty"`
	UID      string `json:"uid,omitempty"`

	// Addresses of the endpoint, at most one of each family, IPv4 first.
	Addresses []netip.Addr `json:"addresses"`

	// TargetPorts maps a service port's number to the port the workload listens on. A
	// port that is missing here is not served by this endpoint.
	TargetPorts map[uint32]uint32 `json:"targetPorts,omitempty"`

	Health         Health            `json:"health"`
	Network        Network           `json:"network"`
	Locality       Locality          `json:"locality,omitzero"`
	Hostname       string            `json:"hostname,omitempty"` // of a StatefulSet's pod
	ServiceAccount string            `json:"serviceAccount,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`

	// Mesh tells that a proxy of the mesh stands before it, so that it speaks mutual TLS.
	Mesh bool `json:"mesh,omitempty"`
}

// Key orders and identifies the endpoints of one record: workload name, else address.
func (e *Endpoint) Key() string {
	if e.Workload != "" {
		return e.Workload
	}
	if len(e.Addresses) > 0 {
		return e.Addresses[0].String()
	}
	return ""
}

// ProxyRole is what a workload's proxy does.
type ProxyRole string

// The proxy roles.
const (
	Sidecar     ProxyRole = "sidecar"
	GatewayRole ProxyRole = "gateway" // east-west gateway
	VMRole      ProxyRole = "vm"
)

// Workload is a pod or VM that runs a proxy of the mesh, whether or not a service
// selects it. It is found by (Source, UID), which its credential proves.
type Workload struct {
	Source         SourceID          `json:"source"`
	Namespace      string            `json:"namespace"`
	Name           string            `json:"name"`
	UID            string            `json:"uid"`
	Role           ProxyRole         `json:"role"`
	ServiceAccount string            `json:"serviceAccount"`
	Network        Network           `json:"network"`
	Locality       Locality          `json:"locality,omitzero"`
	Addresses      []netip.Addr      `json:"addresses,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`

	// Ready gateways take traffic of other networks.
	Ready bool `json:"ready,omitempty"`
}

// Gateway is the way into a network from outside: what a Service of an east-west gateway
// in one source offers.
type Gateway struct {
	Source  SourceID `json:"source"`
	Network Network  `json:"network"`
	Name    string   `json:"name"` // namespace/name of its Service, or "static"

	// Addresses that reach it from other networks. Host names are given as they are;
	// empty means that there is none yet, and Pending says why.
	Addresses []GatewayAddress `json:"addresses,omitempty"`
	Pending   string           `json:"pending,omitempty"`

	// Ready is the number of ready gateway pods behind it.
	Ready int `json:"ready"`
}

// GatewayAddress is one address of a gateway.
type GatewayAddress struct {
	Host string `json:"host"` // IP address or DNS name
	Port uint32 `json:"port"` // usually 15443
}

// Object is a piece of users' configuration as its source holds it, kept whole.
type Object struct {
	Source     SourceID  `json:"source"`
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Namespace  string    `json:"namespace"`
	Name       string    `json:"name"`
	Created    time.Time `json:"created"`
	Generation int64     `json:"generation,omitempty"`
	Raw        []byte    `json:"raw"` // JSON, without managedFields and status
}
