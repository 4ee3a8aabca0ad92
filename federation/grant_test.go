// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"errors"
	"strings"
	"testing"

	. "github.com/isthmus-mesh/isthmus/federation"
)

func TestGrant(t *testing.T) {
	t.Parallel()
	tests := []struct {
		story    string
		grant    Grant
		identity string
		want     bool
	}{
		{"the default is every namespace", Grant{}, "shop/cart", true},
		{"but not Kubernetes' own", Grant{}, "kube-system/admin", false},
		{"a star does not mean them either", Grant{Namespaces: []string{"*"}}, "kube-system/admin", false},
		{"unless they are named", Grant{Namespaces: []string{"kube-system"}}, "kube-system/admin", true},
		{"a name is a name", Grant{Namespaces: []string{"shop"}}, "shopping/cart", false},
		{"a glob is a prefix", Grant{Namespaces: []string{"shop*"}}, "shopping/cart", true},
		{"accounts narrow", Grant{ServiceAccounts: []string{"shop/cart"}}, "shop/pay", false},
		{"by glob too", Grant{ServiceAccounts: []string{"shop/c*"}}, "shop/cart", true},
		{"within the namespaces", Grant{Namespaces: []string{"pay"}, ServiceAccounts: []string{"*/cart"}}, "shop/cart", false},
		{"no namespace is none", Grant{}, "/cart", false},
		{"no account is none where accounts are listed", Grant{ServiceAccounts: []string{"shop/*"}}, "shop/", false},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			ns, sa, _ := strings.Cut(tt.identity, "/")
			if got := tt.grant.AllowsIdentity(ns, sa); got != tt.want {
				t.Errorf("%s allows %s: %t", tt.grant, tt.identity, got)
			}
		})
	}
}

func TestGrantValidate(t *testing.T) {
	t.Parallel()
	good := Grant{Namespaces: []string{"*", "shop", "pay-*"}, ServiceAccounts: []string{"shop/*", "*/cart"}, Gateways: []Network{"n1"}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for _, bad := range []Grant{
		{Namespaces: []string{""}}, {Namespaces: []string{"*shop"}}, {Namespaces: []string{"Shop"}},
		{ServiceAccounts: []string{"cart"}}, {ServiceAccounts: []string{"shop/"}}, {ServiceAccounts: []string{"a/b/c"}},
		{Gateways: []Network{""}},
	} {
		if err := bad.Validate(); !errors.Is(err, ErrInvalidGrant) {
			t.Errorf("%+v: error %v", bad, err)
		}
	}
}

func TestGrantedLeavesOutWhatWasNotGranted(t *testing.T) {
	t.Parallel()
	s := story(t, `
		cluster east n1
		cluster west n2 grant=catalogue
		gateway west n2 203.0.113.2
		gateway west n1 203.0.113.3
		service west shop/cart 80/HTTP
		service west catalogue/items 80/HTTP
		service west kube-system/kube-dns 53/TCP
		service ghost shop/cart 80/HTTP`)
	s.Workloads = map[WorkloadKey]*Workload{
		{Source: KubeSource("west"), UID: "1"}: {Source: KubeSource("west"), Namespace: "shop", Name: "a", ServiceAccount: "x"},
		{Source: KubeSource("west"), UID: "2"}: {Source: KubeSource("west"), Namespace: "catalogue", Name: "b", ServiceAccount: "x"},
	}
	s.Objects = []*Object{
		{Source: KubeSource("west"), Kind: "VirtualService", Namespace: "shop", Name: "a"},
		{Source: KubeSource("east"), Kind: "VirtualService", Namespace: "shop", Name: "a"},
	}
	got, findings := s.Granted()
	if len(got.Records) != 2 || len(got.Workloads) != 1 || len(got.Objects) != 1 {
		t.Errorf("kept %d services, %d workloads, %d objects", len(got.Records), len(got.Workloads), len(got.Objects))
	}
	if len(got.Gateways) != 1 || got.Gateways["n2"] == nil {
		t.Errorf("a gateway into another cluster's network was let in: %v", got.Gateways)
	}
	if len(findings) != 5 {
		t.Errorf("findings: %v", findings)
	}
	if again, findings := got.Granted(); again != got || findings != nil {
		t.Errorf("not idempotent: %v", findings)
	}
	if len(s.Records) != 3 || len(s.Workloads) != 2 {
		t.Error("the snapshot itself was changed")
	}
}
