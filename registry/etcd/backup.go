// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/registry"
)

// Errors of backups. They are wrapped; use errors.Is.
var (
	// ErrNotBackup: the file is something else.
	ErrNotBackup = errors.New("not a backup of meshd")

	// ErrDamaged: the file began as a backup, but is not whole or not as it was written.
	ErrDamaged = errors.New("backup is damaged")

	// ErrNewerBackup: the file was written by a newer version of meshd.
	ErrNewerBackup = errors.New("backup of a newer meshd")

	// ErrNothing: there is nothing to back up.
	ErrNothing = errors.New("nothing to back up")
)

// backupFormat is the newest form of backups that this program reads, and the one it
// writes: a tar file of pages "keys/000000.jsonl" in the order of keys, one Entry a line,
// and "manifest.json" as the last file, so that a backup that was cut short has none.
//
// It holds keys, and not etcd's own snapshot, because an external etcd may serve others
// too, and because it goes from an embedded etcd into an external one and back.
const backupFormat = 1

const (
	manifestName = "manifest.json"
	pagesDir     = "keys/"
	backupPage   = 1000     // keys
	maxPage      = 64 << 20 // bytes of a page that is read
)

// Manifest says what a backup holds.
type Manifest struct {
	Format      int       `json:"format"`
	Created     time.Time `json:"created"`
	Revision    int64     `json:"revision"` // of etcd: the moment that the backup shows
	Keys        int       `json:"keys"`
	Bytes       int64     `json:"bytes"`  // of the pages
	SHA256      string    `json:"sha256"` // of the pages, one after the other, hexadecimal
	TrustDomain string    `json:"trustDomain"`
	SealingKey  string    `json:"sealingKey"` // name of the key that seals what is secret; the key itself is kept elsewhere
	Replica     string    `json:"replica"`
	Meshd       string    `json:"meshd"` // version
}

// Entry is one key of a backup.
type Entry struct {
	Key    []byte `json:"key"` // without the prefix
	Value  []byte `json:"value"`
	Leased bool   `json:"leased,omitempty"` // it would have gone by itself
}

// BackupConfig says what to back up, and where to.
type BackupConfig struct {
	Client *clientv3.Client

	// Prefix of all keys; empty means "/isthmus/".
	Prefix string

	// Path of the file, which is replaced as a whole if it is a backup already, and left
	// alone if it is anything else.
	Path string

	// About is copied to the manifest: trust domain, sealing key, replica, version, time.
	About Manifest
}

// Backup writes everything below the prefix, as of one revision, to a file of mode 0600,
// and reads it again to be sure. The file appears when it is whole, and not otherwise.
func Backup(ctx context.Context, config BackupConfig) (*Manifest, error) {
	if err := mayReplace(config.Path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(config.Path)
	file, err := os.CreateTemp(dir, "."+filepath.Base(config.Path)+".*") // 0600
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	defer os.Remove(file.Name()) // after the rename there is nothing to remove
	manifest, err := writeBackup(ctx, config, file)
	if err == nil {
		err = file.Sync()
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, fmt.Errorf("backup to %s: %w", config.Path, err)
	}
	again, err := ReadBackup(file.Name(), nil)
	if err == nil && again.SHA256 != manifest.SHA256 {
		err = ErrDamaged
	}
	if err != nil {
		return nil, fmt.Errorf("backup to %s, read again: %w", config.Path, err)
	}
	if err := os.Rename(file.Name(), config.Path); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	return manifest, syncDir(dir)
}

// mayReplace refuses to write over a file that is no backup.
func mayReplace(path string) error {
	_, err := ReadBackup(path, nil)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, ErrDamaged), errors.Is(err, ErrNewerBackup):
		return nil
	case errors.Is(err, ErrNotBackup):
		return fmt.Errorf("%w, and was left as it is", err)
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func writeBackup(ctx context.Context, config BackupConfig, w io.Writer) (*Manifest, error) {
	m := config.About
	m.Format = backupFormat
	if m.Created.IsZero() {
		m.Created = time.Now()
	}
	m.Created = m.Created.UTC().Truncate(time.Second)
	archive, sum, page := tar.NewWriter(w), sha256.New(), 0
	prefix := withSlash(config.Prefix)
	revision, err := readPages(ctx, config.Client, prefix, func(response *clientv3.GetResponse) error {
		var content bytes.Buffer
		for _, kv := range response.Kvs {
			k := bytes.TrimPrefix(kv.Key, []byte(prefix))
			if bytes.HasPrefix(k, []byte(settledPrefix)) {
				continue // it names a session by a revision, which means nothing in another etcd
			}
			m.Keys++
			line, err := json.Marshal(Entry{Key: k, Value: kv.Value, Leased: kv.Lease != 0})
			if err != nil {
				return err
			}
			content.Write(append(line, '\n'))
		}
		m.Bytes += int64(content.Len())
		sum.Write(content.Bytes())
		page++
		return addFile(archive, pageName(page-1), content.Bytes(), m.Created)
	})
	if err != nil {
		return nil, err
	}
	if m.Keys == 0 {
		return nil, fmt.Errorf("%w: etcd has no key below %s", ErrNothing, prefix)
	}
	m.Revision, m.SHA256 = revision, hex.EncodeToString(sum.Sum(nil))
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := addFile(archive, manifestName, append(text, '\n'), m.Created); err != nil {
		return nil, err
	}
	return &m, archive.Close()
}

func pageName(n int) string { return fmt.Sprintf("%s%06d.jsonl", pagesDir, n) }

// readPages reads everything below a prefix as of one revision, which it returns.
func readPages(ctx context.Context, client *clientv3.Client, prefix string, take func(*clientv3.GetResponse) error) (int64, error) {
	revision, from, end := int64(0), prefix, clientv3.GetPrefixRangeEnd(prefix)
	for {
		response, err := client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(backupPage), clientv3.WithRev(revision))
		if err != nil {
			return 0, fmt.Errorf("read %s from etcd: %w", prefix, err)
		}
		if revision == 0 {
			revision = response.Header.Revision
		}
		if len(response.Kvs) > 0 {
			if err := take(response); err != nil {
				return 0, err
			}
		}
		if !response.More {
			return revision, nil
		}
		from = string(response.Kvs[len(response.Kvs)-1].Key) + "\x00"
	}
}

func addFile(archive *tar.Writer, name string, content []byte, at time.Time) error {
	err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(content)), ModTime: at, Format: tar.FormatUSTAR})
	if err != nil {
		return err
	}
	_, err = archive.Write(content)
	return err
}

// ReadBackup reads a backup, gives every entry to visit (if there is one) in the order of
// keys, and tells at the end whether all was as it was written. What visit returns ends
// the reading.
func ReadBackup(path string, visit func(Entry) error) (*Manifest, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	defer file.Close()
	m, err := readBackup(file, visit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, nil
}

func readBackup(r io.Reader, visit func(Entry) error) (*Manifest, error) {
	archive := tar.NewReader(r)
	var read Manifest
	sum := sha256.New()
	for page := 0; ; page++ {
		header, err := archive.Next()
		switch {
		case page == 0 && (err != nil || header.Name != pageName(0)):
			return nil, ErrNotBackup
		case err == io.EOF:
			return nil, fmt.Errorf("%w: it ends before its manifest", ErrDamaged)
		case err != nil:
			return nil, fmt.Errorf("%w: %v", ErrDamaged, err)
		case header.Size > maxPage:
			return nil, fmt.Errorf("%w: %s has %d bytes", ErrDamaged, header.Name, header.Size)
		case header.Name == manifestName:
			return readManifest(archive, &read, sum)
		case header.Name != pageName(page):
			return nil, fmt.Errorf("%w: unexpected file %q", ErrDamaged, header.Name)
		}
		if err := readPage(archive, &read, sum, visit); err != nil {
			return nil, fmt.Errorf("%s: %w", header.Name, err)
		}
	}
}

func readPage(r io.Reader, read *Manifest, sum hash.Hash, visit func(Entry) error) error {
	content, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("%w: %v", ErrDamaged, err)
	}
	sum.Write(content)
	read.Bytes += int64(len(content))
	for line := range bytes.Lines(content) {
		var e Entry
		if err := json.Unmarshal(line, &e); err != nil || len(e.Key) == 0 {
			return fmt.Errorf("%w: line %q", ErrDamaged, line[:min(len(line), 40)])
		}
		read.Keys++
		if visit == nil {
			continue
		}
		if err := visit(e); err != nil {
			return err
		}
	}
	return nil
}

// readManifest compares what the manifest says with what was read.
func readManifest(r io.Reader, read *Manifest, sum hash.Hash) (*Manifest, error) {
	var m Manifest
	text, err := io.ReadAll(r)
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	digest := hex.EncodeToString(sum.Sum(nil))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: manifest: %v", ErrDamaged, err)
	case m.Format > backupFormat:
		return nil, fmt.Errorf("%w (%s): format %d, this one reads up to %d", ErrNewerBackup, m.Meshd, m.Format, backupFormat)
	case m.Format < 1:
		return nil, fmt.Errorf("%w: manifest: format %d", ErrDamaged, m.Format)
	case m.SHA256 != digest:
		return nil, fmt.Errorf("%w: its content has SHA-256 %s, its manifest says %s", ErrDamaged, digest, m.SHA256)
	case m.Keys != read.Keys || m.Bytes != read.Bytes:
		return nil, fmt.Errorf("%w: it has %d keys in %d bytes, its manifest says %d in %d", ErrDamaged, read.Keys, read.Bytes, m.Keys, m.Bytes)
	}
	return &m, nil
}

// OpensWith tells whether a key of a backup holds something that the store has sealed, and
// why the sealer cannot open it.
func OpensWith(sealer registry.Sealer, k string, value []byte) (sealed bool, err error) {
	if p, err := parts(k, clustersPrefix, 2, 2); err != nil || p[1] != "credentials" {
		return false, nil
	}
	var v credentialsValue
	if decode(value, &v, &v.version) != nil {
		return false, nil // the store will quarantine it
	}
	_, err = sealer.Open(k, v.Sealed)
	return true, err
}

func withSlash(prefix string) string {
	setDefault(&prefix, "/isthmus/")
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	return prefix
}
