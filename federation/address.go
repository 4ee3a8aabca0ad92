// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// ErrRangeFull is returned where every address of a range is taken.
var ErrRangeFull = errors.New("no virtual address is free")

// VirtualAddress is the mesh-wide address of a host that has no ClusterIP where it is
// called from. It is stable across restarts and not reused for 24 h.
type VirtualAddress struct {
	Host string     `json:"host"`
	V4   netip.Addr `json:"v4"` // from 240.240.0.0/12
	V6   netip.Addr `json:"v6"` // from 2001:2::/48

	// Released is when the host was last needed; zero while it is.
	Released time.Time `json:"released,omitzero"`
}

// The default ranges of virtual addresses.
var (
	VirtualV4 = netip.MustParsePrefix("240.240.0.0/12")
	VirtualV6 = netip.MustParsePrefix("2001:2::/48")
)

// AddressHold is how long an address stays valid, and its host's, after it was last
// needed: callers may have resolved it just before.
const AddressHold = 24 * time.Hour

// VirtualRanges are where virtual addresses come from. The zero value means the default
// ranges; a family whose prefix is invalid while the other is set gets none.
type VirtualRanges struct {
	V4, V6 netip.Prefix
}

// Allocate is VirtualRanges{}.Allocate: from the default ranges.
func Allocate(host string, taken func(netip.Addr) bool) (VirtualAddress, error) {
	return VirtualRanges{}.Allocate(host, taken)
}

// Allocate proposes the addresses of a host: the place its name hashes to, else the next
// one that is not taken, so that a mesh that lost its store gets most of them back. It is
// pure; the store makes it true in one compare-and-create transaction and asks again with
// a new taken where it lost a race.
func (r VirtualRanges) Allocate(host string, taken func(netip.Addr) bool) (VirtualAddress, error) {
	r = r.orDefault()
	a := VirtualAddress{Host: host}
	sum := sha256.Sum256([]byte(host))
	for _, family := range [...]struct {
		prefix netip.Prefix
		to     *netip.Addr
	}{{r.V4, &a.V4}, {r.V6, &a.V6}} {
		if !family.prefix.IsValid() {
			continue
		}
		ip, ok := probe(family.prefix, binary.BigEndian.Uint64(sum[:8]), taken)
		if !ok {
			return VirtualAddress{}, fmt.Errorf("%w: host %s, range %s; configure a larger one", ErrRangeFull, host, family.prefix)
		}
		*family.to = ip
	}
	return a, nil
}

// Contains tells whether an address is a virtual one.
func (r VirtualRanges) Contains(ip netip.Addr) bool {
	r = r.orDefault()
	return r.V4.Contains(ip) || r.V6.Contains(ip)
}

func (r VirtualRanges) orDefault() VirtualRanges {
	if !r.V4.IsValid() && !r.V6.IsValid() {
		return VirtualRanges{V4: VirtualV4, V6: VirtualV6}
	}
	return r
}

// maxProbes bounds the search in ranges too large to be filled.
const maxProbes = 1 << 20

// probe looks for a free address from the preferred place on. The first and the last
// address of a range are never given.
func probe(prefix netip.Prefix, preferred uint64, taken func(netip.Addr) bool) (netip.Addr, bool) {
	bits := min(prefix.Addr().BitLen()-prefix.Bits(), 62)
	if bits < 2 {
		return netip.Addr{}, false
	}
	size := uint64(1)<<bits - 2
	for i := range min(size, maxProbes) {
		ip := offset(prefix, 1+(preferred%size+i)%size)
		if !taken(ip) {
			return ip, true
		}
	}
	return netip.Addr{}, false
}

// offset is the n-th address of a prefix, n below 2^62.
func offset(prefix netip.Prefix, n uint64) netip.Addr {
	b := prefix.Masked().Addr().AsSlice()
	for i := len(b) - 1; i >= 0 && n > 0; i-- {
		n += uint64(b[i])
		b[i] = byte(n)
		n >>= 8
	}
	ip, _ := netip.AddrFromSlice(b)
	return ip
}

// NeedsVirtualAddress are the hosts that need a virtual address, ordered: every service
// that some cluster can call without having it, every service at all once there are
// virtual machines, and every pod with a name of its own.
func NeedsVirtualAddress(s *Snapshot) []string {
	vms := s.hasVMs()
	var hosts []string
	for name, records := range s.Records {
		shared := filter(slices.Clone(records), func(r *Record) bool {
			return s.admits(r) && !s.LocalOnly(r) && r.Type != ExternalName
		})
		lacking := len(shared) > 0 && (vms || s.someoneLacks(name, records))
		if lacking {
			hosts = append(hosts, name.Host())
		}
		for _, r := range shared {
			hosts = s.podHosts(hosts, r, lacking)
		}
	}
	slices.Sort(hosts)
	return slices.Compact(hosts)
}

func (s *Snapshot) hasVMs() bool {
	for key := range s.Workloads {
		if _, ok := key.Source.VMNetwork(); ok {
			return true
		}
	}
	return false
}

// someoneLacks tells whether some cluster has no address of its own for the service.
func (s *Snapshot) someoneLacks(name ServiceName, records []*Record) bool {
	for id := range s.Clusters {
		own := slices.IndexFunc(records, func(r *Record) bool { return r.Source == KubeSource(id) && s.admits(r) })
		if own < 0 || records[own].Type == ClusterIP && len(records[own].ClusterIPs) == 0 {
			return true
		}
	}
	return false
}

func (s *Snapshot) podHosts(hosts []string, r *Record, plain bool) []string {
	id, kube := r.Source.Cluster()
	if !kube || r.Type != Headless {
		return hosts
	}
	for i := range r.Endpoints {
		name := r.Endpoints[i].Hostname
		if !isLabel(name) {
			continue
		}
		hosts = append(hosts, podHost(name, s.Clusters[id].Name, r.Name))
		if plain {
			hosts = append(hosts, name+"."+r.Name.Host())
		}
	}
	return hosts
}

// AddressPlan is what the store has to do so that every host that needs an address has
// one. All lists are ordered.
type AddressPlan struct {
	Allocate []string // hosts without an address
	Revive   []string // released ones that are needed again: clear Released
	Release  []string // no longer needed: set Released
	Delete   []string // released more than AddressHold ago
}

// PlanAddresses compares what is there with what is needed. It is empty where nothing is
// to do.
func PlanAddresses(have map[string]VirtualAddress, need []string, now time.Time) AddressPlan {
	var p AddressPlan
	needed := make(map[string]bool, len(need))
	for _, host := range need {
		needed[host] = true
		switch a, ok := have[host]; {
		case !ok:
			p.Allocate = append(p.Allocate, host)
		case !a.Released.IsZero():
			p.Revive = append(p.Revive, host)
		}
	}
	for _, host := range slices.Sorted(maps.Keys(have)) {
		switch a := have[host]; {
		case needed[host]:
		case a.Released.IsZero():
			p.Release = append(p.Release, host)
		case now.Sub(a.Released) >= AddressHold:
			p.Delete = append(p.Delete, host)
		}
	}
	return p
}

// Empty tells that there is nothing to do.
func (p AddressPlan) Empty() bool {
	return len(p.Allocate)+len(p.Revive)+len(p.Release)+len(p.Delete) == 0
}

// AddressRanges are a cluster's own, where they are known.
type AddressRanges struct {
	Pods     []netip.Prefix `json:"pods,omitempty"`
	Services []netip.Prefix `json:"services,omitempty"`
}

// Overlaps are findings about ranges that must not meet: a cluster's with the virtual
// ones, and the pod ranges of two clusters on one network. That clusters on different
// networks, and services anywhere, use the same ranges is normal.
func (s *Snapshot) Overlaps(virtual VirtualRanges) []Finding {
	virtual = virtual.orDefault()
	var out []Finding
	clusters := slices.SortedFunc(maps.Values(s.Clusters), func(a, b *Cluster) int { return cmp.Compare(a.ID, b.ID) })
	for i, c := range clusters {
		for _, kind := range [...]struct {
			name   string
			ranges []netip.Prefix
		}{{"pod", c.Ranges.Pods}, {"service", c.Ranges.Services}} {
			for _, r := range kind.ranges {
				for _, v := range [...]netip.Prefix{virtual.V4, virtual.V6} {
					if v.IsValid() && r.Overlaps(v) {
						out = append(out, overlap(c, SeverityError, "%s range %s overlaps the virtual addresses %s; start meshd with another range (--virtual-ipv4, --virtual-ipv6)", kind.name, r, v))
					}
				}
			}
		}
		for _, o := range clusters[i+1:] {
			if a, b, meet := firstOverlap(c.Ranges.Pods, o.Ranges.Pods); meet && c.Network == o.Network {
				out = append(out, overlap(c, SeverityError, "pod range %s overlaps %s of cluster %s on the same network %s; join one of them with a network of its own", a, b, o.Name, c.Network))
			}
		}
	}
	return sortFindings(append(out, s.sharedAddresses(virtual)...))
}

func overlap(c *Cluster, severity, format string, args ...any) Finding {
	return Finding{Code: CodeOverlap, Severity: severity, Object: "Cluster " + c.Name, Message: fmt.Sprintf(format, args...)}
}

func firstOverlap(a, b []netip.Prefix) (netip.Prefix, netip.Prefix, bool) {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return x, y, true
			}
		}
	}
	return netip.Prefix{}, netip.Prefix{}, false
}

// sharedAddresses judges by what is there, for clusters whose ranges are not known: one
// finding for each pair of sources, and for each source within the virtual ranges.
func (s *Snapshot) sharedAddresses(virtual VirtualRanges) []Finding {
	type place struct {
		network Network
		ip      netip.Addr
	}
	owner := map[place]SourceID{}
	pairs := map[[2]SourceID]place{}
	inside := map[SourceID]netip.Addr{}
	for _, records := range s.Records {
		for _, r := range records {
			for _, ip := range r.ClusterIPs {
				noteInside(inside, r.Source, ip, virtual)
			}
			for i := range r.Endpoints {
				for _, ip := range r.Endpoints[i].Addresses {
					noteInside(inside, r.Source, ip, virtual)
					at := place{r.Endpoints[i].Network, ip}
					other, ok := owner[at]
					if !ok || other == r.Source {
						owner[at] = r.Source
						continue
					}
					pair := [2]SourceID{min(other, r.Source), max(other, r.Source)}
					if old, ok := pairs[pair]; !ok || ip.Less(old.ip) {
						pairs[pair] = at
					}
				}
			}
		}
	}
	var out []Finding
	for pair, at := range pairs {
		out = append(out, Finding{Code: CodeOverlap, Severity: SeverityError, Object: "Network " + string(at.network), Message: fmt.Sprintf(
			"address %s is used by %s and by %s; give one of them a network of its own", at.ip, s.SourceName(pair[0]), s.SourceName(pair[1]))})
	}
	for source, ip := range inside {
		out = append(out, Finding{Code: CodeOverlap, Severity: SeverityError, Object: "source " + s.SourceName(source), Message: fmt.Sprintf(
			"uses address %s, which is in the virtual ranges; start meshd with others (--virtual-ipv4, --virtual-ipv6)", ip)})
	}
	return out
}

func noteInside(inside map[SourceID]netip.Addr, source SourceID, ip netip.Addr, virtual VirtualRanges) {
	if !virtual.Contains(ip) {
		return
	}
	if old, ok := inside[source]; !ok || ip.Less(old) {
		inside[source] = ip
	}
}

func podHost(hostname, cluster string, service ServiceName) string {
	return hostname + "." + cluster + "." + service.clustersetHost()
}

// isLabel tells whether s may stand in a host name: what a member reports is not believed.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || strings.Trim(s, "-") != s {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
