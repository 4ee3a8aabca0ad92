// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"cmp"
	"maps"
	"slices"

	"github.com/isthmus-mesh/isthmus/federation"
)

// census knows which services of a view send to which workloads, and so which ports these
// have; and whose class a change may have moved. It is empty until it is asked for.
type census struct {
	senders map[federation.WorkloadKey][]federation.ServiceName
	keys    []string // that selectors look at
	some    map[federation.WorkloadKey]bool
	all     bool
}

// move follows from one view to the next; foreign tells that they have nothing in common.
func (c *census) move(from, to *federation.View, changed []federation.ServiceName, foreign bool, keys []string) {
	if foreign || !slices.Equal(c.keys, keys) {
		c.all = true
	}
	c.keys = keys
	if foreign {
		c.senders = nil
	}
	if c.senders == nil {
		return
	}
	for _, name := range changed {
		before, _ := from.Service(name)
		after, _ := to.Service(name)
		c.exchange(name, before, after)
	}
}

// exchange notes the workloads to which a service sends otherwise than before.
func (c *census) exchange(name federation.ServiceName, before, after *federation.Service) {
	if before == nil {
		before = &federation.Service{}
	}
	if after == nil {
		after = &federation.Service{}
	}
	samePorts := slices.Equal(before.Ports, after.Ports)
	if samePorts && slices.EqualFunc(before.Endpoints, after.Endpoints, sameTargets) {
		return
	}
	was := map[federation.WorkloadKey]*federation.ServiceEndpoint{}
	for i := range before.Endpoints {
		key, ok := workloadOf(&before.Endpoints[i])
		if _, twice := was[key]; ok && twice {
			c.note(key)
		}
		if ok {
			was[key] = &before.Endpoints[i]
		}
	}
	is := map[federation.WorkloadKey]bool{}
	for i := range after.Endpoints {
		e := &after.Endpoints[i]
		key, ok := workloadOf(e)
		if !ok {
			continue
		}
		if is[key] {
			c.note(key) // it is compared with one of its endpoints only
			continue
		}
		is[key] = true
		old := was[key]
		if old == nil {
			c.senders[key] = append(slices.Clip(c.senders[key]), name)
		}
		if old == nil || !samePorts || !sameTargets(*old, *e) {
			c.note(key)
		}
	}
	for key := range was {
		if is[key] {
			continue
		}
		c.note(key)
		c.senders[key] = slices.DeleteFunc(slices.Clone(c.senders[key]), func(n federation.ServiceName) bool { return n == name })
		if len(c.senders[key]) == 0 {
			delete(c.senders, key)
		}
	}
}

func (c *census) note(key federation.WorkloadKey) {
	if c.some == nil {
		c.some = map[federation.WorkloadKey]bool{}
	}
	c.some[key] = true
}

// moved is what was noted since the last time.
func (c *census) moved() (some []federation.WorkloadKey, all bool) {
	some, all = slices.Collect(maps.Keys(c.some)), c.all
	c.some, c.all = nil, false
	return some, all
}

// ports are those of a workload that services send to. Where services disagree on a port's
// protocol it is unknown, and told by its first bytes; all kinds of HTTP together are HTTP,
// whose versions Envoy tells apart.
func (c *census) ports(view *federation.View, key federation.WorkloadKey) []inboundPort {
	if c.senders == nil {
		c.take(view)
	}
	var out []inboundPort
	for _, name := range c.senders[key] {
		s, ok := view.Service(name)
		if !ok {
			continue
		}
		for i := range s.Endpoints {
			e := &s.Endpoints[i]
			if k, ok := workloadOf(e); !ok || k != key {
				continue
			}
			for _, port := range s.Ports {
				// The proxy's own port has a chain of its own.
				if target, ok := e.TargetPorts[port.Number]; ok && target > 0 && target <= 65535 && target != InboundPort {
					out = withPort(out, inboundPort{number: target, protocol: port.Protocol})
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b inboundPort) int { return cmp.Compare(a.number, b.number) })
	return out
}

// take counts a whole view.
func (c *census) take(view *federation.View) {
	c.senders = map[federation.WorkloadKey][]federation.ServiceName{}
	for _, s := range view.Services {
		for i := range s.Endpoints {
			key, ok := workloadOf(&s.Endpoints[i])
			if list := c.senders[key]; ok && (len(list) == 0 || list[len(list)-1] != s.Name) {
				c.senders[key] = append(list, s.Name)
			}
		}
	}
}

// workloadOf is the workload of this network that an endpoint leads to; false if none is
// known.
func workloadOf(e *federation.ServiceEndpoint) (federation.WorkloadKey, bool) {
	return federation.WorkloadKey{Source: e.Source, UID: e.UID}, e.Direct && e.UID != ""
}

func sameTargets(a, b federation.ServiceEndpoint) bool {
	return a.UID == b.UID && a.Source == b.Source && a.Direct == b.Direct && maps.Equal(a.TargetPorts, b.TargetPorts)
}
