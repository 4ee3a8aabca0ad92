// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Manifest says what a backup holds.
type Manifest struct {
	V          int       `json:"v"`
	Created    time.Time `json:"created"`
	Prefix     string    `json:"prefix"`
	Revision   int64     `json:"revision"`   // of etcd
	Keys       int       `json:"keys"`       // below the prefix
	SHA256     string    `json:"sha256"`     // of the snapshot in the archive
	SealingKey string    `json:"sealingKey"` // which key opens what is sealed; it is not in the backup
	Version    string    `json:"version"`    // of the meshd that made it
}

// BackupConfig says what to write where.
type BackupConfig struct {
	// Path of the archive, which must not exist. It is written whole or not at all, for
	// this user alone.
	Path string

	Prefix     string // empty means "/isthmus/"
	SealingKey string // names the sealing key, for who restores
	Version    string // of meshd
	Now        func() time.Time
}

const (
	manifestName = "manifest.json"
	snapshotName = "etcd.snapshot"
)

// LocalEndpoint is where the embedded etcd of a running meshd answers tools of the same
// user; false if none does.
func LocalEndpoint(dataDir string) (string, bool) {
	path, err := filepath.Abs(filepath.Join(dataDir, SocketName))
	if err != nil {
		return "", false
	}
	_, err = os.Stat(path)
	return "unix://" + path, err == nil
}

// Backup writes an archive of everything in etcd, while it is in use: a manifest and
// etcd's own snapshot, which etcdutl can read as well.
func Backup(ctx context.Context, client *clientv3.Client, config BackupConfig) (*Manifest, error) {
	setDefault(&config.Prefix, "/isthmus/")
	if config.Now == nil {
		config.Now = time.Now
	}
	if _, err := os.Stat(config.Path); err == nil {
		return nil, fmt.Errorf("backup: %s exists already", config.Path)
	}
	work, err := os.MkdirTemp(filepath.Dir(config.Path), ".backup-")
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	defer os.RemoveAll(work)
	snapshot := filepath.Join(work, snapshotName)
	if err := fetchSnapshot(ctx, client, snapshot); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	m := &Manifest{V: schema, Created: config.Now().UTC(), Prefix: config.Prefix, SealingKey: config.SealingKey, Version: config.Version}
	if m.SHA256, err = fileSHA256(snapshot); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	copied := filepath.Join(work, "copy")
	if err := copyFile(copied, snapshot); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	values, revision, err := readSnapshot(copied, config.Prefix)
	if err != nil {
		return nil, fmt.Errorf("backup: the snapshot cannot be read back: %w", err)
	}
	m.Revision, m.Keys = revision, len(values)
	archive := filepath.Join(work, "archive")
	if err := writeArchive(archive, m, snapshot); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	if err := os.Rename(archive, config.Path); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	return m, nil
}

func fetchSnapshot(ctx context.Context, client *clientv3.Client, path string) error {
	stream, err := client.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer stream.Close()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, stream)
	return errors.Join(err, f.Sync(), f.Close())
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func fileSHA256(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func writeArchive(path string, m *Manifest, snapshot string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	manifest, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	header := func(name string, size int64) error {
		return w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, ModTime: m.Created})
	}
	if err := header(manifestName, int64(len(manifest))); err != nil {
		return err
	}
	if _, err := w.Write(manifest); err != nil {
		return err
	}
	in, err := os.Open(snapshot)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if err := header(snapshotName, info.Size()); err != nil {
		return err
	}
	if _, err := io.Copy(w, in); err != nil {
		return err
	}
	return errors.Join(w.Close(), f.Sync())
}

// RestoreConfig says what to restore where.
type RestoreConfig struct {
	Path    string // of the archive
	DataDir string // for an embedded etcd that does not exist yet

	// Rewrite may change or leave out (false) a value; the key is without the prefix. It is
	// how bundle sequences are raised and unspent tokens voided. Nil keeps all.
	Rewrite func(key string, value []byte) ([]byte, bool, error)
}

// Restore fills a new embedded etcd from a backup. What was bound to a process that then
// lived (sessions, presence) is left out; addresses and everything else are as they were.
func Restore(ctx context.Context, config RestoreConfig) (*Manifest, error) {
	target := filepath.Join(config.DataDir, "etcd")
	if _, err := os.Stat(target); err == nil {
		return nil, fmt.Errorf("restore: %s exists already; move it away first", target)
	}
	if err := os.MkdirAll(config.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	work, err := os.MkdirTemp(config.DataDir, ".restore-")
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	defer os.RemoveAll(work)
	m, snapshot, err := readArchive(config.Path, work)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", config.Path, err)
	}
	values, _, err := readSnapshot(snapshot, m.Prefix)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", config.Path, err)
	}
	if err := fill(ctx, work, m.Prefix, values, config.Rewrite); err != nil {
		return nil, fmt.Errorf("restore %s: %w", config.Path, err)
	}
	if err := os.Rename(filepath.Join(work, "etcd"), target); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	return m, nil
}

// fill writes values into an embedded etcd of its own.
func fill(ctx context.Context, dir, prefix string, values map[string][]byte, rewrite func(string, []byte) ([]byte, bool, error)) error {
	db, err := Open(ctx, DatabaseConfig{DataDir: dir})
	if err != nil {
		return err
	}
	defer db.Close()
	var ops []clientv3.Op
	size := 0
	flush := func() error {
		if len(ops) == 0 {
			return nil
		}
		_, err := db.client.Txn(ctx).Then(ops...).Commit()
		ops, size = ops[:0], 0
		return err
	}
	for k, value := range values {
		if rewrite != nil {
			var keep bool
			if value, keep, err = rewrite(strings.TrimPrefix(k, prefix), value); err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
			if !keep {
				continue
			}
		}
		ops = append(ops, clientv3.OpPut(k, string(value)))
		if size += len(k) + len(value); len(ops) >= txnOperations || size >= txnBytes {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// readArchive unpacks an archive and verifies the snapshot in it.
func readArchive(path, dir string) (*Manifest, string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	var m *Manifest
	snapshot := filepath.Join(dir, snapshotName)
	found := false
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, "", err
		}
		switch h.Name {
		case manifestName:
			m = &Manifest{}
			if err := json.NewDecoder(io.LimitReader(r, 1<<20)).Decode(m); err != nil {
				return nil, "", fmt.Errorf("%s: %w", manifestName, err)
			}
		case snapshotName:
			out, err := os.OpenFile(snapshot, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
			if err != nil {
				return nil, "", err
			}
			_, err = io.Copy(out, r)
			if err := errors.Join(err, out.Close()); err != nil {
				return nil, "", err
			}
			found = true
		}
	}
	switch {
	case m == nil || !found:
		return nil, "", fmt.Errorf("has no %s or no %s: not a backup of meshd", manifestName, snapshotName)
	case m.V > schema:
		return nil, "", fmt.Errorf("%w: %d, this meshd knows up to %d", errNewer, m.V, schema)
	}
	sum, err := fileSHA256(snapshot)
	if err != nil {
		return nil, "", err
	}
	if sum != m.SHA256 {
		return nil, "", fmt.Errorf("checksum of %s is %s, the manifest says %s: the file was changed or cut", snapshotName, sum, m.SHA256)
	}
	return m, snapshot, nil
}

// readSnapshot reads the newest values below a prefix from a snapshot of etcd: a bbolt
// file whose bucket "key" has, by revision, every version of every key (see etcd's
// server/storage/mvcc), followed by its SHA-256.
func readSnapshot(path, prefix string) (map[string][]byte, int64, error) {
	if err := dropHash(path); err != nil {
		return nil, 0, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return nil, 0, err
	}
	defer db.Close()
	values := map[string][]byte{}
	last := int64(0)
	err = db.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket([]byte("key"))
		if bucket == nil {
			return errors.New("has no bucket of keys")
		}
		return bucket.ForEach(func(revision, value []byte) error {
			if len(revision) < 17 {
				return fmt.Errorf("revision %x is too short", revision)
			}
			last = int64(binary.BigEndian.Uint64(revision))
			var kv mvccpb.KeyValue
			if err := kv.Unmarshal(value); err != nil {
				return fmt.Errorf("revision %d: %w", last, err)
			}
			k := string(kv.Key)
			switch {
			case !strings.HasPrefix(k, prefix):
			case len(revision) > 17, kv.Lease != 0: // a tombstone; bound to a process
				delete(values, k)
			default:
				values[k] = bytes.Clone(kv.Value)
			}
			return nil
		})
	})
	return values, last, err
}

// dropHash verifies and cuts off the SHA-256 that etcd appends to a snapshot.
func dropHash(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	if size%512 != sha256.Size {
		return nil // was cut off before, or is a copy of a database
	}
	h := sha256.New()
	if _, err := io.CopyN(h, f, size-sha256.Size); err != nil {
		return err
	}
	var appended [sha256.Size]byte
	if _, err := io.ReadFull(f, appended[:]); err != nil {
		return err
	}
	if !bytes.Equal(h.Sum(nil), appended[:]) {
		return errors.New("the snapshot's own checksum is wrong")
	}
	return f.Truncate(size - sha256.Size)
}
