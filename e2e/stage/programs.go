// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
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
	folder, err := bed.NewFolder(os.TempDir(), "programs-of-isthmus-")
	if err != nil {
		return nil, err
	}
	dir := folder.Path
	remove = func() { folder.Remove() }
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", dir+"/",
		module+"/cmd/meshd", module+"/cmd/mesh", module+"/cmd/mesh-agent", module+"/e2e/echo")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		remove()
		return nil, fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return remove, os.Setenv(programsVar, dir)
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
