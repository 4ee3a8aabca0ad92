// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// DefaultDomain is the cluster domain of the bed's clusters.
const DefaultDomain = "cluster.local"

// Watch makes a zone that follows a cluster's API until ctx ends, and returns
// when it knows the Services that exist. While the API is away the zone answers
// by what it knew last.
func Watch(ctx context.Context, client kubernetes.Interface, domain string) (*Zone, error) {
	factory := informers.NewSharedInformerFactory(client, 0)
	zone := &Zone{
		Domain:   domain,
		Services: factory.Core().V1().Services().Lister(),
		Slices:   factory.Discovery().V1().EndpointSlices().Lister(),
	}
	factory.Start(ctx.Done())
	for kind, synced := range factory.WaitForCacheSync(ctx.Done()) {
		if !synced {
			return nil, fmt.Errorf("dns: %v are not known yet: %w", kind, ctx.Err())
		}
	}
	return zone, nil
}

// InBed runs the DNS of a cluster on the cluster's network, at an address of
// its own there, which it returns. It answers until ctx ends; all counts its
// goroutines.
func InBed(ctx context.Context, all *sync.WaitGroup, cluster *bed.Cluster) (netip.Addr, error) {
	network := cluster.Network()
	addr, err := network.Address()
	if err != nil {
		return netip.Addr{}, err
	}
	ns, err := network.Router().World().Namespace("dns-" + cluster.Name())
	if err != nil {
		return netip.Addr{}, err
	}
	if err := network.Attach(ns, addr); err != nil {
		return netip.Addr{}, errors.Join(err, ns.Close())
	}
	zone, err := Watch(ctx, cluster.Client(), DefaultDomain)
	if err != nil {
		return netip.Addr{}, errors.Join(err, ns.Close())
	}
	at := netip.AddrPortFrom(addr, 53).String()
	packets, err := ns.ListenPacket("udp", at)
	if err != nil {
		return netip.Addr{}, errors.Join(err, ns.Close())
	}
	streams, err := ns.Listen("tcp", at)
	if err != nil {
		return netip.Addr{}, errors.Join(err, packets.Close(), ns.Close())
	}
	server := &Server{Zone: zone}
	all.Go(func() {
		_ = server.Serve(ctx, packets, streams) // its sockets fail only when the namespace is gone
		_ = ns.Close()
	})
	return addr, nil
}
