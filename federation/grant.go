// SPDX-License-Identifier: Apache-2.0

package federation

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// ErrInvalidGrant is wrapped by every error of Grant.Validate.
var ErrInvalidGrant = errors.New("invalid grant")

// systemPrefix starts the names of Kubernetes' own namespaces. They are never shared
// unless a grant names them.
const systemPrefix = "kube-"

// Grant is what a source is allowed to contribute and which identities it may host.
// The zero Grant is the default: every namespace but kube-*.
type Grant struct {
	// Namespaces are names or globs with one trailing "*"; empty means all but kube-*.
	// "*" alone means the same: a kube- namespace is granted only by a pattern that
	// itself begins with "kube-".
	Namespaces []string `json:"namespaces,omitempty"`

	// ServiceAccounts are "namespace/name" with the same globs in either part; empty
	// means all accounts of the granted namespaces.
	ServiceAccounts []string `json:"serviceAccounts,omitempty"`

	// Gateways are the networks that the source may offer gateways for; empty means the
	// network it joined with, and networks that no other source is at home on.
	Gateways []Network `json:"gateways,omitempty"`
}

// AllowsNamespace tells whether records, workloads and objects of that namespace count.
func (g Grant) AllowsNamespace(namespace string) bool {
	if namespace == "" {
		return false
	}
	system := strings.HasPrefix(namespace, systemPrefix)
	if len(g.Namespaces) == 0 {
		return !system
	}
	for _, pattern := range g.Namespaces {
		if system && !strings.HasPrefix(pattern, systemPrefix) {
			continue
		}
		if matchGlob(pattern, namespace) {
			return true
		}
	}
	return false
}

// AllowsIdentity tells whether the source may host workloads with that identity. An empty
// account stands for a workload without one.
func (g Grant) AllowsIdentity(namespace, account string) bool {
	if !g.AllowsNamespace(namespace) {
		return false
	}
	if len(g.ServiceAccounts) == 0 {
		return true
	}
	for _, pattern := range g.ServiceAccounts {
		ns, name, _ := strings.Cut(pattern, "/")
		if matchGlob(ns, namespace) && matchGlob(name, account) && account != "" {
			return true
		}
	}
	return false
}

// Equal tells whether both allow the same in the same words.
func (g Grant) Equal(o Grant) bool {
	return slices.Equal(g.Namespaces, o.Namespaces) &&
		slices.Equal(g.ServiceAccounts, o.ServiceAccounts) &&
		slices.Equal(g.Gateways, o.Gateways)
}

// Validate refuses patterns that could not mean what their writer hoped: a "*" anywhere
// but at the end, empty parts, a service account without its namespace.
func (g Grant) Validate() error {
	for i, p := range g.Namespaces {
		if err := validGlob(p); err != nil {
			return fmt.Errorf("%w: namespaces[%d] %q: %w", ErrInvalidGrant, i, p, err)
		}
	}
	for i, p := range g.ServiceAccounts {
		ns, name, ok := strings.Cut(p, "/")
		if !ok {
			return fmt.Errorf("%w: serviceAccounts[%d] %q: want namespace/name", ErrInvalidGrant, i, p)
		}
		if err := errors.Join(validGlob(ns), validGlob(name)); err != nil {
			return fmt.Errorf("%w: serviceAccounts[%d] %q: %w", ErrInvalidGrant, i, p, err)
		}
	}
	for i, n := range g.Gateways {
		if n == "" {
			return fmt.Errorf("%w: gateways[%d] is empty: want the name of a network", ErrInvalidGrant, i)
		}
	}
	return nil
}

// String is the grant in words, as join prints it.
func (g Grant) String() string {
	words := "all namespaces but kube-*"
	if len(g.Namespaces) > 0 {
		words = "namespaces " + strings.Join(g.Namespaces, ", ")
	}
	if len(g.ServiceAccounts) > 0 {
		words += "; service accounts " + strings.Join(g.ServiceAccounts, ", ")
	}
	if len(g.Gateways) > 0 {
		words += "; gateways of"
		for i, n := range g.Gateways {
			if i > 0 {
				words += ","
			}
			words += " " + string(n)
		}
	}
	return words
}

func matchGlob(pattern, s string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(s, prefix)
	}
	return pattern == s
}

func validGlob(p string) error {
	body, _ := strings.CutSuffix(p, "*")
	switch {
	case p == "":
		return errors.New("empty: want a name, or a name with one trailing *")
	case strings.Contains(body, "*"):
		return errors.New("want one * at the very end only")
	}
	for _, c := range body {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' {
			return fmt.Errorf("character %q: want lower case letters, digits, dots and dashes", c)
		}
	}
	return nil
}

// GrantOf is the grant of a source: its cluster's, or the default one for the VMs of a
// network. False for a cluster that has not joined: it may contribute nothing.
func (s *Snapshot) GrantOf(source SourceID) (Grant, bool) {
	id, kube := source.Cluster()
	if !kube {
		return Grant{}, true
	}
	c, ok := s.Clusters[id]
	if !ok {
		return Grant{}, false
	}
	return c.Grant, true
}

// AdmitsGateway tells whether a gateway may speak for its network: so that no member can
// draw another network's traffic to itself.
func (s *Snapshot) AdmitsGateway(g *Gateway) bool {
	id, kube := g.Source.Cluster()
	if !kube {
		n, vm := g.Source.VMNetwork()
		return !vm || n == g.Network
	}
	own, ok := s.Clusters[id]
	if !ok {
		return false
	}
	if len(own.Grant.Gateways) > 0 {
		return slices.Contains(own.Grant.Gateways, g.Network)
	}
	if own.Network == g.Network {
		return true
	}
	for _, c := range s.Clusters {
		if c.Network == g.Network {
			return false
		}
	}
	return true
}

// Granted is the snapshot without what its sources were not granted, and one finding for
// each source and kind of thing that was left out. It is the snapshot itself where
// nothing is. Services of kube-* stay: they are local to their cluster (see Record.Local)
// and never reach another.
func (s *Snapshot) Granted() (*Snapshot, []Finding) {
	d := refusals{}
	out := *s
	out.Records = filterLists(s.Records, func(r *Record) bool {
		return s.admits(r) || d.add(r.Source, "services", r.Name.String())
	})
	out.Gateways = filterLists(s.Gateways, func(g *Gateway) bool {
		return s.AdmitsGateway(g) || d.add(g.Source, "gateways", g.Name+" of network "+string(g.Network))
	})
	for key, w := range s.Workloads {
		grant, ok := s.GrantOf(w.Source)
		if ok && grant.AllowsIdentity(w.Namespace, w.ServiceAccount) {
			continue
		}
		d.add(w.Source, "workloads", w.Namespace+"/"+w.Name)
		if len(out.Workloads) == len(s.Workloads) {
			out.Workloads = maps.Clone(s.Workloads)
		}
		delete(out.Workloads, key)
	}
	out.Objects = filter(s.Objects, func(o *Object) bool {
		grant, ok := s.GrantOf(o.Source)
		return ok && (o.Namespace == "" || grant.AllowsNamespace(o.Namespace)) ||
			d.add(o.Source, o.Kind, o.Namespace+"/"+o.Name)
	})
	if len(d) == 0 {
		return s, nil
	}
	return &out, d.findings(s)
}

// admits tells whether a record counts at all. System namespaces count for their own
// cluster only, which Local sees to.
func (s *Snapshot) admits(r *Record) bool {
	grant, ok := s.GrantOf(r.Source)
	return ok && (grant.AllowsNamespace(r.Name.Namespace) || r.system())
}

// refusals collects what was left out, by source and kind.
type refusals map[[2]string][]string

// add always returns false, so that it ends a condition.
func (d refusals) add(source SourceID, kind, name string) bool {
	key := [2]string{string(source), kind}
	d[key] = append(d[key], name)
	return false
}

func (d refusals) findings(s *Snapshot) []Finding {
	var out []Finding
	keys := slices.SortedFunc(maps.Keys(d), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	for _, key := range keys {
		names := d[key]
		slices.Sort(names)
		shown := names[:min(3, len(names))]
		more := ""
		if n := len(names) - len(shown); n > 0 {
			more = fmt.Sprintf(" and %d more", n)
		}
		out = append(out, Finding{
			Code: CodeOutsideGrant, Severity: SeverityWarning,
			Object:  "source " + s.SourceName(SourceID(key[0])),
			Message: fmt.Sprintf("%s %s%s are outside its grant and left out; widen the grant of the cluster, or remove them", key[1], strings.Join(shown, ", "), more),
		})
	}
	return out
}

// filter keeps what is wanted, and the very slice where that is everything.
func filter[T any](list []T, keep func(T) bool) []T {
	for i, v := range list {
		if keep(v) {
			continue
		}
		out := slices.Clone(list[:i])
		for _, v := range list[i+1:] {
			if keep(v) {
				out = append(out, v)
			}
		}
		return out
	}
	return list
}

func filterLists[K comparable, T any](lists map[K][]T, keep func(T) bool) map[K][]T {
	out, cloned := lists, false
	for key, list := range lists {
		kept := filter(list, keep)
		if len(kept) == len(list) {
			continue
		}
		if !cloned {
			out, cloned = maps.Clone(lists), true
		}
		if len(kept) == 0 {
			delete(out, key)
		} else {
			out[key] = kept
		}
	}
	return out
}
