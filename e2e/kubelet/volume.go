// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// volumes are the volumes of one pod, below one folder.
type volumes struct {
	dir     string
	pod     func() *corev1.Pod // the newest version
	known   facts
	objects objects
	tokens  *tokens
	paths   map[string]string  // by volume name
	written map[string]payload // what the rendered ones show
	mounted []string           // to be unmounted
}

// setUp makes all volumes. It may be called again after an error.
func (v *volumes) setUp(ctx context.Context) error {
	if v.paths == nil {
		v.paths, v.written = map[string]string{}, map[string]payload{}
	}
	pod := v.pod()
	for i := range pod.Spec.Volumes {
		volume := &pod.Spec.Volumes[i]
		if _, done := v.paths[volume.Name]; done {
			continue
		}
		path, err := v.make(ctx, pod, volume)
		if err != nil {
			return fmt.Errorf("volume %s: %w", volume.Name, err)
		}
		v.paths[volume.Name] = path
	}
	return nil
}

// make makes one volume and returns its folder or file.
func (v *volumes) make(ctx context.Context, pod *corev1.Pod, volume *corev1.Volume) (string, error) {
	path := filepath.Join(v.dir, volume.Name)
	switch {
	case volume.EmptyDir != nil:
		return path, v.makeEmpty(pod, volume.EmptyDir, path)
	case volume.HostPath != nil:
		return volume.HostPath.Path, makeHostPath(volume.HostPath)
	case isRendered(volume):
		return path, v.render(ctx, pod, volume, path)
	}
	return "", errors.New("of a kind that the test bed does not support (it has emptyDir, configMap, secret, downwardAPI, projected, hostPath)")
}

// makeEmpty makes an emptyDir: a tmpfs if it is limited or asks for memory.
func (v *volumes) makeEmpty(pod *corev1.Pod, empty *corev1.EmptyDirVolumeSource, path string) error {
	if err := os.MkdirAll(path, 0o777); err != nil {
		return err
	}
	if empty.Medium == corev1.StorageMediumMemory || empty.SizeLimit != nil {
		options := "mode=0777"
		if empty.SizeLimit != nil {
			options += fmt.Sprintf(",size=%d", empty.SizeLimit.Value())
		}
		if err := unix.Mount("emptydir", path, "tmpfs", 0, options); err != nil {
			return fmt.Errorf("tmpfs: %w", err)
		}
		v.mounted = append(v.mounted, path)
	}
	mode := fs.FileMode(0o777)
	if group := fsGroup(pod); group >= 0 {
		mode |= fs.ModeSetgid
		if err := os.Chown(path, -1, group); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode)
}

func makeHostPath(host *corev1.HostPathVolumeSource) error {
	if host.Type != nil && *host.Type == corev1.HostPathDirectoryOrCreate {
		return os.MkdirAll(host.Path, 0o755)
	}
	_, err := os.Stat(host.Path)
	return err
}

func isRendered(volume *corev1.Volume) bool {
	return volume.ConfigMap != nil || volume.Secret != nil || volume.DownwardAPI != nil || volume.Projected != nil
}

// render writes a volume whose content comes from the API, if it changed.
func (v *volumes) render(ctx context.Context, pod *corev1.Pod, volume *corev1.Volume, path string) error {
	content, err := v.content(ctx, pod, volume)
	if err != nil {
		return err
	}
	if last, ok := v.written[volume.Name]; ok && last.equal(content) {
		return nil
	}
	if err := content.write(path, fsGroup(pod)); err != nil {
		return err
	}
	v.written[volume.Name] = content
	return nil
}

// refresh renders again all volumes that come from the API, and tells when at
// the latest it must be called again: a token will need renewal then.
// What cannot be read keeps its last content.
func (v *volumes) refresh(ctx context.Context) (time.Time, error) {
	pod := v.pod()
	var all error
	for i := range pod.Spec.Volumes {
		volume := &pod.Spec.Volumes[i]
		if path, made := v.paths[volume.Name]; made && isRendered(volume) {
			if err := v.render(ctx, pod, volume, path); err != nil {
				all = errors.Join(all, fmt.Errorf("volume %s: %w", volume.Name, err))
			}
		}
	}
	return v.tokens.renewal(), all
}

// tearDown removes all volumes.
func (v *volumes) tearDown() error {
	var all error
	for _, path := range v.mounted {
		all = errors.Join(all, unix.Unmount(path, unix.MNT_DETACH))
	}
	return errors.Join(all, os.RemoveAll(v.dir))
}

// mounts lists what a container's volumeMounts bind.
func (v *volumes) mounts(c *corev1.Container, env environment) ([]bindMount, error) {
	var list []bindMount
	for _, m := range c.VolumeMounts {
		source, ok := v.paths[m.Name]
		if !ok {
			return nil, fmt.Errorf("container %s: volume %q does not exist", c.Name, m.Name)
		}
		sub := m.SubPath
		if m.SubPathExpr != "" {
			sub = expand(m.SubPathExpr, env.lookup)
		}
		if sub != "" {
			var err error
			if source, err = subPath(source, sub); err != nil {
				return nil, fmt.Errorf("container %s: volume %s: %w", c.Name, m.Name, err)
			}
		}
		list = append(list, bindMount{Source: source, Target: filepath.Join("/", m.MountPath), ReadOnly: m.ReadOnly})
	}
	return list, nil
}

// subPath finds a file or folder inside a volume; a missing folder is made.
func subPath(volume, sub string) (string, error) {
	if !filepath.IsLocal(sub) {
		return "", fmt.Errorf("subPath %q: must stay inside the volume", sub)
	}
	path := filepath.Join(volume, sub)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(path, 0o777); err != nil {
			return "", err
		}
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	root, err := filepath.EvalSymlinks(volume)
	if err != nil {
		return "", err
	}
	if resolved != root && !strings.HasPrefix(resolved, root+"/") {
		return "", fmt.Errorf("subPath %q: leads out of the volume", sub)
	}
	return resolved, nil
}

// fsGroup gives the group that owns the pod's volumes, -1 for none.
func fsGroup(pod *corev1.Pod) int {
	if s := pod.Spec.SecurityContext; s != nil && s.FSGroup != nil {
		return int(*s.FSGroup)
	}
	return -1
}
