// SPDX-License-Identifier: Apache-2.0

package bed_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// victimVar makes TestVictim build a world and wait for its end.
const victimVar = "ISTHMUS_BED_TEST_VICTIM"

// TestVictim is the program that TestNothingOutlivesTheBed starts and ends.
// By itself it has nothing to do.
func TestVictim(t *testing.T) {
	how := os.Getenv(victimVar)
	if how == "" {
		return
	}
	w := must(bed.NewWorld(bed.WorldConfig{}))(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	vm := must(w.VM("vm", bed.VMConfig{Network: n1}))(t)
	must(vm.Run(t.Context(), "setsid sleep 3001 </dev/null >/dev/null 2>&1 &"))(t)
	host := must(w.Host("host"))(t)
	must(host.Start(bed.Command{Path: "sleep", Args: []string{"3002"}}))(t)
	must(host.Shell(t.Context(), "nohup setsid sleep 3003 </dev/null >/dev/null 2>&1 &"))(t)
	must(os.CreateTemp("", "isthmus-victim-"))(t)
	fmt.Printf("victim %d\n", os.Getpid())
	os.Stdin.Read(make([]byte, 1)) // until the other one has had a look
	switch how {
	case "panic":
		panic("the story ends here")
	case "exit":
		os.Exit(7)
	}
	select {}
}

// TestNothingOutlivesTheBed starts a bed inside this one, where nobody else is,
// ends it in every way there is, and looks for what it left.
func TestNothingOutlivesTheBed(t *testing.T) {
	for _, story := range []struct {
		how    string
		outer  syscall.Signal // to the program that a person started
		inside syscall.Signal // to the program in the bed
		code   int            // what the program ends with; -1: by the signal
	}{
		{how: "panic", code: 2},
		{how: "exit", code: 7},
		{how: "kill the inside", inside: syscall.SIGKILL, code: 128 + 9},
		{how: "kill the outside", outer: syscall.SIGKILL, code: -1},
		{how: "Ctrl-C", outer: syscall.SIGINT, code: 128 + 2},
		{how: "terminate", outer: syscall.SIGTERM, code: 128 + 15},
	} {
		t.Run(story.how, func(t *testing.T) {
			before := surroundings(t)
			cmd, stdin, inside := startVictim(t, story.how)
			eventually(t, "its processes are there", func() error {
				if among := sleepers(t); len(among) < 3 {
					return fmt.Errorf("only %q", among)
				}
				return nil
			})
			start := time.Now()
			if story.inside != 0 {
				syscall.Kill(inside, story.inside)
			}
			if story.outer != 0 {
				cmd.Process.Signal(story.outer)
			}
			if story.inside == 0 && story.outer == 0 {
				fmt.Fprint(stdin, ".")
			}
			err := cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != story.code {
				t.Errorf("it ended with %v, want code %d", err, story.code)
			}
			eventually(t, "nothing is left", func() error {
				if left := sleepers(t); len(left) > 0 {
					return fmt.Errorf("processes %v", left)
				}
				if after := surroundings(t); after != before {
					return fmt.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
				return nil
			})
			t.Logf("gone %s after its end", time.Since(start).Round(time.Millisecond))
		})
	}
}

// startVictim starts TestVictim in a bed of its own and returns when its world
// is there, with the process in the bed as this process sees it.
func startVictim(t *testing.T, how string) (*exec.Cmd, io.Writer, int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestVictim$", "-test.v")
	cmd.Env = append(os.Environ(), victimVar+"="+how, "ISTHMUS_BED_ANOTHER=1")
	stdin, output := must(cmd.StdinPipe())(t), must(cmd.StdoutPipe())(t)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "victim ") {
			return cmd, stdin, child(t, child(t, cmd.Process.Pid))
		}
	}
	cmd.Wait()
	t.Fatalf("the victim ended before its world was there: %s", stderr.String())
	return nil, nil, 0
}

// child returns the first child of a process.
func child(t *testing.T, pid int) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		text, _ := os.ReadFile(task)
		if fields := strings.Fields(string(text)); len(fields) > 0 {
			return must(strconv.Atoi(fields[0]))(t)
		}
	}
	return 0
}

// sleepers lists the processes that a victim started.
func sleepers(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, path := range paths {
		text, _ := os.ReadFile(path)
		if bytes.HasPrefix(text, []byte("sleep\x00300")) {
			found = append(found, string(bytes.ReplaceAll(text, []byte{0}, []byte{' '})))
		}
	}
	return found
}

// surroundings lists the interfaces, mounts and files around a victim.
func surroundings(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, file := range []string{"/proc/thread-self/mountinfo", "/proc/thread-self/net/dev", "/proc/thread-self/net/route"} {
		text := must(os.ReadFile(file))(t)
		for line := range strings.Lines(string(text)) {
			name, _, _ := strings.Cut(line, ":") // without the counters
			b.WriteString(strings.TrimSpace(name) + "\n")
		}
	}
	for _, pattern := range []string{"/run/*", "/run/netns/*", "/run/isthmus/*", os.TempDir() + "/*"} {
		for _, path := range must(filepath.Glob(pattern))(t) {
			b.WriteString(path + "\n")
		}
	}
	return b.String()
}
