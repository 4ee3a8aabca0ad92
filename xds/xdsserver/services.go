// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"

	"github.com/isthmus-mesh/isthmus/xds"
)

// The gRPC services differ only in the type that their method implies.

type adsService struct{ server *Server }

func (a adsService) StreamAggregatedResources(st discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return a.server.serveSotW(st.Context(), st, "")
}

func (a adsService) DeltaAggregatedResources(st discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return a.server.serveDelta(st.Context(), st, "")
}

type cdsService struct {
	clusterservice.UnimplementedClusterDiscoveryServiceServer
	server *Server
}

func (c cdsService) StreamClusters(st clusterservice.ClusterDiscoveryService_StreamClustersServer) error {
	return c.server.serveSotW(st.Context(), st, xds.ClusterType)
}

func (c cdsService) DeltaClusters(st clusterservice.ClusterDiscoveryService_DeltaClustersServer) error {
	return c.server.serveDelta(st.Context(), st, xds.ClusterType)
}

type edsService struct {
	endpointservice.UnimplementedEndpointDiscoveryServiceServer
	server *Server
}

func (e edsService) StreamEndpoints(st endpointservice.EndpointDiscoveryService_StreamEndpointsServer) error {
	return e.server.serveSotW(st.Context(), st, xds.EndpointType)
}

func (e edsService) DeltaEndpoints(st endpointservice.EndpointDiscoveryService_DeltaEndpointsServer) error {
	return e.server.serveDelta(st.Context(), st, xds.EndpointType)
}

type ldsService struct {
	listenerservice.UnimplementedListenerDiscoveryServiceServer
	server *Server
}

func (l ldsService) StreamListeners(st listenerservice.ListenerDiscoveryService_StreamListenersServer) error {
	return l.server.serveSotW(st.Context(), st, xds.ListenerType)
}

func (l ldsService) DeltaListeners(st listenerservice.ListenerDiscoveryService_DeltaListenersServer) error {
	return l.server.serveDelta(st.Context(), st, xds.ListenerType)
}

type rdsService struct {
	routeservice.UnimplementedRouteDiscoveryServiceServer
	server *Server
}

func (r rdsService) StreamRoutes(st routeservice.RouteDiscoveryService_StreamRoutesServer) error {
	return r.server.serveSotW(st.Context(), st, xds.RouteType)
}

func (r rdsService) DeltaRoutes(st routeservice.RouteDiscoveryService_DeltaRoutesServer) error {
	return r.server.serveDelta(st.Context(), st, xds.RouteType)
}
