// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// The first parts of keys.
const (
	clustersPrefix   = "clusters/"
	namesPrefix      = "names/"
	issuerKeysPrefix = "issuer-keys/"
	recordsPrefix    = "records/"
	workloadsPrefix  = "workloads/"
	gatewaysPrefix   = "gateways/"
	configPrefix     = "config/"
	byHostPrefix     = "addresses/by-host/"
	byIPPrefix       = "addresses/by-ip/"
	vmsPrefix        = "vms/"
	sessionsPrefix   = "sessions/"
	settledPrefix    = "settled/"
	replicasPrefix   = "replicas/"
	changesPrefix    = "changes/"
)

// loaded are the prefixes whose values the replica holds.
var loaded = []string{
	clustersPrefix, recordsPrefix, workloadsPrefix, gatewaysPrefix, configPrefix,
	byHostPrefix, vmsPrefix, sessionsPrefix, settledPrefix, replicasPrefix,
}

// key joins parts to a key, each of them encoded so that it has no slash. An empty part
// is kept: "config/s/k//name" is an object without namespace.
func key(prefix string, parts ...string) string {
	var b strings.Builder
	b.WriteString(prefix)
	for i, p := range parts {
		if i > 0 {
			b.WriteByte('/')
		}
		if strings.ContainsAny(p, "/%") {
			p = url.PathEscape(p)
		}
		b.WriteString(p)
	}
	return b.String()
}

// parts is the inverse of key; it fails where an encoding is broken or the number of
// parts is not between atLeast and atMost.
func parts(k, prefix string, atLeast, atMost int) ([]string, error) {
	rest, ok := strings.CutPrefix(k, prefix)
	if !ok {
		return nil, fmt.Errorf("key does not begin with %q", prefix)
	}
	list := strings.Split(rest, "/")
	if len(list) < atLeast || len(list) > atMost {
		return nil, fmt.Errorf("key has %d parts after %q, want %d to %d", len(list), prefix, atLeast, atMost)
	}
	for i, p := range list {
		if !strings.Contains(p, "%") {
			continue
		}
		var err error
		if list[i], err = url.PathUnescape(p); err != nil {
			return nil, fmt.Errorf("key: %w", err)
		}
	}
	return list, nil
}

func clusterKey(id federation.ClusterID) string     { return key(clustersPrefix, string(id)) }
func conditionsKey(id federation.ClusterID) string  { return clusterKey(id) + "/conditions" }
func credentialsKey(id federation.ClusterID) string { return clusterKey(id) + "/credentials" }
func nameKey(name string) string                    { return key(namesPrefix, name) }
func issuerKey(thumbprint string) string            { return key(issuerKeysPrefix, thumbprint) }
func sessionKey(s federation.SourceID) string       { return key(sessionsPrefix, string(s)) }
func settledKey(s federation.SourceID) string       { return key(settledPrefix, string(s)) }
func replicaKey(name string) string                 { return key(replicasPrefix, name) }

func recordKey(s federation.SourceID, n federation.ServiceName) string {
	return key(recordsPrefix, string(s), n.Namespace, n.Name)
}

func gatewayKey(g *federation.Gateway) string {
	return key(gatewaysPrefix, string(g.Network), string(g.Source), g.Name)
}

func objectKey(s federation.SourceID, kind registry.ObjectKind, n registry.ObjectName) string {
	return key(configPrefix, string(s), string(kind), n.Namespace, n.Name)
}

func hostKey(host string) string         { return key(byHostPrefix, host) }
func ipKey(ip string) string             { return key(byIPPrefix, ip) }
func vmKey(n registry.VMName) string     { return key(vmsPrefix, string(n.Network), n.Name) }
func healthKey(n registry.VMName) string { return vmKey(n) + "/health" }
func presentKey(n registry.VMName) string {
	return vmKey(n) + "/present"
}
