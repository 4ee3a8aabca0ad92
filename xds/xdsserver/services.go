// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/xds"
)

// services differ only in the type that their methods imply; ADS implies none.
var services = []struct{ name, whole, delta, typeURL string }{
	{discoveryv3.AggregatedDiscoveryService_ServiceDesc.ServiceName, "StreamAggregatedResources", "DeltaAggregatedResources", ""},
	{clusterservice.ClusterDiscoveryService_ServiceDesc.ServiceName, "StreamClusters", "DeltaClusters", xds.ClusterType},
	{endpointservice.EndpointDiscoveryService_ServiceDesc.ServiceName, "StreamEndpoints", "DeltaEndpoints", xds.EndpointType},
	{listenerservice.ListenerDiscoveryService_ServiceDesc.ServiceName, "StreamListeners", "DeltaListeners", xds.ListenerType},
	{routeservice.RouteDiscoveryService_ServiceDesc.ServiceName, "StreamRoutes", "DeltaRoutes", xds.RouteType},
}

// Register adds the server's services to a gRPC server that was made with Options. They
// have no unary methods: Envoy never fetches.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	who := newControlPlane(s.config.Identifier)
	for _, service := range services {
		both := func(name string, over func(grpc.ServerStream) wire) grpc.StreamDesc {
			return grpc.StreamDesc{StreamName: name, ServerStreams: true, ClientStreams: true, Handler: func(_ any, st grpc.ServerStream) error {
				return s.serve(st.Context(), over(st), service.typeURL)
			}}
		}
		r.RegisterService(&grpc.ServiceDesc{ServiceName: service.name, HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{
			both(service.whole, func(st grpc.ServerStream) wire { return sotwWire{st, who} }),
			both(service.delta, func(st grpc.ServerStream) wire { return &deltaWire{stream: st, who: who, nonces: &s.nonces} }),
		}}, s)
	}
}
