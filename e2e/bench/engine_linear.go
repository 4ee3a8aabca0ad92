// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// linear is go-control-plane's server with the endpoints that ours makes of the same world.
type linear struct {
	cache  *cachev3.LinearCache
	states [2]*endpointv3.ClusterLoadAssignment // of the first service, in turn
	flaps  int
}

func (s *linear) start(c subjectConfig, t *tls.Config, l net.Listener) (hello subjectHello, err error) {
	world := c.World
	world.build()
	proxy := xds.ProxyOf(world.proxy(0), "")
	assignments := func(snapshot *federation.Snapshot) (map[string]types.Resource, error) {
		out := map[string]types.Resource{}
		resources, _ := xds.Build(snapshot.View(proxy.Scope()), nil, proxy)
		for _, r := range resources[xds.EndpointType] {
			a := &endpointv3.ClusterLoadAssignment{}
			if err := proto.Unmarshal(r.Body, a); err != nil {
				return nil, err
			}
			out[r.Name] = a
		}
		return out, nil
	}
	all, err := assignments(world.snapshot)
	if err != nil {
		return hello, err
	}
	changed, err := assignments(world.flap(engineService(0)))
	if err != nil {
		return hello, err
	}
	name := fmt.Sprintf("outbound|80||%s", engineService(0).Host())
	for i, from := range []map[string]types.Resource{all, changed} {
		a, ok := from[name].(*endpointv3.ClusterLoadAssignment)
		if !ok {
			return hello, fmt.Errorf("there is no %s", name)
		}
		s.states[i] = a
	}
	s.cache = cachev3.NewLinearCache(xds.EndpointType, cachev3.WithInitialResources(all))
	for name := range all {
		hello.Names = map[string][]string{xds.EndpointType: append(hello.Names[xds.EndpointType], name)}
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(t)), grpc.ReadBufferSize(2<<10), grpc.InitialWindowSize(1<<20), grpc.InitialConnWindowSize(1<<20))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, serverv3.NewServer(context.Background(), s.cache, nil))
	go func() { _ = g.Serve(l) }()
	return hello, nil
}

func (s *linear) flap(int) {
	s.flaps++
	a := s.states[s.flaps%2]
	if err := s.cache.UpdateResource(a.ClusterName, a); err != nil {
		panic(err) // a LinearCache takes anything
	}
}

func (s *linear) woken() float64 { return 0 }
