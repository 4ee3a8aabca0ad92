// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/federation"
)

// story reads a small world from lines such as
//
//	cluster east n1 [draining] [grant=shop,pay-*]
//	gateway west n2 203.0.113.2 [ready=0]
//	service east shop/cart 80/HTTP:http [ip=10.96.0.1] [headless] [external=x] [local] [age=3] [publish]
//	  pod c-0 10.0.0.1 [n1] [NotReady] [region=eu] [sa=cart] [bare] [label=version:v1] [host=db-0]
//	address cart.shop.svc.cluster.local 240.240.0.1
//	standing west demoted
//
// A service belongs to a cluster, or to "vm:<network>".
func story(t testing.TB, text string) *Snapshot {
	t.Helper()
	s := &Snapshot{
		Clusters: map[ClusterID]*Cluster{}, Records: map[ServiceName][]*Record{},
		Gateways: map[Network][]*Gateway{}, Addresses: map[string]VirtualAddress{},
		Standing: map[SourceID]Standing{},
	}
	var record *Record
	for _, line := range strings.Split(text, "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		opts := options(f)
		switch f[0] {
		case "cluster":
			c := &Cluster{ID: ClusterID(f[1]), Name: f[1], Network: Network(f[2]), Draining: opts.is("draining")}
			if g := opts["grant"]; g != "" {
				c.Grant.Namespaces = strings.Split(g, ",")
			}
			s.Clusters[c.ID] = c
		case "gateway":
			ready := 1
			if r, ok := opts["ready"]; ok {
				ready, _ = strconv.Atoi(r)
			}
			n := Network(f[2])
			s.Gateways[n] = append(s.Gateways[n], &Gateway{
				Source: source(f[1]), Network: n, Name: "isthmus-system/gw", Ready: ready,
				Addresses: []GatewayAddress{{Host: f[3], Port: 15443}},
			})
		case "service":
			record = serviceLine(t, f, opts)
			s.Records[record.Name] = append(s.Records[record.Name], record)
		case "pod":
			record.Endpoints = append(record.Endpoints, podLine(s, record, f, opts))
		case "address":
			s.Addresses[f[1]] = VirtualAddress{Host: f[1], V4: netip.MustParseAddr(f[2])}
		case "standing":
			s.Standing[source(f[1])] = map[string]Standing{"demoted": Demoted, "drained": Drained}[f[2]]
		default:
			t.Fatalf("story: unknown line %q", line)
		}
	}
	return s
}

type optionSet map[string]string

func (o optionSet) is(name string) bool { _, ok := o[name]; return ok }

func options(fields []string) optionSet {
	out := optionSet{}
	for _, f := range fields[1:] {
		k, v, _ := strings.Cut(f, "=")
		out[k] = v
	}
	return out
}

func source(name string) SourceID {
	if strings.HasPrefix(name, "vm:") {
		return SourceID(name)
	}
	return KubeSource(ClusterID(name))
}

func serviceLine(t testing.TB, f []string, o optionSet) *Record {
	t.Helper()
	ns, name, _ := strings.Cut(f[2], "/")
	r := &Record{Source: source(f[1]), Name: ServiceName{Namespace: ns, Name: name}, Type: ClusterIP, Created: time.Unix(1000, 0)}
	for _, p := range strings.Split(f[3], ",") {
		number, rest, _ := strings.Cut(p, "/")
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			t.Fatalf("story: port %q: %v", p, err)
		}
		protocol, portName, _ := strings.Cut(rest, ":")
		r.Ports = append(r.Ports, Port{Number: uint32(n), Protocol: Protocol(protocol), Name: portName})
	}
	if ip := o["ip"]; ip != "" {
		r.ClusterIPs = []netip.Addr{netip.MustParseAddr(ip)}
	}
	if o.is("headless") {
		r.Type = Headless
	}
	if e := o["external"]; e != "" {
		r.Type, r.ExternalName = ExternalName, e
	}
	if age := o["age"]; age != "" {
		n, _ := strconv.Atoi(age)
		r.Created = time.Unix(1000-int64(n), 0)
	}
	r.ClusterLocal, r.PublishNotReady = o.is("local"), o.is("publish")
	if to := o["exportTo"]; to != "" {
		r.ExportTo = strings.Split(to, ",")
	}
	return r
}

func podLine(s *Snapshot, r *Record, f []string, o optionSet) Endpoint {
	e := Endpoint{Workload: f[1], UID: f[1], Addresses: []netip.Addr{netip.MustParseAddr(f[2])}, Health: Ready, Mesh: !o.is("bare"), ServiceAccount: o["sa"], Hostname: o["host"]}
	if id, ok := r.Source.Cluster(); ok {
		e.Network = s.Clusters[id].Network
	} else {
		e.Network, _ = r.Source.VMNetwork()
	}
	if n := o["net"]; n != "" {
		e.Network = Network(n)
	}
	if e.ServiceAccount == "" {
		e.ServiceAccount = "default"
	}
	for _, h := range []Health{NotReady, Terminating} {
		if o.is(string(h)) {
			e.Health = h
		}
	}
	e.Locality.Region = o["region"]
	if l := o["label"]; l != "" {
		k, v, _ := strings.Cut(l, ":")
		e.Labels = map[string]string{k: v}
	}
	e.TargetPorts = map[uint32]uint32{}
	for _, p := range r.Ports {
		e.TargetPorts[p.Number] = p.Number + 8000
	}
	return e
}

// eastSees and westSees are the scopes most stories use.
var (
	eastSees = Scope{Cluster: "east", Network: "n1"}
	westSees = Scope{Cluster: "west", Network: "n2"}
)

func mustService(t testing.TB, v *View, name string) *Service {
	t.Helper()
	ns, n, _ := strings.Cut(name, "/")
	s, ok := v.Service(ServiceName{Namespace: ns, Name: n})
	if !ok {
		t.Fatalf("view of %v has no service %s", v.Scope, name)
	}
	return s
}

// hops prints groups on one line each: "P0 10.0.0.1:8080*1", a gateway in brackets, an
// unready one with an exclamation mark.
func hops(groups []Group) string {
	var lines []string
	for _, g := range groups {
		line := fmt.Sprintf("P%d", g.Priority)
		for _, h := range g.Hops {
			at := fmt.Sprintf("%s:%d", h.Host, h.Port)
			if h.Gateway {
				at = "[" + at + "]"
			}
			if h.Health == NotReady {
				at += "!"
			}
			line += fmt.Sprintf(" %s*%d", at, h.Weight)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func codes(findings []Finding) string {
	var out []string
	for _, f := range findings {
		out = append(out, f.Code)
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), " ")
}

func trim(text string) string {
	var lines []string
	for _, l := range strings.Split(strings.TrimSpace(text), "\n") {
		lines = append(lines, strings.TrimSpace(l))
	}
	return strings.Join(lines, "\n")
}
