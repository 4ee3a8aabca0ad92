// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"strings"
	"testing"
)

func TestOwnAdminAddress(t *testing.T) {
	t.Parallel()
	var addresses []net.Addr
	for _, text := range []string{"127.0.0.1/8", "192.0.2.7/24", "2001:db8::7/64"} {
		ip, n, err := net.ParseCIDR(text)
		noErr(t, err)
		addresses = append(addresses, &net.IPNet{IP: ip, Mask: n.Mask})
	}
	for _, tt := range []struct{ name, advertise, listen, want string }{
		{"a name that leads to all of them is not its own", "mesh.example.org:15012", ":8443", "meshd-1:8443"},
		{"its address, after the balancer's", "192.0.2.1:15012 192.0.2.7:15012", ":9443", "192.0.2.7:9443"},
		{"its address of IPv6", "[2001:db8::7]:15012", "[::]:8443", "[2001:db8::7]:8443"},
		{"its name with its domain", "mesh.example.org:15012 Meshd-1.example.org:15012", ":8443", "Meshd-1.example.org:8443"},
		{"another machine's name that begins like it", "meshd-10.example.org:15012", ":8443", "meshd-1:8443"},
		{"the one address it listens at", "192.0.2.7:15012", "127.0.0.1:8443", "127.0.0.1:8443"},
		{"everything on one machine", "localhost:15012", ":8443", "localhost:8443"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := Configuration{Advertise: strings.Fields(tt.advertise), Listen: ListenConfiguration{Admin: tt.listen}}
			if got := c.ownAdminAddress("meshd-1", addresses); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestReplicaFlagsAreChecked(t *testing.T) {
	t.Parallel()
	for _, c := range []Configuration{
		{Replica: "meshd 1"}, {Replica: "a/b"}, {AdminAddress: "meshd-1"}, {AdminAddress: ":8443"},
	} {
		if err := c.validateReplica(); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
	if err := (&Configuration{Replica: "meshd-1.x", AdminAddress: "[::1]:8443"}).validateReplica(); err != nil {
		t.Error(err)
	}
}
