// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"net/netip"
	"strings"
	"testing"
)

func TestRouterRules(t *testing.T) {
	t.Parallel()
	pods := netip.MustParsePrefix("10.244.0.0/16")
	at := netip.MustParseAddrPort
	for _, story := range []struct {
		name   string
		routed []netip.Prefix
		fronts []front
		want   []string
		never  []string
	}{
		{
			name:  "alone",
			want:  []string{"policy drop", "ip saddr 10.244.0.0/16 oifname transit masquerade"},
			never: []string{"dport", "return"},
		},
		{
			name:   "one backend",
			fronts: []front{{Frontend{at("198.18.1.10:80"), "tcp"}, []netip.AddrPort{at("10.244.1.2:8080")}}},
			want:   []string{"ip daddr 198.18.1.10 tcp dport 80 dnat to 10.244.1.2:8080"},
		},
		{
			name:   "two backends",
			fronts: []front{{Frontend{at("198.18.1.10:53"), "udp"}, []netip.AddrPort{at("10.244.1.2:5353"), at("10.244.1.3:5353")}}},
			want:   []string{"udp dport 53 dnat ip to numgen inc mod 2 map { 0 : 10.244.1.2 . 5353, 1 : 10.244.1.3 . 5353 }"},
		},
		{
			name:   "no backend",
			fronts: []front{{Frontend{at("198.18.1.10:80"), "tcp"}, nil}},
			never:  []string{"198.18.1.10"},
		},
		{
			name:   "a route",
			routed: []netip.Prefix{netip.MustParsePrefix("10.245.0.0/16")},
			want: []string{
				"ip saddr 10.244.0.0/16 ip daddr 10.245.0.0/16 return",
				"iifname transit oifname pods ip saddr 10.245.0.0/16 accept",
			},
		},
	} {
		t.Run(story.name, func(t *testing.T) {
			rules := routerRules(pods, story.routed, story.fronts)
			for _, want := range story.want {
				if !strings.Contains(rules, want) {
					t.Errorf("no %q in\n%s", want, rules)
				}
			}
			for _, never := range story.never {
				if strings.Contains(rules, never) {
					t.Errorf("%q in\n%s", never, rules)
				}
			}
		})
	}
}

func TestFaultRulesOfNoFaultRemoveTheTable(t *testing.T) {
	t.Parallel()
	if got := faultRules(nil, nil); strings.Contains(got, "chain") {
		t.Errorf("got\n%s", got)
	}
}

func TestPortNamesFitTheKernel(t *testing.T) {
	t.Parallel()
	seen := make(map[string]string)
	for _, namespace := range []string{"a", "router-n1", "payments-6d5f7c9b4d-abcde", "payments-6d5f7c9b4d-abcdf"} {
		for _, name := range []string{"eth0", "transit"} {
			port := portName(namespace, name)
			if len(port) > 15 {
				t.Errorf("interface name %q is longer than 15 characters", port)
			}
			if other, ok := seen[port]; ok {
				t.Errorf("%s/%s and %s have the same interface name %q", namespace, name, other, port)
			}
			seen[port] = namespace + "/" + name
		}
	}
}
