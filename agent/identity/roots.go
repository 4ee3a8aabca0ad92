// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"context"
	"errors"
	"os"
	"time"
)

func (k *Keeper) watchRoots(ctx context.Context) {
	tick := time.NewTicker(rootsInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			k.readRoots()
		}
	}
}

// readRoots takes over the file's roots if they changed. A file that cannot be
// read, or holds nothing, leaves the former roots in place: losing trust in
// everybody is never what a missing file means.
func (k *Keeper) readRoots() {
	if k.RootsFile == "" {
		return
	}
	data, err := os.ReadFile(k.RootsFile)
	if err != nil {
		k.Log.Warn("root certificates not read", "file", k.RootsFile, "error", err)
		return
	}
	roots := Bundle(data)
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(roots) == 0 || bytes.Equal(roots, k.fileRoot) {
		return
	}
	k.fileRoot = roots
	if k.told.roots != nil {
		k.told.file = roots
	}
	k.wakeLocked()
}

// toldRoots is what meshd tells on its own, and what has come from elsewhere
// since: what came before is replaced by it.
type toldRoots struct {
	sequence     uint64
	roots        []byte // nil before the first
	answer, file []byte
}

// Trust takes over the whole bundle that meshd has told. It returns false for
// one that is older than what is there: a meshd that is behind must not undo
// what another one has told. A bundle without a certificate is an error.
func (k *Keeper) Trust(sequence uint64, roots []byte) (bool, error) {
	bundle := Bundle(roots)
	if len(bundle) == 0 {
		return false, errors.New("the bundle has no root certificate")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if sequence < k.told.sequence {
		return false, nil
	}
	if sequence == k.told.sequence && bytes.Equal(bundle, k.told.roots) {
		return true, nil
	}
	k.told = toldRoots{sequence: sequence, roots: bundle}
	k.wakeLocked()
	return true, nil
}

func (k *Keeper) readFirstRoots() {
	if k.FirstRootsFile == "" {
		return
	}
	data, err := os.ReadFile(k.FirstRootsFile)
	if err != nil {
		k.Log.Warn("root certificates not read", "file", k.FirstRootsFile, "error", err)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.firstRoot = Bundle(data)
}
