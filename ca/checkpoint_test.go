// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"pgregory.net/rapid"
)

// kept is one replica's log, whose heads are kept in a state.
type kept struct {
	path  string
	state *ca.Memory
	seal  *ca.FileSealer
	log   *ca.AuditLog
	*ca.Checkpoints
}

// open begins or continues the log, as a start of meshd does.
func (k *kept) open(t *testing.T) {
	t.Helper()
	k.log = openAudit(t, k.path)
	k.Checkpoints = &ca.Checkpoints{State: k.state, Sealer: k.seal, Replica: "meshd-0", Audit: k.log}
	t.Cleanup(func() { k.log.Close() })
}

func (k *kept) lines(t *testing.T, n int) {
	t.Helper()
	for range n {
		if err := k.log.Append(ca.AuditEntry{Event: ca.AuditIssued, Instance: "pod-1"}); err != nil {
			t.Fatal(err)
		}
	}
}

func (k *kept) mark(t *testing.T, want error) {
	t.Helper()
	if err := k.Mark(t.Context()); !errors.Is(err, want) {
		t.Fatalf("Mark = %v, want %v", err, want)
	}
}

func keptLog(t *testing.T) *kept {
	t.Helper()
	k := &kept{path: filepath.Join(t.TempDir(), "audit.jsonl"), state: new(ca.Memory), seal: sealer(t)}
	k.open(t)
	return k
}

// A36: whoever has the disk of a replica can write a new chain of hashes; not one that has the heads which were
// kept in etcd.
func TestAttackA36RewrittenAuditLog(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		forge func(t *testing.T, k *kept, text string) string
		found string // what the verifier says; empty: nothing is wrong
		mark  error  // what the next start of meshd makes of it
	}{
		"left alone": {func(_ *testing.T, _ *kept, text string) string { return text }, "", nil},
		"cut short": {func(_ *testing.T, _ *kept, text string) string {
			return strings.Join(strings.SplitAfter(text, "\n")[:3], "")
		}, "cut short", ca.ErrAuditChanged},
		"end edited":  {func(t *testing.T, k *kept, text string) string { return rewrite(t, k, text, 5) }, "rewritten", ca.ErrAuditChanged},
		"line edited": {func(_ *testing.T, _ *kept, text string) string { return strings.Replace(text, "pod-1", "pod-2", 1) }, "audit line 2", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := keptLog(t)
			k.lines(t, 9)
			k.mark(t, nil)
			if err := k.log.Close(); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(k.path)
			if err != nil {
				t.Fatal(err)
			}
			write(t, k.path, test.forge(t, k, string(text)))
			k.open(t)
			logs, err := k.List(t.Context())
			if err != nil || len(logs) != 1 || logs[0].Replica != "meshd-0" || logs[0].Log != k.log.ID() {
				t.Fatalf("kept %+v, %v", logs, err)
			}
			head, err := k.log.Verify(logs[0].Marks)
			if test.found == "" && (err != nil || head != k.log.Head()) {
				t.Errorf("Verify = %+v, %v", head, err)
			}
			if test.found != "" && (err == nil || !strings.Contains(err.Error(), test.found)) {
				t.Errorf("Verify = %v, want %q", err, test.found)
			}
			k.mark(t, test.mark)
			if !errors.Is(k.Err(), test.mark) {
				t.Errorf("Err = %v, want %v", k.Err(), test.mark)
			}
		})
	}
}

// rewrite makes a log with a whole chain that agrees with the first lines of text and goes on differently.
func rewrite(t *testing.T, k *kept, text string, keep int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "forged.jsonl")
	write(t, path, strings.Join(strings.SplitAfter(text, "\n")[:keep], ""))
	forged := openAudit(t, path)
	for range 20 {
		if err := forged.Append(ca.AuditEntry{Event: ca.AuditIssued, Instance: "harmless"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := forged.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.VerifyAudit(strings.NewReader(string(out))); err != nil {
		t.Fatalf("the forgery is no chain: %v", err)
	}
	return string(out)
}

// A replica that lost its disk begins a new log; what is known of the old one stays.
func TestCheckpointsOfSeveralLogs(t *testing.T) {
	t.Parallel()
	k := keptLog(t)
	k.lines(t, 3)
	k.mark(t, nil)
	before, err := k.state.Fetch(t.Context(), "meshd-0")
	if err != nil {
		t.Fatal(err)
	}
	k.mark(t, nil)
	if again, err := k.state.Fetch(t.Context(), "meshd-0"); err != nil || again.Version != before.Version {
		t.Error("written although the log did not move")
	}
	first := k.log.ID()
	for range 12 {
		k.path = filepath.Join(t.TempDir(), "audit.jsonl")
		k.open(t)
		k.mark(t, nil)
	}
	logs, err := k.List(t.Context())
	if err != nil || len(logs) != 8 || logs[7].Log != k.log.ID() || logs[7].Log == first {
		t.Errorf("%d logs, %v; want the last 8", len(logs), err)
	}
	e, err := k.state.Fetch(t.Context(), "meshd-0")
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range e.Value {
		if c == '3' { // any digit of a number or a hash
			e.Value[i] = '4'
			break
		}
	}
	if _, err := k.state.Replace(t.Context(), "meshd-0", e.Value, e.Version); err != nil {
		t.Fatal(err)
	}
	if _, err := k.List(t.Context()); err == nil {
		t.Error("heads that somebody else kept are believed")
	}
	if err := k.Mark(t.Context()); err == nil {
		t.Error("and replaced")
	}
}

// Marks get rarer with age, none is younger than it should be, and the first and the last are there.
func TestMarksAreThinned(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	rapid.Check(t, func(t *rapid.T) {
		var minutes []int
		at := 0
		for range rapid.IntRange(1, 300).Draw(t, "marks") {
			at += rapid.IntRange(1, 500).Draw(t, "pause")
			minutes = append(minutes, at)
		}
		left := ca.Thin(start, minutes)
		if len(left) > 22 || left[len(left)-1] != time.Duration(at)*time.Minute || left[0] != time.Duration(minutes[0])*time.Minute {
			t.Fatalf("of %d marks until %d minutes: %v", len(minutes), at, left)
		}
	})
}

// A disk that is full takes no line, not half of one; when there is room again the log goes on, with a whole chain.
// The limit is of a process, so another one has it.
func TestAuditLogOnAFullDisk(t *testing.T) {
	const child = "ISTHMUS_TEST_FULL_DISK"
	if path := os.Getenv(child); path != "" {
		fillDisk(t, path)
		return
	}
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^TestAuditLogOnAFullDisk$", "-test.v")
	cmd.Env = append(os.Environ(), child+"="+filepath.Join(t.TempDir(), "audit.jsonl"))
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("there is no /dev/full here")
	}
	if _, err := ca.OpenAudit("/dev/full", "meshd-0", nil); !errors.Is(err, syscall.ENOSPC) || !errors.Is(err, ca.ErrAudit) {
		t.Errorf("OpenAudit on a full disk = %v", err)
	}
}

func fillDisk(t *testing.T, path string) {
	t.Helper()
	signal.Ignore(syscall.SIGXFSZ)
	l := openAudit(t, path)
	limit := func(bytes uint64) {
		t.Helper()
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: bytes, Max: syscall.RLIM_INFINITY & (1<<63 - 1)}); err != nil {
			t.Fatal(err)
		}
	}
	limit(uint64(l.Head().Size) + 100) // less than a line
	for range 3 {
		if err := l.Append(ca.AuditEntry{Event: ca.AuditIssued}); !errors.Is(err, ca.ErrAudit) || !errors.Is(l.Err(), ca.ErrAudit) {
			t.Fatalf("Append = %v, Err = %v; want ErrAudit", err, l.Err())
		}
	}
	limit(1 << 30)
	if err := l.Append(ca.AuditEntry{Event: ca.AuditIssued}); err != nil || l.Err() != nil {
		t.Fatalf("Append with room = %v, %v", err, l.Err())
	}
	if head, err := l.Verify(nil); err != nil || head.Sequence != 2 {
		t.Fatalf("Verify = %+v, %v; want the two lines that were written", head, err)
	}
}

// The head is kept when meshd begins, every minute, and when it ends.
func TestHeadsAreKeptInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keptLog(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- k.Run(ctx) }()
		newest := func() uint64 {
			t.Helper()
			synctest.Wait()
			logs, err := k.List(t.Context())
			if err != nil || len(logs) != 1 {
				t.Fatalf("List = %v, %v", logs, err)
			}
			return logs[0].Marks[len(logs[0].Marks)-1].Sequence
		}
		for _, step := range []struct {
			lines int
			wait  time.Duration
			want  uint64
		}{{0, 0, 1}, {4, 50 * time.Second, 1}, {0, 11 * time.Second, 5}, {3, 0, 5}} {
			k.lines(t, step.lines)
			time.Sleep(step.wait)
			if got := newest(); got != step.want {
				t.Errorf("after %+v: line %d", step, got)
			}
		}
		cancel()
		if err := <-done; err != nil || newest() != 8 {
			t.Errorf("Run = %v, last line %d; want 8", err, newest())
		}
	})
}
