// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"fmt"
	"strings"
)

// ClusterID is the UID of a cluster's kube-system namespace: who a cluster is.
// Its name is only a label on that.
type ClusterID string

// Network names a set of addresses that reach each other directly.
type Network string

// SourceID names what reports services: "kube:<cluster id>", "vm:<network>".
type SourceID string

// KubeSource is the source of a joined cluster.
func KubeSource(id ClusterID) SourceID { return SourceID("kube:" + string(id)) }

// VMSource is the source of the virtual machines of a network.
func VMSource(n Network) SourceID { return SourceID("vm:" + string(n)) }

// Cluster is the cluster of a "kube:" source; false for every other kind.
func (s SourceID) Cluster() (ClusterID, bool) {
	id, ok := strings.CutPrefix(string(s), "kube:")
	if !ok {
		return "", false
	}
	return ClusterID(id), true
}

// VMNetwork is the network of a "vm:" source; false for every other kind.
func (s SourceID) VMNetwork() (Network, bool) {
	n, ok := strings.CutPrefix(string(s), "vm:")
	if !ok {
		return "", false
	}
	return Network(n), true
}

// ServiceName is the key of sameness: services of the same namespace and name in all
// sources are one service.
type ServiceName struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// ClusterDomain is the DNS suffix of every service's host name.
const ClusterDomain = "cluster.local"

// Host is the service's full DNS name, as Istio and Kubernetes spell it.
func (n ServiceName) Host() string {
	return n.Name + "." + n.Namespace + ".svc." + ClusterDomain
}

func (n ServiceName) String() string { return n.Namespace + "/" + n.Name }

// Compare orders by namespace, then name.
func (n ServiceName) Compare(o ServiceName) int {
	if c := strings.Compare(n.Namespace, o.Namespace); c != 0 {
		return c
	}
	return strings.Compare(n.Name, o.Name)
}

// ServiceOfHost is the inverse of Host: false if host is no service's full name.
func ServiceOfHost(host string) (ServiceName, bool) {
	rest, ok := strings.CutSuffix(host, ".svc."+ClusterDomain)
	if !ok {
		return ServiceName{}, false
	}
	name, namespace, ok := strings.Cut(rest, ".")
	if !ok || name == "" || namespace == "" || strings.Contains(namespace, ".") {
		return ServiceName{}, false
	}
	return ServiceName{Namespace: namespace, Name: name}, true
}

// OutboundCluster is the Envoy cluster name of a service port, in Istio's convention:
// "outbound|80|v1|reviews.default.svc.cluster.local"; subset may be empty.
func OutboundCluster(port uint32, subset, host string) string {
	return fmt.Sprintf("outbound|%d|%s|%s", port, subset, host)
}

// SNI is what a client says to an east-west gateway for the same service port:
// "outbound_.80_.v1_.reviews.default.svc.cluster.local".
func SNI(port uint32, subset, host string) string {
	return fmt.Sprintf("outbound_.%d_.%s_.%s", port, subset, host)
}

// InboundCluster is the Envoy cluster name for a workload's own port: "inbound|8080||".
func InboundCluster(port uint32) string { return fmt.Sprintf("inbound|%d||", port) }

// Locality is a place, from the nodes' topology labels; any part may be empty.
type Locality struct {
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	Subzone string `json:"subzone,omitempty"`
}
