// SPDX-License-Identifier: Apache-2.0

package vm_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/vm"
)

func machine(name string, change func(*registry.VM)) *registry.VM {
	m := &registry.VM{
		Network: "n1", Name: name, Service: federation.ServiceName{Namespace: "legacy", Name: "web"}, ServiceAccount: "web",
		Ports: []registry.VMPort{{Number: 80, Target: 8080, Protocol: federation.HTTP}}, Created: time.Unix(100, 0), Present: true,
		Health: &registry.VMHealth{Healthy: true, Addresses: []netip.Addr{netip.MustParseAddr("fd00::7"), netip.MustParseAddr("10.244.9.7")}},
	}
	if change != nil {
		change(m)
	}
	return m
}

func TestMachinesOfANetworkAreRecords(t *testing.T) {
	t.Parallel()
	web := federation.ServiceName{Namespace: "legacy", Name: "web"}
	for _, c := range []struct {
		name   string
		vms    []*registry.VM
		health []federation.Health // of the endpoints of legacy/web
		ports  int
	}{
		{"healthy and heard of", []*registry.VM{machine("a", nil)}, []federation.Health{federation.Ready}, 1},
		{"says that it is unhealthy", []*registry.VM{machine("a", func(m *registry.VM) { m.Health.Healthy = false })}, []federation.Health{federation.NotReady}, 1},
		{"not heard of for a while", []*registry.VM{machine("a", func(m *registry.VM) { m.Present = false })}, []federation.Health{federation.NotReady}, 1},
		{"registered, never came", []*registry.VM{machine("a", func(m *registry.VM) { m.Health = nil })}, nil, 1},
		{"two of one service", []*registry.VM{machine("b", nil), machine("a", nil)}, []federation.Health{federation.Ready, federation.Ready}, 1},
		{"two that disagree: the older decides", []*registry.VM{
			machine("a", nil),
			machine("b", func(m *registry.VM) {
				m.Created = time.Unix(200, 0)
				m.Ports = []registry.VMPort{{Number: 80, Protocol: federation.TCP}, {Number: 81}}
			}),
		}, []federation.Health{federation.Ready, federation.Ready}, 2},
		{"of another network", []*registry.VM{machine("a", func(m *registry.VM) { m.Network = "n2" })}, nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			all := map[registry.VMName]*registry.VM{}
			for _, m := range c.vms {
				all[m.Key()] = m
			}
			level := vm.Level("n1", all)
			record := level.Records[web]
			if c.ports == 0 {
				if record != nil || len(level.Workloads) != 0 {
					t.Fatalf("reported another network's: %+v", level)
				}
				return
			}
			if len(record.Ports) != c.ports {
				t.Errorf("ports %+v, want %d", record.Ports, c.ports)
			}
			var health []federation.Health
			for _, e := range record.Endpoints {
				health = append(health, e.Health)
				if !e.Addresses[0].Is4() {
					t.Errorf("addresses %v: IPv4 first", e.Addresses)
				}
			}
			if len(health) != len(c.health) {
				t.Fatalf("endpoints %v, want %v", health, c.health)
			}
			for i := range health {
				if health[i] != c.health[i] {
					t.Errorf("endpoints %v, want %v", health, c.health)
				}
			}
			if len(level.Workloads) != len(c.vms) {
				t.Errorf("%d workloads, want %d", len(level.Workloads), len(c.vms))
			}
		})
	}
}
