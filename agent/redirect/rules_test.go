// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/agent/redirect"
)

// body drops the frame that all transactions share.
func body(r redirect.Rules) string {
	var lines []string
	for line := range strings.Lines(r.Text()) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "add ") || strings.HasPrefix(line, "delete ") || strings.HasPrefix(line, "type nat") {
			continue
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func TestAPodIsCapturedWhole(t *testing.T) {
	t.Parallel()
	const want = `table inet isthmus {
chain inbound {
iifname "lo" return
tcp dport { 15020, 15021, 15090 } return
meta l4proto tcp redirect to :15006
}
chain outbound {
meta mark 0x539 return
oifname "lo" ip saddr 127.0.0.6 return
meta skuid 1337 oifname "lo" ip daddr != 127.0.0.0/8 tcp dport != { 15020, 15021, 15090 } redirect to :15006
meta skuid 1337 return
meta skgid 1337 return
udp dport 53 redirect to :15053
tcp dport 53 redirect to :15053
oifname "lo" return
meta l4proto tcp redirect to :15001
}
}`
	if got := body(redirect.Rules{}); got != want {
		t.Errorf("got:\n%s", got)
	}
}

func TestAMachineIsCapturedForTheMeshOnly(t *testing.T) {
	t.Parallel()
	got := body(redirect.Rules{
		OutboundTo:   []netip.Prefix{netip.MustParsePrefix("240.240.0.0/12"), netip.MustParsePrefix("2001:2::/48")},
		InboundPorts: []uint16{8080, 80},
		Resolvers:    []netip.Addr{netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("fe80::1%eth0")},
	})
	const want = `table inet isthmus {
chain inbound {
iifname "lo" return
tcp dport { 15020, 15021, 15090 } return
tcp dport { 80, 8080 } redirect to :15006
}
chain outbound {
meta mark 0x539 return
oifname "lo" ip saddr 127.0.0.6 return
meta skuid 1337 oifname "lo" ip daddr != 127.0.0.0/8 tcp dport { 80, 8080 } redirect to :15006
meta skuid 1337 return
meta skgid 1337 return
ip daddr { 127.0.0.53 } udp dport 53 redirect to :15053
ip6 daddr { fe80::1 } udp dport 53 redirect to :15053
ip daddr { 127.0.0.53 } tcp dport 53 redirect to :15053
ip6 daddr { fe80::1 } tcp dport 53 redirect to :15053
ip daddr { 240.240.0.0/12 } meta l4proto tcp redirect to :15001
ip6 daddr { 2001:2::/48 } meta l4proto tcp redirect to :15001
}
}`
	if got != want {
		t.Errorf("got:\n%s", got)
	}
}

func TestWhatIsLeftAlone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name      string
		rules     redirect.Rules
		has, lack string
	}{
		{"ports outbound", redirect.Rules{ExcludeToPorts: []uint16{22, 5432, 22}}, "tcp dport { 22, 5432 } return", ""},
		{"ranges outbound", redirect.Rules{ExcludeTo: []netip.Prefix{netip.MustParsePrefix("10.0.0.9/8")}}, "ip daddr { 10.0.0.0/8 } return", ""},
		{"ports inbound", redirect.Rules{ExcludeInboundPorts: []uint16{9999}}, "tcp dport { 9999, 15020, 15021, 15090 } return", ""},
		{"names", redirect.Rules{NoDNS: true}, "redirect to :15001", "15053"},
		{"inbound", redirect.Rules{NoInbound: true}, "redirect to :15001", "15006"},
		{"outbound", redirect.Rules{NoOutbound: true}, "redirect to :15053", "15001"},
		{"another user", redirect.Rules{UID: 42}, "meta skuid 42 return", "skuid 1337"},
	} {
		text := c.rules.Text()
		if !strings.Contains(text, c.has) || c.lack != "" && strings.Contains(text, c.lack) {
			t.Errorf("%s: want %q and not %q in:\n%s", c.name, c.has, c.lack, text)
		}
	}
}

// The kernel has the last word on every variant. unshare gives each a network
// of its own, which is gone afterwards.
func TestTheKernelAcceptsAllOfThem(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	for _, tool := range []string{"nft", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	for name, rules := range map[string]redirect.Rules{
		"everything": {},
		"nothing":    {NoInbound: true, NoOutbound: true, NoDNS: true},
		"all options": {
			OutboundTo:          []netip.Prefix{netip.MustParsePrefix("240.240.0.0/12"), netip.MustParsePrefix("2001:2::/48")},
			ExcludeTo:           []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.2.3/32"), netip.MustParsePrefix("fd00::/8")},
			ExcludeToPorts:      []uint16{22},
			InboundPorts:        []uint16{80},
			ExcludeInboundPorts: []uint16{9999},
			Resolvers:           []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		},
		"overlapping ranges": {OutboundTo: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16")}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			command := exec.Command("unshare", "--net", "sh", "-ec", `cat >"$1"; nft -f "$1"; nft -f "$1"; nft list table inet isthmus`, "sh", t.TempDir()+"/rules")
			command.Stdin = strings.NewReader(rules.Text())
			if out, err := command.CombinedOutput(); err != nil {
				t.Errorf("%v: %s\n%s", err, out, rules.Text())
			}
		})
	}
}
