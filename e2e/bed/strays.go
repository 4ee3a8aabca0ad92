// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// A stray is a process found by the namespace it runs in.
type stray struct {
	pid     int
	command string
}

// String names the process by number and command line.
func (s stray) String() string { return fmt.Sprintf("%d (%s)", s.pid, s.command) }

// processesIn finds the processes whose namespace of the kind ("net", "pid",
// "mnt") is one of the spaces, which are written as the kernel does
// ("net:[4026532000]"). Zombies have no namespaces and are not found, and this
// process, whose threads go everywhere, never is.
func processesIn(kind string, spaces map[string]bool) []stray {
	links, err := filepath.Glob("/proc/[0-9]*/ns/" + kind)
	if err != nil {
		return nil
	}
	var found []stray
	for _, link := range links {
		space, err := os.Readlink(link)
		if err != nil || !spaces[space] {
			continue // ended meanwhile, or elsewhere
		}
		dir := filepath.Dir(filepath.Dir(link))
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		command, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		found = append(found, stray{pid, string(bytes.TrimSpace(bytes.ReplaceAll(command, []byte{0}, []byte{' '})))})
	}
	return found
}
