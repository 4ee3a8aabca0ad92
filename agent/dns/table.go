// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"net/netip"
	"strings"

	"github.com/isthmus-mesh/isthmus/api"
)

// Table is an immutable index of a name table as seen from one namespace.
type Table struct {
	hosts  map[string]entry // full names, lower case, no trailing dot
	short  map[string]entry // name, name.namespace
	svc    map[string]entry // name.namespace.svc
	search []string         // lower case, no trailing dot
	domain string           // cluster domain
}

// entry is the addresses of one host by family.
type entry struct {
	host      string
	four, six []netip.Addr
}

// NewTable indexes what meshd sent. Search are the search domains of
// resolv.conf. Addresses that do not parse are left out.
func NewTable(in *api.NameTable, namespace, domain string, search []string) *Table {
	t := &Table{
		hosts:  map[string]entry{},
		short:  map[string]entry{},
		svc:    map[string]entry{},
		domain: clean(domain),
	}
	for _, s := range search {
		if s = clean(s); s != "" {
			t.search = append(t.search, s)
		}
	}
	for host, info := range in.GetTable() {
		host = clean(host)
		if host == "" {
			continue
		}
		e := entry{host: host}
		for _, text := range info.GetIps() {
			a, err := netip.ParseAddr(text)
			if err != nil {
				continue
			}
			if a = a.Unmap(); a.Is4() {
				e.four = append(e.four, a)
			} else {
				e.six = append(e.six, a)
			}
		}
		t.hosts[host] = e
		t.shorten(host, namespace, e)
	}
	return t
}

// shorten adds the names under which a host of the cluster domain is known
// without it: prefix.namespace.svc, prefix.namespace, and prefix alone in the
// namespace itself. The prefix may have several labels (db-0.db).
func (t *Table) shorten(host, namespace string, e entry) {
	rest, ok := strings.CutSuffix(host, ".svc."+t.domain)
	if !ok {
		return
	}
	dot := strings.LastIndexByte(rest, '.')
	if dot <= 0 {
		return
	}
	t.svc[rest+".svc"] = e
	t.short[rest] = e
	if rest[dot+1:] == namespace {
		// A name of the own namespace wins over a name.namespace that happens
		// to read the same; the search list would find it first as well.
		t.short[rest[:dot]] = e
	}
}

// find returns the entry that a query name means.
func (t *Table) find(name string) (entry, bool) {
	name = clean(name)
	if e, ok := t.exact(name); ok {
		return e, true
	}
	if e, ok := t.short[name]; ok {
		return e, true
	}
	// With a search domain behind it only full names are recognised: a short
	// one (reviews.other.shop.svc.cluster.local) may be a pod of a headless
	// service that the resolver knows.
	for _, s := range t.search {
		if inner, ok := strings.CutSuffix(name, "."+s); ok {
			if e, ok := t.exact(inner); ok {
				return e, true
			}
		}
	}
	return entry{}, false
}

func (t *Table) exact(name string) (entry, bool) {
	if e, ok := t.hosts[name]; ok {
		return e, true
	}
	e, ok := t.svc[name]
	return e, ok
}

// inMesh tells whether a name could only be a mesh service's.
func (t *Table) inMesh(name string) bool {
	name = clean(name)
	return strings.HasSuffix(name, ".svc."+t.domain) || strings.HasSuffix(name, ".svc.clusterset.local")
}

// Len is the number of hosts.
func (t *Table) Len() int { return len(t.hosts) }

func clean(name string) string {
	return strings.ToLower(strings.TrimSuffix(strings.TrimSpace(name), "."))
}
