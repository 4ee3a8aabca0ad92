// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrNotEmpty: a backup is restored only where there is nothing yet.
var ErrNotEmpty = errors.New("not empty")

// RestoreConfig says what to restore, and where to.
type RestoreConfig struct {
	// Path of the backup.
	Path string

	// Database to restore into: a data directory where nothing is but the files of Keep,
	// or an external etcd that has no key below Prefix.
	Database DatabaseConfig
	Keep     []string
	Prefix   string // empty means "/isthmus/"

	// Finish is called when all keys are written and before the restored state can be
	// seen in the data directory; when it fails, nothing is left behind. May be nil.
	Finish func(ctx context.Context, client *clientv3.Client) error
}

// Restored says what a restore did.
type Restored struct {
	Manifest *Manifest
	Keys     int // written

	// What belonged to processes that are gone, or must not come back, was left out.
	Sessions, Presences, Tokens, Others int
}

// What a restore in progress is marked by: a folder in the data directory, which becomes
// its etcd as a whole; a key in an external etcd.
const (
	stagingPrefix = ".restore-"
	restoringKey  = "restoring"
)

// Restore brings a backup back. The backup is read whole and verified before anything is
// written.
func Restore(ctx context.Context, config RestoreConfig) (*Restored, error) {
	config.Prefix = withSlash(config.Prefix)
	if _, err := ReadBackup(config.Path, nil); err != nil {
		return nil, err
	}
	if len(config.Database.Endpoints) > 0 {
		return restoreExternal(ctx, config)
	}
	return restoreEmbedded(ctx, config)
}

// restoreEmbedded fills an etcd in a folder of its own, and moves it to its place at last.
func restoreEmbedded(ctx context.Context, config RestoreConfig) (*Restored, error) {
	dir := config.Database.DataDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := requireEmpty(dir, config.Keep); err != nil {
		return nil, err
	}
	staging, err := os.MkdirTemp(dir, stagingPrefix)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	defer os.RemoveAll(staging)
	config.Database.DataDir = staging
	db, err := Open(ctx, config.Database)
	if err != nil {
		return nil, err
	}
	restored, err := fill(ctx, db.Client(), config)
	if err := errors.Join(err, db.Close()); err != nil {
		return nil, err
	}
	if err := os.Rename(filepath.Join(staging, "etcd"), filepath.Join(dir, "etcd")); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return restored, syncDir(dir)
}

// requireEmpty refuses a directory that has anything but what may be there; what an
// interrupted restore left is removed.
func requireEmpty(dir string, keep []string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	for _, e := range entries {
		switch {
		case strings.HasPrefix(e.Name(), stagingPrefix):
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("data directory: %w", err)
			}
		case !slices.Contains(keep, e.Name()):
			return fmt.Errorf("data directory %s: %w: it has %q; restore into an empty one, and move this one away if it is lost", dir, ErrNotEmpty, e.Name())
		}
	}
	return nil
}

func restoreExternal(ctx context.Context, config RestoreConfig) (restored *Restored, err error) {
	db, err := Open(ctx, config.Database)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := answers(ctx, db, config.Database); err != nil {
		return nil, err
	}
	client, marker := db.Client(), config.Prefix+restoringKey
	if err := claimPrefix(ctx, client, config); err != nil {
		return nil, err
	}
	restored, err = fill(ctx, client, config)
	if err == nil {
		_, err = client.Delete(ctx, marker)
		return restored, err
	}
	// Half a state is worse than none.
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerWithin)
	defer cancel()
	if _, failed := client.Delete(undo, config.Prefix, clientv3.WithPrefix()); failed != nil {
		err = errors.Join(err, fmt.Errorf("what was written below %s could not be removed, which the next restore will do: %w", config.Prefix, failed))
	}
	return nil, err
}

// claimPrefix marks an empty prefix as being restored. What an interrupted restore left is
// removed.
func claimPrefix(ctx context.Context, client *clientv3.Client, config RestoreConfig) error {
	prefix, marker := config.Prefix, config.Prefix+restoringKey
	there, err := client.Get(ctx, marker)
	if err != nil {
		return fmt.Errorf("etcd %v: %w", config.Database.Endpoints, err)
	}
	if len(there.Kvs) > 0 {
		if _, err := client.Delete(ctx, prefix, clientv3.WithPrefix()); err != nil {
			return fmt.Errorf("etcd %v: remove what an interrupted restore left: %w", config.Database.Endpoints, err)
		}
	}
	// The comparison holds for every key of the prefix, so this is one decision.
	response, err := client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(prefix), "=", 0).WithPrefix()).
		Then(clientv3.OpPut(marker, `{"v":1}`)).
		Else(clientv3.OpGet(prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(1))).
		Commit()
	if err != nil {
		return fmt.Errorf("etcd %v: %w", config.Database.Endpoints, err)
	}
	if !response.Succeeded {
		key := prefix
		if kvs := response.Responses[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
			key = string(kvs[0].Key)
		}
		return fmt.Errorf("etcd %v below %s: %w: it has %s; stop every meshd and remove them, or name another --etcd-prefix",
			config.Database.Endpoints, prefix, ErrNotEmpty, key)
	}
	return nil
}

// fill writes the backup's keys, and finishes.
func fill(ctx context.Context, client *clientv3.Client, config RestoreConfig) (*Restored, error) {
	restored := &Restored{}
	var batch []clientv3.Op
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if _, err := client.Txn(ctx).Then(batch...).Commit(); err != nil {
			return fmt.Errorf("write to etcd: %w", err)
		}
		restored.Keys += len(batch)
		batch, size = batch[:0], 0
		return nil
	}
	manifest, err := ReadBackup(config.Path, func(e Entry) error {
		if e.Leased {
			restored.leaveOut(string(e.Key))
			return nil
		}
		batch = append(batch, clientv3.OpPut(config.Prefix+string(e.Key), string(e.Value)))
		size += len(e.Key) + len(e.Value)
		if len(batch) == txnOperations || size > txnBytes {
			return flush()
		}
		return nil
	})
	if err := errors.Join(err, flush()); err != nil {
		return nil, err
	}
	restored.Manifest = manifest
	if config.Finish == nil {
		return restored, nil
	}
	return restored, config.Finish(ctx, client)
}

// leaveOut counts a key that hung on a lease: its process, or its time, is over.
func (r *Restored) leaveOut(k string) {
	switch {
	case strings.HasPrefix(k, sessionsPrefix):
		r.Sessions++
	case strings.HasPrefix(k, vmsPrefix):
		r.Presences++
	case strings.HasPrefix(k, "ca/tokens/"):
		r.Tokens++
	default:
		r.Others++
	}
}
