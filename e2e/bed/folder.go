// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// folderLock is the file in a Folder that its process keeps locked.
const folderLock = ".lock"

// A Folder lies in the machine's folder for temporary files, where programs outside the
// bed find it. Its process locks it, so that others see when it was left behind by one
// that was killed.
type Folder struct {
	Path string
	lock *os.File
}

// NewFolder makes a folder in dir whose name begins with prefix, and removes those of that
// name whose processes are dead.
func NewFolder(dir, prefix string) (*Folder, error) {
	abandoned, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
	if err != nil {
		return nil, err
	}
	for _, path := range abandoned {
		if f, err := takeFolder(path); err == nil {
			_ = f.Remove() // it disturbs nobody, and the next one tries again
		}
	}
	path, err := os.MkdirTemp(dir, prefix)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(path, folderLock), nil, 0o600); err != nil {
		return nil, errors.Join(err, os.RemoveAll(path))
	}
	return takeFolder(path)
}

// takeFolder locks a folder that nobody else has locked.
func takeFolder(path string) (*Folder, error) {
	lock, err := os.OpenFile(filepath.Join(path, folderLock), os.O_RDWR, 0)
	if err != nil {
		return nil, err // it is just being made, or something else
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return &Folder{Path: path, lock: lock}, nil
}

// Remove removes the folder with all that is in it.
func (f *Folder) Remove() error {
	return errors.Join(os.RemoveAll(f.Path), f.lock.Close())
}

// abandonedFolder reports whether path is the Folder of a process that is dead.
func abandonedFolder(path string) bool {
	f, err := takeFolder(path)
	if err == nil {
		f.lock.Close()
	}
	return err == nil
}
