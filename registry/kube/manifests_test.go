// SPDX-License-Identifier: Apache-2.0

package kube_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/registry/kube"
)

func options() kube.MemberOptions {
	return kube.MemberOptions{
		ClusterName: "east", ClusterID: "uid", Network: "n1", Meshd: []string{"mesh.example:15012"}, Root: []byte("PEM"),
		Gateway: true,
	}
}

func TestMembersAccountsReadNoSecret(t *testing.T) {
	t.Parallel()
	objects, err := kube.Manifests(options())
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if !strings.HasSuffix(o.GetKind(), "Role") {
			continue
		}
		for _, rule := range o.Object["rules"].([]any) {
			said := fmt.Sprint(rule)
			if strings.Contains(said, "secrets") || strings.Contains(said, "apiGroups:[*]") {
				t.Errorf("%s %s: %s", o.GetKind(), o.GetName(), said)
			}
		}
	}
}

func TestMemberIsGivenOnlyWhatItNeeds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		change func(*kube.MemberOptions)
		want   []string // kinds that are there
		not    string   // in any rule
	}{
		{"with a gateway", func(*kube.MemberOptions) {}, []string{"Deployment", "Service"}, "secrets"},
		{"without a gateway", func(o *kube.MemberOptions) { o.Gateway = false }, []string{"ClusterRole"}, "secrets"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := options()
			c.change(&o)
			objects, err := kube.Manifests(o)
			if err != nil {
				t.Fatal(err)
			}
			var kinds []string
			for _, object := range objects {
				kinds = append(kinds, object.GetKind())
				if strings.Contains(fmt.Sprint(object.Object["rules"]), c.not) {
					t.Errorf("%s %s has a rule about %s", object.GetKind(), object.GetName(), c.not)
				}
			}
			for _, kind := range c.want {
				if !slices.Contains(kinds, kind) {
					t.Errorf("no %s among %v", kind, kinds)
				}
			}
			if slices.Contains(kinds, "Deployment") != o.Gateway {
				t.Errorf("gateway %v, but kinds are %v", o.Gateway, kinds)
			}
		})
	}
}

func TestManifestsNameWhatIsMissing(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(*kube.MemberOptions){
		"Network": func(o *kube.MemberOptions) { o.Network = "" },
		"Meshd":   func(o *kube.MemberOptions) { o.Meshd = nil },
		"Root":    func(o *kube.MemberOptions) { o.Root = nil },
	} {
		o := options()
		change(&o)
		if _, err := kube.Manifests(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want it to name %s", err, want)
		}
	}
}

func TestWhoJoinsMustHaveWhatTheAccountsGet(t *testing.T) {
	t.Parallel()
	need := fmt.Sprint(kube.RequiredAccess(options()))
	for _, want := range []string{"endpointslices", "serviceaccounts token", "clusterroles", "deployments"} {
		if !strings.Contains(need, want) {
			t.Errorf("%s is not asked for: %s", want, need)
		}
	}
}
