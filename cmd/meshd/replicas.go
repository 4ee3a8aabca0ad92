// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
)

// wirePeers makes what asks the other replicas. Who they are is known from etcd.
func (d *daemon) wirePeers() {
	d.peers = apiserver.NewPeerGroup(apiserver.PeerConfig{
		Addresses: func() []string {
			var addresses []string
			for _, r := range d.store.Replicas() {
				addresses = append(addresses, r.AdminAddress)
			}
			return addresses
		},
		Authority: d.authority, Certificate: d.serving.Certificate, Log: d.log.With("component", "admin"),
	})
}

// advertisedElsewhere are the addresses for proxies of the replicas that live.
func (d *daemon) advertisedElsewhere() []string {
	var addresses []string
	for _, r := range d.store.Replicas() {
		addresses = append(addresses, r.Advertise...)
	}
	return addresses
}

// announce tells the other replicas of this one, which answers by now.
func (d *daemon) announce(ctx context.Context) error {
	v, _ := version()
	self := etcd.Replica{Name: d.replica, AdminAddress: d.config.AdminAddress, Advertise: d.config.Advertise, Version: v, Started: d.started}
	if self.AdminAddress == "" {
		addresses, err := net.InterfaceAddrs()
		if err != nil {
			d.log.Warn("cannot tell which --advertise is this machine's", "error", err)
		}
		name, err := os.Hostname()
		if err != nil {
			name = d.replica
		}
		self.AdminAddress = d.config.ownAdminAddress(name, addresses)
	}
	d.log.Info("known to the other replicas", "replica", self.Name, "admin", self.AdminAddress)
	return d.store.Announce(ctx, self)
}

// ownAdminAddress is the host:port at which the machine of that name and these addresses
// has its admin port. What is advertised may lead to a balancer, so that only what is the
// machine's own counts: the one address that the port is open at, else the first
// advertised host that is an address or the name of it, else its name.
func (c *Configuration) ownAdminAddress(machine string, addresses []net.Addr) string {
	own := map[netip.Addr]bool{}
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own[p.Addr().Unmap()] = true
		}
	}
	host, port, err := net.SplitHostPort(c.Listen.Admin)
	if ip, parse := netip.ParseAddr(host); err == nil && parse == nil && !ip.IsUnspecified() {
		return c.Listen.Admin
	}
	if err != nil {
		port = c.adminPort()
	}
	for _, a := range c.Advertise {
		host, _, err := net.SplitHostPort(a)
		if err != nil {
			continue
		}
		ip, err := netip.ParseAddr(host)
		if err == nil && own[ip.Unmap()] || err != nil && isNameOf(machine, host) {
			return net.JoinHostPort(host, port)
		}
	}
	return net.JoinHostPort(machine, port)
}

// isNameOf tells whether a host is the machine's name, with or without its domain.
func isNameOf(machine, host string) bool {
	machine, host = strings.ToLower(machine), strings.ToLower(strings.TrimSuffix(host, "."))
	return host == machine || strings.HasPrefix(host, machine+".") || host == "localhost"
}
