// SPDX-License-Identifier: Apache-2.0

package api

// Where the agent of an east-west gateway answers probes of the path. ProbeName is the
// one server name of a gateway that is no exported service: its Envoy passes it on to
// ProbePort of its own pod's loopback address, like every other name without ending the
// TLS. The agent there speaks mutual TLS with its own certificate, answers with the SPIFFE
// ID it saw, and closes.
const (
	ProbePort = 15023
	ProbeName = "outbound_.15023_._.isthmus-probe.isthmus-system.svc.cluster.local"
)
