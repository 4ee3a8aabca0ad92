// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"strings"

	"github.com/isthmus-mesh/isthmus/agent/bootstrap"
)

// bootstrapConfig describes this workload to Envoy, and through it to meshd,
// in Istio's keys. meshd uses them to choose, never to believe.
func (c *Config) bootstrapConfig() *bootstrap.Config {
	kind := "sidecar"
	if c.Role == Gateway {
		kind = "router"
	}
	locality := append(strings.SplitN(c.Locality, "/", 3), "", "", "")
	return &bootstrap.Config{
		NodeType:  kind,
		Name:      c.Name,
		Namespace: c.Namespace,
		Domain:    c.Domain,
		Address:   c.Addresses[0],
		Cluster:   c.envoyCluster(),
		Region:    locality[0],
		Zone:      locality[1],
		SubZone:   locality[2],
		Metadata:  c.metadata(),
		Socket:    c.socket(),
		AdminPort: c.AdminPort,
		StatsPort: c.StatsPort,
		AccessLog: c.AccessLog,
	}
}

// envoyCluster is what the proxies of one workload have in common.
func (c *Config) envoyCluster() string {
	for _, label := range []string{"app.kubernetes.io/name", "app"} {
		if app := c.Labels[label]; app != "" {
			return app + "." + c.Namespace
		}
	}
	return c.Name + "." + c.Namespace
}

func (c *Config) metadata() map[string]any {
	var addresses []string
	for _, a := range c.Addresses {
		addresses = append(addresses, a.String())
	}
	labels := map[string]any{}
	for key, value := range c.Labels {
		labels[key] = value
	}
	m := map[string]any{
		"NAMESPACE":       c.Namespace,
		"INSTANCE_IPS":    strings.Join(addresses, ","),
		"LABELS":          labels,
		"NAME":            c.Name,
		"ISTHMUS_VERSION": c.Version,
		"ISTHMUS_ROLE":    string(c.Role),
		"PROXY_CONFIG": map[string]any{
			"discoveryAddress": c.servers[0],
			"drainDuration":    c.Drain.String(),
			"concurrency":      c.Concurrency,
		},
	}
	for key, value := range map[string]string{
		"CLUSTER_ID":      c.ClusterID,
		"NETWORK":         c.Network,
		"SERVICE_ACCOUNT": c.ServiceAccount,
		"NODE_NAME":       c.NodeName,
		"POD_UID":         c.UID,
	} {
		if value != "" {
			m[key] = value
		}
	}
	if !c.NoDNS {
		m["DNS_CAPTURE"] = "true"
	}
	return m
}
