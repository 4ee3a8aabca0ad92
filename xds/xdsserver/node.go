// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"fmt"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// node is what a proxy and its agent say about themselves: for people to read, never to
// decide by.
type node struct {
	id           string
	agentVersion string
	envoyVersion string
	expires      time.Time // of the workload's certificate, which may be newer than the stream's
}

// Metadata keys in which agents name their version: ours, and Istio's.
const (
	versionKey      = "ISTHMUS_VERSION"
	istioVersionKey = "ISTIO_VERSION"
	expiresKey      = "ISTHMUS_CERTIFICATE_EXPIRES" // RFC 3339
)

// maxVersion bounds what is kept of a version, which a proxy may choose freely.
const maxVersion = 64

func nodeOf(n *corev3.Node) node {
	out := node{id: n.GetId()}
	fields := n.GetMetadata().GetFields()
	if out.agentVersion = fields[versionKey].GetStringValue(); out.agentVersion == "" {
		if v := fields[istioVersionKey].GetStringValue(); v != "" {
			out.agentVersion = "istio " + v
		}
	}
	out.agentVersion = out.agentVersion[:min(len(out.agentVersion), maxVersion)]
	if v := n.GetUserAgentBuildVersion().GetVersion(); v != nil {
		out.envoyVersion = fmt.Sprintf("%d.%d.%d", v.GetMajorNumber(), v.GetMinorNumber(), v.GetPatch())
	}
	if at, err := time.Parse(time.RFC3339, fields[expiresKey].GetStringValue()); err == nil {
		out.expires = at
	}
	return out
}

// learn takes over what a later message of the stream says. A proxy names itself once;
// its agent does again when it has renewed the certificate.
func (n *node) learn(later node) {
	if later.agentVersion != "" {
		n.agentVersion = later.agentVersion
	}
	if later.envoyVersion != "" {
		n.envoyVersion = later.envoyVersion
	}
	if !later.expires.IsZero() {
		n.expires = later.expires
	}
}
