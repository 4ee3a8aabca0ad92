// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"strings"
	"testing"

	. "github.com/isthmus-mesh/isthmus/federation"
)

// FuzzServiceOfHost: what is taken for a service's name is one, and is spelt like it.
func FuzzServiceOfHost(f *testing.F) {
	for _, host := range []string{"cart.shop.svc.cluster.local", "a.b.c.svc.cluster.local", ".svc.cluster.local", "db-0.db.shop.svc.cluster.local", "Cart.shop.svc.cluster.local."} {
		f.Add(host)
	}
	f.Fuzz(func(t *testing.T, host string) {
		name, ok := ServiceOfHost(host)
		if ok != (name != ServiceName{}) || ok && name.Host() != host {
			t.Fatalf("%q: %v, %t", host, name, ok)
		}
	})
}

// FuzzGrant: a valid pattern never grants a kube- namespace by accident.
func FuzzGrant(f *testing.F) {
	f.Add("*", "kube-system")
	f.Add("kube-*", "kube-system")
	f.Add("shop*", "shopping")
	f.Fuzz(func(t *testing.T, pattern, namespace string) {
		g := Grant{Namespaces: []string{pattern}}
		if g.Validate() != nil || !g.AllowsNamespace(namespace) {
			return
		}
		if strings.HasPrefix(namespace, "kube-") && !strings.HasPrefix(pattern, "kube-") {
			t.Fatalf("%q grants %q", pattern, namespace)
		}
		if prefix := strings.TrimSuffix(pattern, "*"); !strings.HasPrefix(namespace, prefix) {
			t.Fatalf("%q grants %q", pattern, namespace)
		}
	})
}
