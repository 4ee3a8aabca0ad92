// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrInUse: another process has the embedded etcd, and does not let us in.
var ErrInUse = errors.New("in use")

// answerWithin is how long tools wait for an etcd before they say that it is away.
const answerWithin = 5 * time.Second

// OpenLocal opens the state for a tool: an external etcd, or the one in a data directory,
// through the meshd that runs there or, where none does, directly.
func OpenLocal(ctx context.Context, config DatabaseConfig) (*Database, error) {
	if len(config.Endpoints) == 0 {
		dir := filepath.Join(config.DataDir, "etcd")
		free, err := unlocked(filepath.Join(dir, "member", "snap", "db"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: data directory %s has no etcd", ErrNothing, config.DataDir)
		}
		if err != nil {
			return nil, fmt.Errorf("data directory: %w", err)
		}
		if free {
			return start(ctx, config)
		}
		socket, err := filepath.Abs(filepath.Join(config.DataDir, SocketName))
		if err == nil {
			_, err = os.Stat(socket)
		}
		if err != nil {
			return nil, fmt.Errorf("data directory %s is %w, and there is no %s to ask (its path may be too long for a socket): stop meshd first", config.DataDir, ErrInUse, SocketName)
		}
		config.Endpoints, config.TLS = []string{"unix://" + socket}, nil
	}
	db, err := connect(config)
	if err != nil {
		return nil, err
	}
	if err := answers(ctx, db, config); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// answers asks etcd anything at all.
func answers(ctx context.Context, db *Database, config DatabaseConfig) error {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	if _, err := db.client.Get(ctx, "answers", clientv3.WithCountOnly()); err != nil {
		return fmt.Errorf("etcd %v does not answer: %w", config.Endpoints, err)
	}
	return nil
}

// unlocked tells whether no process has the database file of an embedded etcd open.
func unlocked(path string) (bool, error) {
	file, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer file.Close()
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}
