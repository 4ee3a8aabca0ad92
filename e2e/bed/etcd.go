// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"crypto/tls"
	"crypto/x509"
)

// An Etcd is an etcd outside of all clusters, for meshd, with TLS and client
// certificates required.
type Etcd struct {
	// Members are its processes, each on a host of its own.
	Members []*Process
	// CAFile, CertFile and KeyFile are what a client needs, in PEM.
	CAFile, CertFile, KeyFile string

	endpoints []string
	tls       *tls.Config
}

// Etcd makes an etcd of so many members and waits until they have a leader.
// The hosts are named name-1 and so on, or name where there is only one.
func (w *World) Etcd(name string, members int) (*Etcd, error) {
	e := &Etcd{}
	hosts, initial := make([]*Namespace, members), make([]string, members)
	addresses := make([]netip.Addr, members)
	for i := range members {
		host := name
		if members > 1 {
			host = fmt.Sprintf("%s-%d", name, i+1)
		}
		var err error
		if hosts[i], err = w.Host(host); err != nil {
			return nil, fmt.Errorf("etcd %s: %w", name, err)
		}
		addresses[i] = hosts[i].Addr()
		initial[i] = fmt.Sprintf("%s=https://%s:2380", host, addresses[i])
		e.endpoints = append(e.endpoints, fmt.Sprintf("https://%s:2379", addresses[i]))
	}
	if err := e.issue(w, name, addresses); err != nil {
		return nil, fmt.Errorf("etcd %s: %w", name, err)
	}
	for i, host := range hosts {
		process, err := host.Start(Command{Path: w.binaries.Etcd, Args: []string{
			"--name=" + host.name, "--data-dir=" + w.Dir("etcd-"+name, host.name), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=" + e.endpoints[i], "--advertise-client-urls=" + e.endpoints[i],
			fmt.Sprintf("--listen-peer-urls=https://%s:2380", addresses[i]), fmt.Sprintf("--initial-advertise-peer-urls=https://%s:2380", addresses[i]),
			"--initial-cluster=" + strings.Join(initial, ","), "--initial-cluster-token=" + name,
			"--client-cert-auth", "--trusted-ca-file=" + e.CAFile, "--cert-file=" + e.CertFile, "--key-file=" + e.KeyFile,
			"--peer-client-cert-auth", "--peer-trusted-ca-file=" + e.CAFile, "--peer-cert-file=" + e.CertFile, "--peer-key-file=" + e.KeyFile,
		}})
		if err != nil {
			return nil, fmt.Errorf("etcd %s: %w", name, err)
		}
		e.Members = append(e.Members, process)
	}
	return e, e.WaitReady(w.ctx)
}

// issue makes the certificate that members and clients share.
func (e *Etcd) issue(w *World, name string, addresses []netip.Addr) error {
	ca, err := newAuthority("etcd-" + name)
	if err != nil {
		return err
	}
	both, err := ca.issue(name, nil, []string{name}, addresses)
	if err != nil {
		return err
	}
	dir := w.Dir("etcd-" + name)
	e.CAFile, e.CertFile, e.KeyFile = dir+"/ca.crt", dir+"/etcd.crt", dir+"/etcd.key"
	certificate, err := tls.X509KeyPair(both.certificate, both.key)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.certificate)
	e.tls = &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{certificate}}
	return writeFiles(dir, map[string][]byte{"ca.crt": ca.pem, "etcd.crt": both.certificate, "etcd.key": both.key})
}

// Endpoints returns the members' client addresses as URLs.
func (e *Etcd) Endpoints() []string { return append([]string(nil), e.endpoints...) }

// TLS returns a copy of what a client of this process needs. It must dial
// through a namespace on the transit network.
func (e *Etcd) TLS() *tls.Config { return e.tls.Clone() }

// WaitReady waits up to 20 seconds until every member that runs says that it
// is healthy, which means that there is a leader.
func (e *Etcd) WaitReady(ctx context.Context) error {
	return until(ctx, 20*time.Second, pollEvery, func() error {
		for i, member := range e.Members {
			if !member.Running() {
				continue
			}
			if err := e.healthy(ctx, member.in, e.endpoints[i]); err != nil {
				return fmt.Errorf("etcd member %s: %w: %s", member.in.name, err, lastLines([]byte(member.Log())))
			}
		}
		return nil
	})
}

// healthy asks one member for its health.
func (e *Etcd) healthy(ctx context.Context, from *Namespace, endpoint string) error {
	client := httpClient(from.Dial, e.tls)
	defer client.CloseIdleConnections()
	status, body, err := get(ctx, client, endpoint+"/health")
	if err != nil {
		return err
	}
	if status != 200 || !strings.Contains(body, `"health":"true"`) {
		return fmt.Errorf("health is %d %s", status, body)
	}
	return nil
}

// dialer is the Dial of a Namespace.
type dialer = func(ctx context.Context, network, address string) (net.Conn, error)
