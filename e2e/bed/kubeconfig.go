// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"fmt"
	"net"
	"os"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// An entry is one cluster in a kubeconfig, with one user and one context, all
// of the cluster's name.
type entry struct {
	name, url string
	ca        []byte
	user      pair
}

// kubeconfig writes a kubeconfig; its first entry is the current context.
func kubeconfig(entries []entry) ([]byte, error) {
	config := clientcmdapi.NewConfig()
	for _, e := range entries {
		config.Clusters[e.name] = &clientcmdapi.Cluster{Server: e.url, CertificateAuthorityData: e.ca}
		config.AuthInfos[e.name] = &clientcmdapi.AuthInfo{ClientCertificateData: e.user.certificate, ClientKeyData: e.user.key}
		config.Contexts[e.name] = &clientcmdapi.Context{Cluster: e.name, AuthInfo: e.name}
		if config.CurrentContext == "" {
			config.CurrentContext = e.name
		}
	}
	return clientcmd.Write(*config)
}

// Kubeconfig returns the path of the administrator's kubeconfig of all
// clusters, one context per cluster, for programs on the transit network.
func (w *World) Kubeconfig() string { return w.Dir("kubeconfig") }

// writeKubeconfig brings the file up to date with the clusters.
func (w *World) writeKubeconfig() error {
	w.config.Lock()
	defer w.config.Unlock()
	text, err := kubeconfig(w.entries(func(c *Cluster) string { return c.URL() }))
	if err != nil {
		return err
	}
	temporary := w.Kubeconfig() + ".new"
	if err := os.WriteFile(temporary, text, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, w.Kubeconfig())
}

// ForwardedKubeconfig returns the content of a kubeconfig for a person outside
// of the bed: each cluster's API server by a forwarder on the machine's
// loopback. The forwarders last as long as the world.
func (w *World) ForwardedKubeconfig() ([]byte, error) {
	w.mu.Lock()
	clusters := append([]*Cluster(nil), w.clusters...)
	w.mu.Unlock()
	urls := make(map[*Cluster]string)
	for _, c := range clusters {
		f, err := c.host.Forward(0, strings.TrimPrefix(c.URL(), "https://"))
		if err != nil {
			return nil, fmt.Errorf("cluster %s: %w", c.name, err)
		}
		_, port, err := net.SplitHostPort(f.Addr())
		if err != nil {
			return nil, err
		}
		urls[c] = "https://127.0.0.1:" + port
	}
	return kubeconfig(w.entries(func(c *Cluster) string { return urls[c] }))
}

// entries lists the clusters with the addresses that url gives them.
func (w *World) entries(url func(*Cluster) string) []entry {
	w.mu.Lock()
	defer w.mu.Unlock()
	entries := make([]entry, 0, len(w.clusters))
	for _, c := range w.clusters {
		if address := url(c); address != "" {
			entries = append(entries, entry{c.name, address, c.ca.pem, c.admin})
		}
	}
	return entries
}
