// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Resolve makes a full name of a short one, as Istio does: a name without a dot is a
// service of the object's own namespace; all others stay as they are.
func Resolve(host, namespace string) string {
	if host == "" || strings.Contains(host, ".") || host == "*" {
		return host
	}
	return federation.ServiceName{Namespace: namespace, Name: host}.Host()
}

// covers tells whether a host of configuration, which may begin with "*", means host.
func covers(pattern, host string) bool {
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return strings.HasSuffix(host, suffix)
	}
	return pattern == host
}

// moreSpecific orders hosts: names before wildcards, longer wildcards before shorter.
func moreSpecific(a, b string) int {
	switch x, y := strings.HasPrefix(a, "*"), strings.HasPrefix(b, "*"); {
	case x != y && y:
		return -1
	case x != y:
		return 1
	case x:
		return len(b) - len(a)
	}
	return 0
}

// Visible tells whether an object of namespace owner is seen from namespace client:
// exportTo lists namespaces, "." for the owner's, "*" for all, "~" for none; empty means
// all.
func Visible(exportTo []string, owner, client string) bool {
	if len(exportTo) == 0 {
		return true
	}
	for _, to := range exportTo {
		if to == "*" || to == client && to != "~" || to == "." && owner == client {
			return true
		}
	}
	return false
}

// matches tells whether labels have all that a selector asks for.
func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}
