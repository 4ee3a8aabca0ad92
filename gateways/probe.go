// SPDX-License-Identifier: Apache-2.0

package gateways

import (
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
)

// probeService is the name that no service can take: behind it is the gateway's own agent.
var probeService = federation.ServiceName{Namespace: "isthmus-system", Name: "isthmus-probe"}

// probeConnections bounds how many probes of one gateway are open at a time. Each is over
// after one handshake.
const probeConnections = 32

// probeCluster leads to the agent beside this Envoy, which ends mutual TLS there and
// proves the way in, whether or not any workload stands behind the gateway yet.
func probeCluster() *clusterv3.Cluster {
	most := wrapperspb.UInt32(probeConnections)
	return &clusterv3.Cluster{
		Name:                 api.ProbeName,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(time.Second),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: api.ProbeName,
			Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress("127.0.0.1", api.ProbePort)}},
			}}}},
		},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections: most, MaxPendingRequests: most,
		}}},
	}
}
