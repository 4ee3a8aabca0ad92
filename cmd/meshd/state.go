// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/caserver"
	caetcd "github.com/isthmus-mesh/isthmus/ca/etcd"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
)

// openState opens etcd and loads the store.
func (d *daemon) openState(ctx context.Context) (err error) {
	if d.sealer, err = ca.NewFileSealer(d.config.sealingKey()); err != nil {
		return err
	}
	config, err := d.config.database()
	if err != nil {
		return err
	}
	config.Log = d.log.With("component", "etcd")
	if d.database, err = etcd.Open(ctx, config); err != nil {
		return err
	}
	d.store = etcd.New(etcd.StoreConfig{
		Client: d.database.Client(), Prefix: d.config.Etcd.Prefix, Sealer: d.sealer, Replica: d.replica,
		Sole: d.database.Embedded(), Log: d.log.With("component", "store"),
	})
	d.metrics.MustRegister(d.store)
	d.run("store", d.store.Run)
	d.ready.add("etcd", d.etcdReady)
	select {
	case <-d.store.Ready():
		return nil
	case err := <-d.database.Err():
		return err
	case <-ctx.Done():
		return fmt.Errorf("stopped before it could be read: %w", ctx.Err())
	}
}

// etcdReady holds once etcd was read; when it goes away later, meshd goes on from memory
// and says so elsewhere, since a replica that serves must not be taken out for that.
func (d *daemon) etcdReady() error {
	select {
	case <-d.store.Ready():
		return nil
	default:
		return errors.New("has not been read yet")
	}
}

// database says which etcd to use.
func (c *Configuration) database() (etcd.DatabaseConfig, error) {
	config := etcd.DatabaseConfig{DataDir: c.DataDir, Endpoints: c.Etcd.Endpoints}
	if c.Etcd.CACert == "" && c.Etcd.Cert == "" {
		return config, nil
	}
	config.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	if c.Etcd.CACert != "" {
		text, err := os.ReadFile(c.Etcd.CACert)
		if err != nil {
			return config, fmt.Errorf("--etcd-cacert: %w", err)
		}
		config.TLS.RootCAs = x509.NewCertPool()
		if !config.TLS.RootCAs.AppendCertsFromPEM(text) {
			return config, fmt.Errorf("--etcd-cacert %s: has no certificate in PEM", c.Etcd.CACert)
		}
	}
	if c.Etcd.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.Etcd.Cert, c.Etcd.Key)
		if err != nil {
			return config, fmt.Errorf("--etcd-cert, --etcd-key: %w", err)
		}
		config.TLS.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// openAuthority opens the certificate authority, gets meshd's own certificate, and writes
// the administrator's.
func (d *daemon) openAuthority(ctx context.Context) (err error) {
	trustDomain, err := ca.ParseTrustDomain(d.config.TrustDomain)
	if err != nil {
		return fmt.Errorf("--trust-domain %q: %w", d.config.TrustDomain, err)
	}
	state, err := caetcd.NewState(d.database.Client(), d.config.Etcd.Prefix+"ca/")
	if err != nil {
		return err
	}
	if d.tokens, err = caetcd.NewTokens(d.database.Client(), d.config.Etcd.Prefix+"ca/", nil); err != nil {
		return err
	}
	if err := d.openAudit(); err != nil {
		return err
	}
	var root *ca.Brought
	if d.config.CADir != "" {
		if root, err = ca.ReadBrought(d.config.CADir, d.started); err != nil {
			return err
		}
	}
	who := members{d.store}
	d.authority, err = ca.Open(ctx, ca.Config{
		TrustDomain: trustDomain, State: state, Sealer: d.sealer, Root: root, Audit: d.audit, Grants: who,
		Lifetime: time.Duration(d.config.CertificateLifetime), Lifetimes: d.config.lifetimes(),
		Backdate: d.config.backdate(), OfflineBudget: time.Duration(d.config.OfflineBudget), ClockSkew: time.Duration(d.config.ClockSkew), Log: d.log.With("component", "ca"),
	})
	if err != nil {
		return err
	}
	d.run("authority", d.authority.Run)
	if d.jwt, err = ca.OpenJWT(ctx, d.authority, ca.JWTConfig{}); err != nil {
		return err
	}
	d.run("keys for JWT-SVIDs", d.jwt.Run)
	d.ready.add("authority", func() error { return nil })
	d.attestor, err = attest.New(attest.Config{Authority: d.authority, Clusters: who, JoinTokens: d.tokens, Workloads: who})
	if err != nil {
		return err
	}
	d.serving, err = caserver.NewServing(ctx, caserver.ServingConfig{
		Authority: d.authority, Replica: d.replica, Names: d.config.hosts(), Log: d.log.With("component", "ca"),
	})
	if err != nil {
		return fmt.Errorf("own certificate: %w", err)
	}
	d.run("own certificate", d.serving.Run)
	if err := d.writeAdmin(ctx); err != nil {
		return err
	}
	d.run("administrator's access", d.keepAdmin)
	return nil
}

// openAudit opens this replica's audit log, whose head is kept in etcd.
func (d *daemon) openAudit() (err error) {
	if d.audit, err = ca.OpenAudit(d.config.path("audit.jsonl"), d.replica, nil); err != nil {
		return err
	}
	// Apart from the authorities, which read all of theirs anew whenever one value changes.
	state, err := caetcd.NewState(d.database.Client(), d.config.Etcd.Prefix+"audit/")
	if err != nil {
		return err
	}
	d.heads = &ca.Checkpoints{State: state, Sealer: d.sealer, Replica: d.replica, Audit: d.audit, Log: d.log.With("component", "audit")}
	d.run("audit", d.audit.Run)
	d.run("heads of the audit log", d.heads.Run)
	return nil
}

func (d *daemon) writeAdmin(ctx context.Context) error {
	server := "https://" + d.config.adminAddresses()[0]
	written, err := caserver.WriteAdmin(ctx, d.authority, d.config.DataDir, server, time.Now())
	if err == nil && written {
		d.log.Info("wrote the administrator's access, for mesh", "file", d.config.path(caserver.AdminFile), "server", server)
	}
	return err
}
