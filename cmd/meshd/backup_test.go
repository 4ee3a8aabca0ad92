// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	caetcd "github.com/isthmus-mesh/isthmus/ca/etcd"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// run runs meshd with arguments, and returns what it printed.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	c := command()
	c.SetArgs(args)
	c.SetOut(&out)
	c.SetErr(&out)
	err := c.ExecuteContext(t.Context())
	return out.String(), err
}

func noErr(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mesh is the state of a small mesh in a data directory.
type mesh struct {
	dir      string
	root     string // fingerprint
	sequence uint64
}

// openMesh opens the authority and the tokens in a data directory.
func openMesh(t *testing.T, ctx context.Context, dir string) (*etcd.Database, *ca.Authority, *caetcd.Tokens) {
	t.Helper()
	db, err := etcd.Open(ctx, etcd.DatabaseConfig{DataDir: dir, Unsynced: true})
	noErr(t, err)
	sealer, err := ca.NewFileSealer(filepath.Join(dir, "sealing.key"))
	noErr(t, err)
	state, err := caetcd.NewState(db.Client(), "/isthmus/ca/")
	noErr(t, err)
	trustDomain, err := ca.ParseTrustDomain("cluster.local")
	noErr(t, err)
	authority, err := ca.Open(ctx, ca.Config{
		TrustDomain: trustDomain, State: state, Sealer: sealer, Audit: nobody{}, Log: slog.New(slog.DiscardHandler),
	})
	noErr(t, err)
	tokens, err := caetcd.NewTokens(db.Client(), "/isthmus/ca/", nil)
	noErr(t, err)
	return db, authority, tokens
}

// newMesh makes a mesh with a member, a root and a join token that was not used, and ends
// all that runs on it.
func newMesh(t *testing.T) mesh {
	t.Helper()
	dir := t.TempDir()
	db, authority, tokens := openMesh(t, t.Context(), dir)
	defer db.Close()
	sealer, err := ca.NewFileSealer(filepath.Join(dir, "sealing.key"))
	noErr(t, err)
	store := etcd.New(etcd.StoreConfig{Client: db.Client(), Sealer: sealer})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- store.Run(ctx) }()
	defer func() { cancel(); noErr(t, <-ended) }()
	<-store.Ready()
	_, err = store.Join(t.Context(), registrytest.Member(t, "uid-east", "east"), registrytest.Token("of east"), false)
	noErr(t, err)
	_, _, err = tokens.Create(t.Context(), ca.JoinToken{Name: "web-1", Network: "n3", Namespace: "legacy", ServiceAccount: "web"}, time.Hour)
	noErr(t, err)
	bundle := authority.Bundle()
	return mesh{dir: dir, root: bundle.Fingerprints()[0], sequence: bundle.Sequence}
}

func wantText(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s does not say %q:\n%s", what, part, text)
		}
	}
}

// copyKey puts a sealing key into a new data directory.
func copyKey(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(from, "sealing.key"))
	noErr(t, err)
	noErr(t, os.WriteFile(filepath.Join(to, "sealing.key"), text, 0o600))
}

func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	before := newMesh(t)
	file := filepath.Join(t.TempDir(), "meshd.tar")
	out, err := run(t, "backup", "--data-dir", before.dir, file)
	noErr(t, err)
	wantText(t, "backup", out, "read again and found whole", "2 sealed values open", "not in it: the sealing key")

	dir := t.TempDir()
	copyKey(t, before.dir, dir)
	out, err = run(t, "restore", "--data-dir", dir, file)
	noErr(t, err)
	wantText(t, "restore", out, "voided 1 unspent join tokens", "raised the sequence of the trust bundle", "authorities of cluster.local")

	db, authority, tokens := openMesh(t, t.Context(), dir)
	defer db.Close()
	bundle := authority.Bundle()
	if bundle.Fingerprints()[0] != before.root {
		t.Error("the root is another one")
	}
	if bundle.Sequence <= before.sequence {
		t.Errorf("the sequence is %d, before the restore it was %d", bundle.Sequence, before.sequence)
	}
	if left, err := tokens.List(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("tokens that can be used again: %v, %v", left, err)
	}
	if log, err := os.ReadFile(filepath.Join(dir, "audit.jsonl")); err != nil || !strings.Contains(string(log), "sequence of the bundle raised") {
		t.Errorf("the audit log does not say what was done: %q, %v", log, err)
	}
}

func TestRestoreRefuses(t *testing.T) {
	t.Parallel()
	before := newMesh(t)
	file := filepath.Join(t.TempDir(), "meshd.tar")
	_, err := run(t, "backup", "--data-dir", before.dir, file)
	noErr(t, err)
	manifest, err := etcd.ReadBackup(file, nil)
	noErr(t, err)
	otherKey := func(t *testing.T, dir string) {
		sealer, err := ca.NewFileSealer(filepath.Join(dir, "sealing.key"))
		noErr(t, err)
		_, err = sealer.Seal("something", nil)
		noErr(t, err)
	}
	rightKey := func(t *testing.T, dir string) { copyKey(t, before.dir, dir) }
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		args    []string
		want    error
		text    string
	}{
		{"without the sealing key", func(*testing.T, string) {}, []string{file}, ca.ErrSealed, manifest.SealingKey},
		{"with another sealing key", otherKey, []string{file}, ca.ErrSealed, "needs the sealing key " + manifest.SealingKey},
		{"with a sealing key that others may read", func(t *testing.T, dir string) {
			rightKey(t, dir)
			noErr(t, os.Chmod(filepath.Join(dir, "sealing.key"), 0o644))
		}, []string{file}, nil, "0600"},
		{"for another trust domain", rightKey, []string{"--trust-domain", "example.org", file}, nil, "example.org"},
		{"a file that is none", rightKey, []string{filepath.Join(before.dir, "sealing.key")}, etcd.ErrNotBackup, "sealing.key"},
		{"into a directory in use", func(t *testing.T, dir string) {
			rightKey(t, dir)
			noErr(t, os.Mkdir(filepath.Join(dir, "etcd"), 0o700))
		}, []string{file}, etcd.ErrNotEmpty, `it has "etcd"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c.prepare(t, dir)
			entries, err := os.ReadDir(dir)
			noErr(t, err)
			_, err = run(t, append([]string{"restore", "--data-dir", dir}, c.args...)...)
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Fatalf("got error %v, want %v", err, c.want)
			}
			wantText(t, "the error", err.Error(), c.text)
			if after, err := os.ReadDir(dir); err != nil || len(after) != len(entries) {
				t.Errorf("the directory changed from %v to %v, %v", entries, after, err)
			}
		})
	}
}

func TestBackupArguments(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"backup"}, {"restore", "a", "b"}, {"backup", "file"}, {"restore", "--data-dir", "d", "--etcd-endpoints", "etcd-0:2379", "file"},
		{"backup", "--data-dir", "d", "--etcd-prefix", "/isthmus", "file"}, {"backup", "--data-dir", "d", "--no-such-flag", "file"},
	} {
		if _, err := run(t, args...); !errors.As(err, new(usageError)) {
			t.Errorf("meshd %v: got %v, want a usage error", args, err)
		}
	}
	if _, err := run(t, "backup", "--data-dir", t.TempDir(), filepath.Join(t.TempDir(), "f")); !errors.Is(err, etcd.ErrNothing) {
		t.Errorf("backup of an empty directory: got %v, want ErrNothing", err)
	}
}
