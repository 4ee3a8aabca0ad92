// SPDX-License-Identifier: Apache-2.0

package bed_test

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

func TestProcessIsKilledPausedAndStartedAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	host := must(w.Host("host"))(t)
	p := must(host.Start(bed.Command{Name: "clock", Path: "/bin/sh", Args: []string{"-c", "echo up; exec sleep 1000"}}))(t)
	state := func() string {
		text := must(os.ReadFile("/proc/" + strconv.Itoa(p.Pid()) + "/stat"))(t)
		return strings.Fields(string(text))[2]
	}
	eventually(t, "it says so", func() error {
		if p.Log() != "up\n" {
			return errors.New(p.Log())
		}
		return nil
	})
	if err := p.Pause(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "paused", func() error { return unless(state() == "T", state()) })
	if err := p.Resume(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "resumed", func() error { return unless(state() == "S", state()) })
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if p.Running() || p.Err() == nil {
		t.Errorf("after SIGKILL: running %v, error %v", p.Running(), p.Err())
	}
	if err := p.Pause(); !errors.Is(err, bed.ErrNotRunning) {
		t.Errorf("pausing a dead process: %v, want ErrNotRunning", err)
	}
	if err := errors.Join(p.Kill(), p.Stop(time.Second), p.Restart()); err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err == nil {
		t.Error("a running process was started once more")
	}
	if err := p.Stop(5 * time.Second); err != nil || p.Running() {
		t.Errorf("stop: %v", err)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	host := must(w.Host("host"))(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := host.Shell(ctx, "echo begun; sleep 1000")
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "begun") {
		t.Errorf("got %v, want the deadline and what was printed", err)
	}
	if _, err := host.Shell(t.Context(), "echo broken >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "exit status 3: broken") {
		t.Errorf("got %v, want the exit status and what was printed", err)
	}
	output := must(host.Shell(t.Context(), "env | cut -d= -f1 | sort | tr '\\n' ' '"))(t)
	if want := "HOME LANG PATH PWD TERM TMPDIR "; string(output) != want {
		t.Errorf("environment is %q, want %q: nothing of the machine's", output, want)
	}
}

func TestCloseEndsStrays(t *testing.T) {
	t.Parallel()
	w := must(bed.NewWorld(bed.WorldConfig{}))(t)
	host := must(w.Host("host"))(t)
	output := must(host.Shell(t.Context(), "setsid sleep 4000 </dev/null >/dev/null 2>&1 & echo $!"))(t)
	pid := must(strconv.Atoi(strings.TrimSpace(string(output))))(t)
	if err := w.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	eventually(t, "the stray is gone", func() error {
		return unless(errors.Is(syscall.Kill(pid, 0), syscall.ESRCH), "it is there")
	})
	if _, err := os.Stat(host.Path()); err == nil {
		t.Errorf("%s is left", host.Path())
	}
	if err := w.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	if _, err := w.Host("late"); err == nil {
		t.Error("a closed world takes another host")
	}
}

func unless(ok bool, otherwise string) error {
	if ok {
		return nil
	}
	return errors.New(otherwise)
}
