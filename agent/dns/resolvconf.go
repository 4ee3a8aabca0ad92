// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"net/netip"
	"os"
	"strings"
)

// ResolvConf is what matters of a resolv.conf file.
type ResolvConf struct {
	// Servers in the order of the file.
	Servers []netip.Addr
	// Search domains; a domain line counts as a search list of one.
	Search []string
}

// ReadResolvConf reads a file in the format of resolv.conf(5).
func ReadResolvConf(path string) (ResolvConf, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return ResolvConf{}, err
	}
	return ParseResolvConf(string(data)), nil
}

// ParseResolvConf reads what it understands and skips the rest, as C libraries
// do.
func ParseResolvConf(text string) ResolvConf {
	var c ResolvConf
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		line, _, _ = strings.Cut(line, ";")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(fields[1]); err == nil {
				c.Servers = append(c.Servers, a)
			}
		case "domain":
			c.Search = fields[1:2]
		case "search":
			c.Search = fields[1:]
		}
	}
	return c
}

// Captured are the addresses to which a C library would send queries: those of
// the file, or loopback if it names none.
func (c ResolvConf) Captured() []netip.Addr {
	if len(c.Servers) > 0 {
		return c.Servers
	}
	return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
}
