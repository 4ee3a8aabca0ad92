// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Image maps an image name to a local program.
type Image struct {
	// Path is the program. It stands for the image's ENTRYPOINT; `command` of a
	// container replaces it. Empty means that the container must give a command.
	Path string
	// Args stand for the image's CMD; `args` or `command` of a container replace them.
	Args []string
	// Env are NAME=value that a container's own variables override.
	Env []string
	// WorkingDir is where the program starts; empty means "/".
	WorkingDir string
	// User is as whom it runs unless a security context says otherwise; zero is root.
	User int64
	// Files are further files or folders of the machine that must be visible
	// inside under their own path; needed only for those below /run, /dev or on a
	// memory file system, since containers see the rest of the machine's disk.
	Files []string
}

// image finds the program for an image name: as given, else without digest and
// tag, else by the last element of its path.
func (k *Kubelet) image(name string) (Image, error) {
	bare, _, _ := strings.Cut(name, "@")
	if i := strings.LastIndexByte(bare, ':'); i > strings.LastIndexByte(bare, '/') {
		bare = bare[:i]
	}
	for _, try := range []string{name, bare, bare[strings.LastIndexByte(bare, '/')+1:]} {
		if image, ok := k.Images[try]; ok {
			return image, nil
		}
	}
	return Image{}, fmt.Errorf("image %q: no local program is mapped to it (there are: %s)", name, strings.Join(sortedKeys(k.Images), ", "))
}

// prepare implements engine.
func (w *worker) prepare(ctx context.Context, c *corev1.Container) (shimSpec, error) {
	pod := w.newest()
	image, err := w.k.image(c.Image)
	if err != nil {
		return shimSpec{}, err
	}
	id, err := identityOf(pod, imageUser(c, pod, image))
	if err != nil {
		return shimSpec{}, err
	}
	env, err := w.environment(ctx, pod, c, image)
	if err != nil {
		return shimSpec{}, err
	}
	args := commandLine(c, image, env)
	if len(args) == 0 {
		return shimSpec{}, fmt.Errorf("container %s: image %q has no program of its own: set command", c.Name, c.Image)
	}
	mounts, err := w.volumes.mounts(c, env)
	if err != nil {
		return shimSpec{}, err
	}
	for _, name := range etcFiles {
		mounts = append(mounts, bindMount{Source: filepath.Join(w.dir, "etc", name), Target: "/etc/" + name})
	}
	scratch := filepath.Join(w.dir, "root-"+c.Name)
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		return shimSpec{}, err
	}
	return shimSpec{
		NetNS: w.namespace.Path(), Hostname: hostName(pod), Scratch: scratch,
		Visible: visible(image, args[0]), Mounts: mounts, Identity: id,
		WorkingDir: firstOf(c.WorkingDir, image.WorkingDir, "/"), Args: args, Env: env.list(),
	}, nil
}

// imageUser gives the container with the image's user where nobody names one.
func imageUser(c *corev1.Container, pod *corev1.Pod, image Image) *corev1.Container {
	named := pod.Spec.SecurityContext != nil && pod.Spec.SecurityContext.RunAsUser != nil ||
		c.SecurityContext != nil && c.SecurityContext.RunAsUser != nil
	if named || image.User == 0 {
		return c
	}
	c = c.DeepCopy()
	if c.SecurityContext == nil {
		c.SecurityContext = &corev1.SecurityContext{}
	}
	c.SecurityContext.RunAsUser = &image.User
	if c.SecurityContext.RunAsGroup == nil {
		c.SecurityContext.RunAsGroup = &image.User
	}
	return c
}

// environment computes a container's variables: the usual ones, the image's, the bed's, its own.
func (w *worker) environment(ctx context.Context, pod *corev1.Pod, c *corev1.Container, image Image) (environment, error) {
	var env environment
	env.set("PATH", defaultPath)
	env.set("HOSTNAME", hostName(pod))
	env.set("HOME", "/root")
	if w.k.APIServer.IsValid() {
		env.set("KUBERNETES_SERVICE_HOST", w.k.APIServer.Addr().String())
		env.set("KUBERNETES_SERVICE_PORT", fmt.Sprint(w.k.APIServer.Port()))
	}
	for _, entry := range slices.Concat(image.Env, w.k.Env) {
		name, value, _ := strings.Cut(entry, "=")
		env.set(name, value)
	}
	return env, env.addEnv(ctx, pod, c, w.facts(), w.k)
}

// commandLine combines image and container by the rules of `command` and `args`.
func commandLine(c *corev1.Container, image Image, env environment) []string {
	command, args := c.Command, c.Args
	if len(command) == 0 {
		if image.Path != "" {
			command = []string{image.Path}
		}
		if len(args) == 0 {
			args = image.Args
			return slices.Concat(command, args)
		}
	}
	var line []string
	for _, word := range slices.Concat(command, args) {
		line = append(line, expand(word, env.lookup))
	}
	return line
}

// visible lists what must be reachable inside under its own path.
func visible(image Image, program string) []string {
	paths := slices.Clone(image.Files)
	for _, path := range []string{image.Path, program} {
		if _, err := os.Stat(path); filepath.IsAbs(path) && err == nil {
			paths = append(paths, path)
		}
	}
	return paths
}

func firstOf(choices ...string) string {
	for _, choice := range choices {
		if choice != "" {
			return choice
		}
	}
	return ""
}

// start implements engine.
func (w *worker) start(spec shimSpec, output *containerLog) (*process, error) {
	return startProcess(w.k.Shim, spec, output)
}
