// SPDX-License-Identifier: Apache-2.0

// Package cache says which outside programs the test bed runs, in which
// versions, and where they lie on disk. It is the one thing that the program
// which fetches and builds them (e2e/prepare) and the bed that starts them
// (e2e/bed) have in common, and it imports nothing but the standard library,
// so that preparing a fresh machine begins at once.
package cache

import (
	"fmt"
	"os"
	"path/filepath"
)

// The versions of the outside programs. A change here makes the next
// preparation build into a new folder and leaves the old one alone.
const (
	KubernetesVersion = "1.36.3"
	EtcdVersion       = "3.7.3"
	EnvoyVersion      = "1.40.0"
)

// Dir returns the folder of everything prepared: $ISTHMUS_CACHE, or the folder
// isthmus in the user's cache folder.
func Dir() (string, error) {
	if dir := os.Getenv("ISTHMUS_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find a cache folder: %w; set ISTHMUS_CACHE to a folder that may be written", err)
	}
	return filepath.Join(dir, "isthmus"), nil
}

// Binaries are the absolute paths of the outside programs.
type Binaries struct {
	APIServer         string // kube-apiserver
	ControllerManager string // kube-controller-manager
	Kubectl           string
	Etcd              string
	Envoy             string // $ENVOY where that is set
}

// At returns the paths of the programs below the cache folder dir, whether
// they exist or not.
func At(dir string) Binaries {
	kubernetes := filepath.Join(dir, "kubernetes-v"+KubernetesVersion)
	b := Binaries{
		APIServer:         filepath.Join(kubernetes, "kube-apiserver"),
		ControllerManager: filepath.Join(kubernetes, "kube-controller-manager"),
		Kubectl:           filepath.Join(kubernetes, "kubectl"),
		Etcd:              filepath.Join(dir, "etcd-v"+EtcdVersion, "etcd"),
		Envoy:             filepath.Join(dir, "envoy-"+EnvoyVersion, "envoy"),
	}
	if envoy := os.Getenv("ENVOY"); envoy != "" {
		b.Envoy = envoy
	}
	return b
}

// Find returns the paths of the prepared programs. Its error names the first
// one that is missing and the command that makes it.
func Find() (Binaries, error) {
	dir, err := Dir()
	if err != nil {
		return Binaries{}, err
	}
	b := At(dir)
	for _, path := range []string{b.APIServer, b.ControllerManager, b.Kubectl, b.Etcd, b.Envoy} {
		if info, err := os.Stat(path); err != nil || info.Mode()&0o111 == 0 {
			return Binaries{}, fmt.Errorf("program %s is missing or cannot be executed: make it with `go run ./e2e/prepare`", path)
		}
	}
	return b, nil
}
