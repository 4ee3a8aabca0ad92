// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// payload is the content of a rendered volume: relative slash paths to files.
type payload map[string]payloadFile

type payloadFile struct {
	Data []byte
	Mode fs.FileMode
	UID  int
}

// add puts a file in; the path must stay inside the volume.
func (p payload) add(name string, file payloadFile) error {
	if !filepath.IsLocal(name) || path.Clean(name) != name || strings.HasPrefix(name, "..") {
		return fmt.Errorf("path %q: must be relative, clean and inside the volume", name)
	}
	p[name] = file
	return nil
}

func (p payload) equal(other payload) bool {
	return maps.EqualFunc(p, other, func(a, b payloadFile) bool {
		return a.Mode == b.Mode && a.UID == b.UID && bytes.Equal(a.Data, b.Data)
	})
}

// Names inside a rendered volume, the same that real kubelets use: files are
// links into dataLink, which is switched to a new folder in one step.
const (
	dataLink = "..data"
	newLink  = "..data_tmp"
)

// write makes dir show exactly p. A reader sees the old or the new content of
// all files, never a mixture. group < 0 leaves the group alone.
func (p payload) write(dir string, group int) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	fresh, err := os.MkdirTemp(dir, "..version-")
	if err != nil {
		return err
	}
	if err := p.fill(fresh, group); err != nil {
		return errors.Join(err, os.RemoveAll(fresh))
	}
	old, _ := os.Readlink(filepath.Join(dir, dataLink))
	if err := os.Symlink(filepath.Base(fresh), filepath.Join(dir, newLink)); err != nil {
		return errors.Join(err, os.RemoveAll(fresh))
	}
	if err := os.Rename(filepath.Join(dir, newLink), filepath.Join(dir, dataLink)); err != nil {
		return err
	}
	if err := p.link(dir); err != nil {
		return err
	}
	if old == "" {
		return nil
	}
	return os.RemoveAll(filepath.Join(dir, old))
}

// fill writes the files below dir.
func (p payload) fill(dir string, group int) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	for name, file := range p {
		target := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(target, file.Data, 0o600); err != nil {
			return err
		}
		if err := os.Chown(target, file.UID, group); err != nil {
			return err
		}
		mode := file.Mode
		if group >= 0 {
			mode |= (mode & 0o400) >> 3 // the volume's group may read what its owner may
		}
		if err := os.Chmod(target, mode); err != nil {
			return err
		}
	}
	return nil
}

// link makes the volume's visible names: links for what p has, nothing else.
func (p payload) link(dir string) error {
	want := map[string]bool{}
	for name := range p {
		top, _, _ := strings.Cut(name, "/")
		want[top] = true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := entry.Name()
		if strings.HasPrefix(name, "..") || want[name] {
			delete(want, name)
			continue
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	for name := range want {
		if err := os.Symlink(filepath.Join(dataLink, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}
