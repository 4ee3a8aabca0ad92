// SPDX-License-Identifier: Apache-2.0

// Package vm makes records of virtual machines: the registered VMs of one network are a
// source of their own. What a VM's agent says of its health reaches the store at whichever
// replica the VM is connected to; the source, at whichever replica holds its session, only
// turns what is stored into records.
package vm

import (
	"cmp"
	"context"
	"maps"
	"net/netip"
	"slices"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// Source reports the services of the VMs of one network.
type Source struct {
	store   registry.Store
	network federation.Network
}

var _ registry.Source = (*Source)(nil)

// NewSource makes the source of a network's VMs.
func NewSource(store registry.Store, network federation.Network) *Source {
	return &Source{store: store, network: network}
}

// Run implements registry.Source. It never fails: it reads the store alone.
func (s *Source) Run(ctx context.Context, sink registry.Sink) error {
	for {
		_, changed := s.store.Snapshot()
		sink.Offer(Level(s.network, s.store.VMs()))
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// Level is what the VMs of a network report together. Services of several VMs have the
// ports of all of them; where two VMs disagree about a port, the older registration
// decides, and the other VM does not serve that port.
func Level(network federation.Network, vms map[registry.VMName]*registry.VM) registry.Level {
	level := registry.Level{
		Records:   map[federation.ServiceName]*federation.Record{},
		Workloads: map[string]*federation.Workload{},
		Gateways:  map[string]*federation.Gateway{},
	}
	own := slices.SortedFunc(maps.Values(vms), func(a, b *registry.VM) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
	})
	for _, vm := range own {
		if vm.Network != network {
			continue
		}
		level.Workloads[vm.Name] = workload(vm)
		record := level.Records[vm.Service]
		if record == nil {
			record = &federation.Record{
				Source: federation.VMSource(network), Name: vm.Service, Type: federation.ClusterIP, Created: vm.Created,
			}
			level.Records[vm.Service] = record
		}
		add(record, vm)
	}
	for _, record := range level.Records {
		slices.SortFunc(record.Ports, func(a, b federation.Port) int { return cmp.Compare(a.Number, b.Number) })
		slices.SortFunc(record.Endpoints, func(a, b federation.Endpoint) int { return cmp.Compare(a.Workload, b.Workload) })
	}
	return level
}

// add makes a VM an endpoint of its service. One whose address is not known yet is none.
func add(record *federation.Record, vm *registry.VM) {
	targets := map[uint32]uint32{}
	for _, p := range vm.Ports {
		known, ok := record.Port(p.Number)
		if ok && known.Protocol != p.Protocol {
			continue
		}
		if !ok {
			record.Ports = append(record.Ports, federation.Port{Number: p.Number, Name: p.Name, Protocol: p.Protocol})
		}
		targets[p.Number] = cmp.Or(p.Target, p.Number)
	}
	if vm.Health == nil || len(vm.Health.Addresses) == 0 {
		return
	}
	record.Endpoints = append(record.Endpoints, federation.Endpoint{
		Workload: vm.Name, UID: vm.Name, Addresses: addresses(vm), TargetPorts: targets, Health: health(vm),
		Network: vm.Network, Locality: vm.Locality, ServiceAccount: vm.ServiceAccount, Labels: vm.Labels, Mesh: true,
	})
}

// health of a VM: what its agent said, as long as some replica hears of it.
func health(vm *registry.VM) federation.Health {
	if vm.Present && vm.Health != nil && vm.Health.Healthy {
		return federation.Ready
	}
	return federation.NotReady
}

func workload(vm *registry.VM) *federation.Workload {
	return &federation.Workload{
		Source: federation.VMSource(vm.Network), Namespace: vm.Service.Namespace, Name: vm.Name, UID: vm.Name,
		Role: federation.VMRole, ServiceAccount: vm.ServiceAccount, Network: vm.Network, Locality: vm.Locality,
		Addresses: addresses(vm), Labels: vm.Labels, Ready: health(vm) == federation.Ready,
	}
}

// addresses are at most one of each family, IPv4 first.
func addresses(vm *registry.VM) []netip.Addr {
	if vm.Health == nil {
		return nil
	}
	var out []netip.Addr
	for _, four := range []bool{true, false} {
		for _, a := range vm.Health.Addresses {
			if a.Unmap().Is4() == four {
				out = append(out, a.Unmap())
				break
			}
		}
	}
	return out
}
