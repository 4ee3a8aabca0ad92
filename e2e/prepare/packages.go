// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A requirement is something the machine must offer, found by a file that is
// there when it does, and the Debian package that brings it.
type requirement struct {
	file   string // a program's name, or an absolute path
	debian string
	why    string
}

// requirements is the whole list of Debian packages of the demo and the tests.
// Packages of priority "required" (util-linux, coreutils) are not named.
var requirements = []requirement{
	{"nft", "nftables", "routers of the bed, traffic redirection of the agent"},
	{"ip", "iproute2", "looking into network namespaces"},
	{"tcpdump", "tcpdump", "captures on the transit network"},
	{"socat", "socat", "small servers and clients in scripts"},
	{"openssl", "openssl", "the VM script checks its certificate authority with it"},
	{"curl", "curl", "the VM script, and calls in the demo"},
	{"ps", "procps", "looking at processes in scripts"},
	{"shellcheck", "shellcheck", "the VM script is clean"},
	{"busybox", "busybox", "the VM script runs in its shell too"},
	{"systemd-analyze", "systemd", "the VM's unit is verified"},
	{"gcc", "gcc", "the race detector"},
	{"/usr/include/stdlib.h", "libc6-dev", "the race detector"},
	{"/etc/ssl/certs/ca-certificates.crt", "ca-certificates", "downloads"},
}

// packages installs the Debian packages that are missing, or names them with
// the command that does.
func packages(ctx context.Context, work *progress) error {
	return install(ctx, work, missing(requirements))
}

// missing returns the packages of the requirements that the machine does not
// meet, each once.
func missing(list []requirement) []string {
	var names []string
	for _, r := range list {
		if !present(r.file) && !slices.Contains(names, r.debian) {
			names = append(names, r.debian)
		}
	}
	return names
}

// present looks for a program also where administrators' programs are, which
// an ordinary user's PATH does not name.
func present(file string) bool {
	if filepath.IsAbs(file) {
		_, err := os.Stat(file)
		return err == nil
	}
	if _, err := exec.LookPath(file); err == nil {
		return true
	}
	return present(filepath.Join("/usr/sbin", file))
}

// install runs apt-get for the packages where this process may.
func install(ctx context.Context, work *progress, names []string) (err error) {
	if len(names) == 0 {
		return nil
	}
	list := strings.Join(names, " ")
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("missing from this machine: %s (names of Debian packages): install what provides them with this system's package manager", list)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing from this machine: %s: install with `sudo apt-get install --yes --no-install-recommends %s`", list, list)
	}
	done := work.phase("install Debian packages " + list)
	defer func() { done(err) }()
	arguments := append([]string{"install", "--yes", "--no-install-recommends"}, names...)
	if first := aptGet(ctx, arguments...); first != nil {
		// Most often the lists are older than the packages they name.
		if err := errors.Join(aptGet(ctx, "update"), aptGet(ctx, arguments...)); err != nil {
			return fmt.Errorf("install %s: %w: try `apt-get update && apt-get install --yes --no-install-recommends %s`", list, err, list)
		}
	}
	return nil
}

func aptGet(ctx context.Context, args ...string) error {
	return command(ctx, "", []string{"DEBIAN_FRONTEND=noninteractive"}, "apt-get", append([]string{"--quiet=2"}, args...)...)
}
