// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"os"
	"path/filepath"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Operate runs meshd's own commands, backup and restore say, on the replica's host and
// with its data directory, and returns what they print.
func (c *Control) Operate(ctx context.Context, args ...string) (string, error) {
	out, err := c.Host.Run(ctx, bed.Command{Name: "operate", Path: c.program, Args: append(args, "--data-dir", c.dataDir)})
	return string(out), err
}

// Lose removes everything in the data directory but the sealing key, of which a copy was
// kept elsewhere, as the documentation asks. The replica must have ended.
func (c *Control) Lose() error {
	entries, err := os.ReadDir(c.dataDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "sealing.key" {
			continue
		}
		if err := os.RemoveAll(filepath.Join(c.dataDir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
