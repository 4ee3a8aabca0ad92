// SPDX-License-Identifier: Apache-2.0

package stage

import "strings"

// PodNetNS gives the file of the network namespace of a pod ("namespace/name"), for tools
// that keep a connection inside it.
func (s *Stage) PodNetNS(cluster, pod string) (string, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return "", err
	}
	namespace, name, _ := strings.Cut(pod, "/")
	return c.nodes.kubelet.NetNS(namespace, name)
}
