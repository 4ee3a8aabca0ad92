// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
)

// Zone knows the names of one cluster's Services. It may be asked by several
// goroutines, and always answers by what the listers hold at that moment.
type Zone struct {
	// Domain is the cluster domain, for example "cluster.local".
	Domain string
	// Services and Slices are the cluster's objects.
	Services corelisters.ServiceLister
	Slices   discoverylisters.EndpointSliceLister
}

// Entry is what a name stands for. A name may exist and stand for nothing.
type Entry struct {
	// Addrs are its addresses of both families, sorted.
	Addrs []netip.Addr
	// Alias is another name that it is an alias for, without a final dot.
	Alias string
	// Ports are the targets of an SRV name.
	Ports []Port
}

// Port is one target of an SRV record.
type Port struct {
	Target string // host name without a final dot
	Number uint16
	Addrs  []netip.Addr // of Target
}

// Lookup finds a name, given in any case and without a final dot. False means
// that it does not exist.
func (z *Zone) Lookup(name string) (Entry, bool) {
	rest, ok := cutDomain(strings.ToLower(name), strings.ToLower(z.Domain))
	if !ok {
		return Entry{}, false
	}
	if rest == "" || rest == "svc" {
		return Entry{}, true
	}
	rest, ok = strings.CutSuffix(rest, ".svc")
	if !ok {
		return Entry{}, false
	}
	words := strings.Split(rest, ".")
	slices.Reverse(words) // namespace, service, then what belongs to the service
	if len(words) == 1 {
		return Entry{}, z.hasNamespace(words[0])
	}
	service, err := z.Services.Services(words[0]).Get(words[1])
	if err != nil {
		return Entry{}, false
	}
	switch len(words) {
	case 2:
		return z.service(service), true
	case 3:
		if words[2] == "_tcp" || words[2] == "_udp" || words[2] == "_sctp" {
			return Entry{}, len(z.ports(service, "", words[2][1:])) > 0
		}
		return z.host(service, words[2])
	case 4:
		if strings.HasPrefix(words[2], "_") && strings.HasPrefix(words[3], "_") {
			ports := z.ports(service, words[3][1:], words[2][1:])
			return Entry{Ports: ports}, len(ports) > 0
		}
	}
	return Entry{}, false
}

// cutDomain splits the zone's domain off a name.
func cutDomain(name, domain string) (string, bool) {
	if name == domain {
		return "", true
	}
	return strings.CutSuffix(name, "."+domain)
}

func (z *Zone) hasNamespace(namespace string) bool {
	all, err := z.Services.Services(namespace).List(labels.Everything())
	return err == nil && len(all) > 0
}

// service is what the name of a Service stands for.
func (z *Zone) service(s *corev1.Service) Entry {
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return Entry{Alias: strings.TrimSuffix(s.Spec.ExternalName, ".")}
	}
	entry := Entry{Ports: z.ports(s, "", "")}
	if !isHeadless(s) {
		entry.Addrs = clusterIPs(s)
		return entry
	}
	for _, e := range z.endpoints(s) {
		entry.Addrs = append(entry.Addrs, e.addrs...)
	}
	entry.Addrs = sorted(entry.Addrs)
	return entry
}

// host is what the name of a pod below a headless Service stands for.
func (z *Zone) host(s *corev1.Service, hostname string) (Entry, bool) {
	if !isHeadless(s) {
		return Entry{}, false
	}
	var addrs []netip.Addr
	for _, e := range z.endpoints(s) {
		if e.name == hostname {
			addrs = append(addrs, e.addrs...)
		}
	}
	return Entry{Addrs: sorted(addrs)}, len(addrs) > 0
}

// ports lists the SRV targets of a Service: of one port and protocol, or of all named ones.
func (z *Zone) ports(s *corev1.Service, name, protocol string) []Port {
	wanted := func(portName string, portProtocol corev1.Protocol) bool {
		return portName != "" && (name == "" || name == strings.ToLower(portName)) &&
			(protocol == "" || strings.EqualFold(protocol, string(portProtocol)))
	}
	host := strings.Join([]string{s.Name, s.Namespace, "svc", z.Domain}, ".")
	var found []Port
	if !isHeadless(s) {
		for _, port := range s.Spec.Ports {
			if wanted(port.Name, port.Protocol) {
				found = append(found, Port{Target: host, Number: uint16(port.Port), Addrs: clusterIPs(s)})
			}
		}
		return found
	}
	for _, e := range z.endpoints(s) {
		for _, port := range e.ports {
			if port.Name != nil && port.Port != nil && port.Protocol != nil && wanted(*port.Name, *port.Protocol) {
				found = append(found, Port{Target: e.name + "." + host, Number: uint16(*port.Port), Addrs: e.addrs})
			}
		}
	}
	slices.SortFunc(found, func(a, b Port) int { return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.Number, b.Number)) })
	return found
}

// endpoint is a ready endpoint of a headless Service.
type endpoint struct {
	name  string // its host name, else its address with dashes
	addrs []netip.Addr
	ports []discoveryv1.EndpointPort
}

// endpoints lists the ready endpoints of a Service.
func (z *Zone) endpoints(s *corev1.Service) []endpoint {
	selector := labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: s.Name})
	all, err := z.Slices.EndpointSlices(s.Namespace).List(selector)
	if err != nil {
		return nil
	}
	var found []endpoint
	for _, slice := range all {
		for _, e := range slice.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			addrs := parse(e.Addresses)
			if len(addrs) == 0 {
				continue
			}
			name := dashed(addrs[0])
			if e.Hostname != nil && *e.Hostname != "" {
				name = *e.Hostname
			}
			found = append(found, endpoint{name: name, addrs: addrs, ports: slice.Ports})
		}
	}
	return found
}

func isHeadless(s *corev1.Service) bool { return s.Spec.ClusterIP == corev1.ClusterIPNone }

// clusterIPs gives the Service's own addresses.
func clusterIPs(s *corev1.Service) []netip.Addr {
	if len(s.Spec.ClusterIPs) > 0 {
		return sorted(parse(s.Spec.ClusterIPs))
	}
	return parse([]string{s.Spec.ClusterIP})
}

// parse leaves out what is no address.
func parse(words []string) []netip.Addr {
	var addrs []netip.Addr
	for _, word := range words {
		if addr, err := netip.ParseAddr(word); err == nil {
			addrs = append(addrs, addr.Unmap())
		}
	}
	return addrs
}

func sorted(addrs []netip.Addr) []netip.Addr {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// dashed writes an address as a DNS label.
func dashed(addr netip.Addr) string {
	return strings.NewReplacer(".", "-", ":", "-").Replace(addr.String())
}
