// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/ca"
	caetcd "github.com/isthmus-mesh/isthmus/ca/etcd"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
)

// rootKey is where the authority keeps its root, below the prefix of all keys.
const rootKey = "ca/authorities/" + ca.ScopeRoot

func backupCommand(flags *flagValues) *cobra.Command {
	return &cobra.Command{
		Use:   "backup FILE",
		Short: "Copy what meshd keeps in etcd to a file",
		Long: `Copies everything that meshd keeps in etcd, as of one moment, to a file that
is verified after it was written. meshd may run meanwhile or not.

What is secret in it stays sealed: without the sealing key, which is NOT in the
file, a backup cannot be restored. Keep a copy of the key somewhere else.`,
		Example: `  meshd backup --data-dir /var/lib/meshd /backup/meshd.tar
  meshd backup --config /etc/meshd.yaml /backup/meshd.tar`,
		Args: oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := flags.read(cmd.Flags())
			if err == nil {
				err = c.validateState()
			}
			if err != nil {
				return usageError{err}
			}
			return backup(cmd.Context(), c, args[0], cmd.OutOrStdout())
		},
	}
}

func restoreCommand(flags *flagValues) *cobra.Command {
	return &cobra.Command{
		Use:   "restore FILE",
		Short: "Bring a backup back into an empty data directory or etcd",
		Long: `Brings a backup back: into the data directory, in which nothing may be but the
sealing key, or with --etcd-endpoints into an etcd that has nothing below the
prefix. Stop every meshd before.

The file and the sealing key are checked before anything is written. Members,
their records, virtual addresses and authorities are as they were, so that
certificates and addresses in use go on being good. Join tokens that were not
used are void, and proxies see the trust bundle as newer than the one they have.`,
		Example: `  install -m 0600 /safe/sealing.key /var/lib/meshd/sealing.key
  meshd restore --data-dir /var/lib/meshd /backup/meshd.tar`,
		Args: oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := flags.read(cmd.Flags())
			if err == nil {
				err = c.validateState()
			}
			if err != nil {
				return usageError{err}
			}
			return restore(cmd.Context(), c, args[0], cmd.OutOrStdout())
		},
	}
}

func oneFile(_ *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return usageError{fmt.Errorf("want one FILE, got %d", len(args))}
	}
	return nil
}

func backup(ctx context.Context, c Configuration, path string, out io.Writer) error {
	config, err := c.database()
	if err != nil {
		return err
	}
	db, err := etcd.OpenLocal(ctx, config)
	if err != nil {
		return err
	}
	defer db.Close()
	root, err := db.Client().Get(ctx, c.Etcd.Prefix+rootKey)
	if err != nil {
		return fmt.Errorf("read %s: %w", rootKey, err)
	}
	about := etcd.Manifest{TrustDomain: c.TrustDomain}
	about.Meshd, _ = version()
	if about.Replica, err = c.replica(); err != nil {
		return err
	}
	if len(root.Kvs) > 0 {
		about.SealingKey = sealedBy(root.Kvs[0].Value)
	}
	fmt.Fprintf(out, "reading etcd (%s)\n", where(c))
	m, err := etcd.Backup(ctx, etcd.BackupConfig{Client: db.Client(), Prefix: c.Etcd.Prefix, Path: path, About: about})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "wrote %s: %d keys of revision %d, %d bytes, SHA-256 %s; read again and found whole\n", path, m.Keys, m.Revision, m.Bytes, m.SHA256)
	opened, err := openBackup(ctx, c, path)
	switch {
	case errors.Is(err, ca.ErrSealed):
		fmt.Fprintf(out, "warning: the sealing key is not here, so it was not tried: %v\n", err)
	case err != nil:
		return fmt.Errorf("%s was written, but would not be of use: %w", path, err)
	default:
		fmt.Fprintf(out, "trust domain %s; %d sealed values open with key %s\n", m.TrustDomain, opened, m.SealingKey)
	}
	fmt.Fprintf(out, "not in it: the sealing key %s, without which it cannot be restored; keep a copy of %s elsewhere\n", m.SealingKey, c.sealingKey())
	return nil
}

func restore(ctx context.Context, c Configuration, path string, out io.Writer) error {
	config, err := c.database()
	if err != nil {
		return err
	}
	opened, err := openBackup(ctx, c, path)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "verified %s: whole, and %d sealed values open with %s\n", path, opened, c.sealingKey())
	fmt.Fprintf(out, "writing to etcd (%s)\n", where(c))
	var finished finish
	restored, err := etcd.Restore(ctx, etcd.RestoreConfig{
		Path: path, Database: config, Prefix: c.Etcd.Prefix, Keep: keptFiles(c),
		Finish: func(ctx context.Context, client *clientv3.Client) (err error) {
			finished, err = finishRestore(ctx, c, client)
			return err
		},
	})
	if err != nil {
		return err
	}
	m := restored.Manifest
	fmt.Fprintf(out, "restored %d keys of %s (revision %d, replica %s, meshd %s)\n", restored.Keys, m.Created.Format(time.RFC3339), m.Revision, m.Replica, m.Meshd)
	fmt.Fprintf(out, "kept: members, records, virtual addresses, authorities of %s\n", m.TrustDomain)
	fmt.Fprintf(out, "raised the sequence of the trust bundle to %d\n", finished.sequence)
	fmt.Fprintf(out, "voided %d unspent join tokens; dropped %d sessions and the presence of %d machines, which report again by themselves\n",
		restored.Tokens+finished.voided, restored.Sessions, restored.Presences)
	fmt.Fprintf(out, "what was revoked, joined or left after %s is not in it: look at `mesh clusters` and at the audit logs\n", m.Created.Format(time.RFC3339))
	return nil
}

// where names the etcd for people.
func where(c Configuration) string {
	if len(c.Etcd.Endpoints) > 0 {
		return fmt.Sprintf("%s, below %s", strings.Join(c.Etcd.Endpoints, " "), c.Etcd.Prefix)
	}
	return "embedded, in " + c.DataDir
}

// keptFiles are what may be in a data directory that a backup is restored into: the
// sealing key, which has to be there before, and the audit log, which goes on.
func keptFiles(c Configuration) []string {
	kept := []string{"audit.jsonl", "lost+found"}
	if filepath.Dir(c.sealingKey()) == filepath.Clean(c.DataDir) {
		kept = append(kept, filepath.Base(c.sealingKey()))
	}
	return kept
}

// openBackup checks that the sealing key opens what is sealed in a backup, and that the
// authority in it is that of the trust domain. It returns how many values were opened.
func openBackup(ctx context.Context, c Configuration, path string) (int, error) {
	trustDomain, err := ca.ParseTrustDomain(c.TrustDomain)
	if err != nil {
		return 0, usageError{fmt.Errorf("--trust-domain %q: %w", c.TrustDomain, err)}
	}
	sealer, err := ca.NewFileSealer(c.sealingKey())
	if err != nil {
		return 0, err
	}
	state, opened := &ca.Memory{}, 0
	var refused error // the first value that does not open
	manifest, err := etcd.ReadBackup(path, func(e etcd.Entry) error {
		key := string(e.Key)
		if name, ok := strings.CutPrefix(key, "ca/"); ok {
			_, err := state.Create(ctx, name, e.Value)
			return err
		}
		isSealed, err := etcd.OpensWith(sealer, key, e.Value)
		if isSealed && err == nil {
			opened++
		}
		if refused == nil {
			refused = err
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	issuers := 0
	if refused == nil {
		issuers, refused = openAuthorities(ctx, trustDomain, state, sealer)
	}
	if errors.Is(refused, ca.ErrSealed) {
		refused = fmt.Errorf("%s needs the sealing key %s: %w", path, manifest.SealingKey, refused)
	}
	return opened + issuers, refused
}

// openAuthorities opens the authorities of a copied state, and counts them.
func openAuthorities(ctx context.Context, trustDomain spiffeid.TrustDomain, state ca.State, sealer ca.Sealer) (int, error) {
	if _, err := state.Fetch(ctx, strings.TrimPrefix(rootKey, "ca/")); errors.Is(err, ca.ErrNotFound) {
		return 0, nil // of a meshd that never got that far
	}
	authority, err := ca.Open(ctx, ca.Config{
		TrustDomain: trustDomain, State: state, Sealer: sealer, Audit: nobody{}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return 0, err
	}
	return len(authority.Issuers()), nil
}

// nobody is told what a check finds: it issues nothing.
type nobody struct{}

func (nobody) Append(ca.AuditEntry) error { return nil }

// sealedBy names the key that sealed a record of the authority, as the sealer names it in
// its messages; empty if the record is not one.
func sealedBy(record []byte) string {
	var envelope struct {
		Seal []byte `json:"seal"`
	}
	if json.Unmarshal(record, &envelope) != nil || len(envelope.Seal) < 9 {
		return ""
	}
	return hex.EncodeToString(envelope.Seal[1:9])
}

// finish is what was done to the restored state.
type finish struct {
	sequence uint64
	voided   int
}

// finishRestore makes a restored state fit to go on from: whoever holds a newer bundle
// must not take the restored one for older, and no token may be used twice.
func finishRestore(ctx context.Context, c Configuration, client *clientv3.Client) (done finish, err error) {
	prefix := c.Etcd.Prefix + "ca/"
	tokens, err := caetcd.NewTokens(client, prefix, nil)
	if err != nil {
		return done, err
	}
	if done.voided, err = tokens.Void(ctx, "", ""); err != nil {
		return done, err
	}
	state, err := caetcd.NewState(client, prefix)
	if err != nil {
		return done, err
	}
	if _, err := state.Fetch(ctx, strings.TrimPrefix(rootKey, "ca/")); errors.Is(err, ca.ErrNotFound) {
		return done, nil
	}
	trustDomain, err := ca.ParseTrustDomain(c.TrustDomain)
	if err != nil {
		return done, err
	}
	sealer, err := ca.NewFileSealer(c.sealingKey())
	if err != nil {
		return done, err
	}
	replica, err := c.replica()
	if err != nil {
		return done, err
	}
	audit, err := ca.OpenAudit(c.path("audit.jsonl"), replica, nil)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(err, audit.Close()) }()
	authority, err := ca.Open(ctx, ca.Config{TrustDomain: trustDomain, State: state, Sealer: sealer, Audit: audit, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return done, err
	}
	if err := authority.RaiseSequence(ctx); err != nil {
		return done, err
	}
	done.sequence = authority.Bundle().Sequence
	return done, nil
}
