// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
)

func TestBackoff(t *testing.T) {
	t.Parallel()
	b := Backoff{}.withDefaults()
	var waits []string
	wait := time.Duration(0)
	for _, ran := range []time.Duration{0, 0, 5 * time.Second, 0, 0, 0, 20 * time.Second, 0} {
		wait = b.next(wait, ran)
		waits = append(waits, wait.String())
	}
	if got, want := strings.Join(waits, " "), "1s 2s 4s 8s 10s 10s 1s 2s"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestAddresses(t *testing.T) {
	t.Parallel()
	a := newAddresses(netip.MustParsePrefix("10.244.1.0/29")) // .2 to .6 are for pods
	take := func(want string) {
		t.Helper()
		got, err := a.take()
		if err != nil || got.String() != want {
			t.Errorf("took %s, %v, want %s", got, err, want)
		}
	}
	take("10.244.1.2")
	take("10.244.1.3")
	a.give(netip.MustParseAddr("10.244.1.2"))
	take("10.244.1.4") // not .2 again so soon
	if err := a.takeFixed(netip.MustParseAddr("10.244.1.5")); err != nil {
		t.Error(err)
	}
	if err := a.takeFixed(netip.MustParseAddr("10.244.1.4")); err == nil {
		t.Error("an address is taken twice")
	}
	take("10.244.1.6")
	take("10.244.1.2")
	if got, err := a.take(); err == nil {
		t.Errorf("took %s from a full range", got)
	}
	six := newAddresses(netip.MustParsePrefix("fd00::/126"))
	if got, err := six.take(); err != nil || got.String() != "fd00::2" {
		t.Errorf("took %s, %v, want fd00::2", got, err)
	}
}

func TestResolvConf(t *testing.T) {
	t.Parallel()
	servers := []netip.Addr{netip.MustParseAddr("10.96.0.10")}
	for _, c := range []struct {
		why  string
		spec corev1.PodSpec
		want string
	}{
		{"the cluster's", corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst},
			"nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"},
		{"with changes", corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst, DNSConfig: &corev1.PodDNSConfig{
			Nameservers: []string{"10.0.0.1"}, Searches: []string{"example.com"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: ptr.To("1")}, {Name: "rotate"}}}},
			"nameserver 10.96.0.10\nnameserver 10.0.0.1\nsearch shop.svc.cluster.local svc.cluster.local cluster.local example.com\noptions ndots:1 rotate\n"},
		{"only its own", corev1.PodSpec{DNSPolicy: corev1.DNSNone, DNSConfig: &corev1.PodDNSConfig{Nameservers: []string{"10.0.0.1"}}}, "nameserver 10.0.0.1\n"},
		{"none", corev1.PodSpec{DNSPolicy: corev1.DNSDefault}, ""},
	} {
		pod := webPod()
		pod.Spec = c.spec
		if got := resolvConf(pod, servers, "cluster.local"); got != c.want {
			t.Errorf("%s: got %q, want %q", c.why, got, c.want)
		}
	}
}

func TestHostsFile(t *testing.T) {
	t.Parallel()
	pod := webPod()
	pod.Spec.Subdomain = "db"
	pod.Spec.HostAliases = []corev1.HostAlias{{IP: "10.9.9.9", Hostnames: []string{"old", "older"}}}
	got := hostsFile(pod, webFacts.PodIPs, "cluster.local")
	for _, line := range []string{
		"127.0.0.1\tlocalhost\n", "10.244.1.2\tweb-0.db.shop.svc.cluster.local\tweb-0\n",
		"fd00::2\tweb-0.db.shop.svc.cluster.local\tweb-0\n", "10.9.9.9\told\tolder\n",
	} {
		if !strings.Contains(got, line) {
			t.Errorf("no %q in %q", line, got)
		}
	}
	pod.Name = strings.Repeat("long-", 13) // a cut must not end in a dash
	if got := hostName(pod); len(got) > 63 || strings.HasSuffix(got, "-") {
		t.Errorf("host name %q", got)
	}
}

func TestAccepts(t *testing.T) {
	t.Parallel()
	labels := map[string]string{"zone": "a", "disk": "ssd"}
	term := func(key string, op corev1.NodeSelectorOperator, values ...string) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: op, Values: values}}}
	}
	for _, c := range []struct {
		why      string
		selector map[string]string
		terms    []corev1.NodeSelectorTerm
		want     bool
	}{
		{"no wishes", nil, nil, true},
		{"a label it has", map[string]string{"zone": "a"}, nil, true},
		{"one it has not", map[string]string{"zone": "b"}, nil, false},
		{"one of several values", nil, []corev1.NodeSelectorTerm{term("zone", corev1.NodeSelectorOpIn, "b", "a")}, true},
		{"none of these", nil, []corev1.NodeSelectorTerm{term("zone", corev1.NodeSelectorOpNotIn, "a")}, false},
		{"any of the terms", nil, []corev1.NodeSelectorTerm{term("zone", corev1.NodeSelectorOpIn, "x"), term("disk", corev1.NodeSelectorOpExists)}, true},
		{"without a label", nil, []corev1.NodeSelectorTerm{term("disk", corev1.NodeSelectorOpDoesNotExist)}, false},
		{"a comparison is not known", nil, []corev1.NodeSelectorTerm{term("zone", corev1.NodeSelectorOpGt, "1")}, false},
		{"by the node's name", nil, []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{
			{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{"node-a"}}}}}, true},
	} {
		pod := webPod()
		pod.Spec.NodeSelector = c.selector
		if c.terms != nil {
			pod.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
				RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: c.terms}}}
		}
		if got := accepts(pod, "node-a", labels); got != c.want {
			t.Errorf("%s: got %t", c.why, got)
		}
	}
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		why     string
		pod     *corev1.PodSecurityContext
		own     *corev1.SecurityContext
		want    identity
		wantErr string
	}{
		{why: "root with the usual rights", want: identity{Capabilities: defaultCapabilities}},
		{why: "the pod's user, the container's group", pod: &corev1.PodSecurityContext{RunAsUser: ptr.To[int64](7), RunAsGroup: ptr.To[int64](8), FSGroup: ptr.To[int64](9)},
			own: &corev1.SecurityContext{RunAsGroup: ptr.To[int64](6)}, want: identity{UID: 7, GID: 6, Groups: []int{9}, Capabilities: defaultCapabilities}},
		{why: "one right more, the others gone", own: &corev1.SecurityContext{Capabilities: &corev1.Capabilities{
			Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"net_admin", "CAP_NET_RAW"}}}, want: identity{Capabilities: []string{"NET_ADMIN", "NET_RAW"}}},
		{why: "all rights", own: &corev1.SecurityContext{Privileged: ptr.To(true)}, want: identity{Capabilities: capabilityNames}},
		{why: "a right that does not exist", own: &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"FLY"}}}, wantErr: `"FLY"`},
		{why: "root where that is forbidden", own: &corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, wantErr: "runAsNonRoot"},
	} {
		pod := webPod()
		pod.Spec.SecurityContext = c.pod
		got, err := identityOf(pod, &corev1.Container{Name: "main", SecurityContext: c.own})
		if c.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), c.wantErr) {
				t.Errorf("%s: error is %v, want %q", c.why, err, c.wantErr)
			}
			continue
		}
		if err != nil || got.UID != c.want.UID || got.GID != c.want.GID || !slices.Equal(got.Groups, c.want.Groups) || !slices.Equal(got.Capabilities, c.want.Capabilities) {
			t.Errorf("%s: got %+v, %v, want %+v", c.why, got, err, c.want)
		}
	}
}
