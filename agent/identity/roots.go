// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"context"
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
	k.wakeLocked()
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
