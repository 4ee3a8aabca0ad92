// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// programsVar names the folder of our own programs for the inside of the bed.
const programsVar = "ISTHMUS_PROGRAMS"

// Programs is the folder that holds meshd, mesh, mesh-agent and echo.
type Programs string

// Path of one of them.
func (p Programs) Path(name string) string { return filepath.Join(string(p), name) }

// BuildPrograms builds our programs once for a test run, into a folder that goes with the
// returned function, and leaves its name where FindPrograms looks. It is called before the
// bed is entered, where nothing more can be fetched. Inside it does nothing.
func BuildPrograms(ctx context.Context) (remove func(), err error) {
	if os.Getenv(programsVar) != "" {
		return func() {}, nil
	}
	sweepPrograms()
	dir, err := os.MkdirTemp("", programsPrefix)
	if err != nil {
		return nil, err
	}
	used, err := holdFolder(dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	remove = func() { os.RemoveAll(dir); used.Close() }
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", dir+"/",
		module+"/cmd/meshd", module+"/cmd/mesh", module+"/cmd/mesh-agent", module+"/e2e/echo")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		remove()
		return nil, fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return remove, os.Setenv(programsVar, dir)
}

// programsPrefix begins the names of the folders of BuildPrograms. The bed's own watch over
// what is left takes no notice of them: they are made and removed outside of it.
const programsPrefix = "programs-of-isthmus-"

// holdFolder locks a folder for as long as this process lives and the file is open.
func holdFolder(dir string) (*os.File, error) {
	file, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// sweepPrograms removes the folders of test runs that were killed: nobody locks them.
func sweepPrograms() {
	folders, _ := filepath.Glob(filepath.Join(os.TempDir(), programsPrefix+"*")) // the pattern is good
	for _, dir := range folders {
		if _, err := os.Stat(filepath.Join(dir, ".lock")); err != nil {
			continue // just being made
		}
		if file, err := holdFolder(dir); err == nil {
			os.RemoveAll(dir)
			file.Close()
		}
	}
}

const module = "github.com/isthmus-mesh/isthmus"

// FindPrograms returns the programs that BuildPrograms made, else those beside the
// running one (bin/, as `make build` leaves them).
func FindPrograms() (Programs, error) {
	dir := os.Getenv(programsVar)
	if dir == "" {
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		dir = filepath.Dir(self)
	}
	for _, name := range []string{"meshd", "mesh", "mesh-agent", "echo"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("program %s is not in %s: run `make build`", name, dir)
		}
	}
	return Programs(dir), nil
}
