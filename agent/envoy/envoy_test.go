// SPDX-License-Identifier: Apache-2.0

package envoy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestConnectionsAreCountedOnce(t *testing.T) {
	t.Parallel()
	const stats = `listener.0.0.0.0_15001.downstream_cx_active: 2
listener.0.0.0.0_15001.worker_0.downstream_cx_active: 2
listener.0.0.0.0_15006.downstream_cx_active: 3
listener.0.0.0.0_15090.downstream_cx_active: 1
listener.admin.downstream_cx_active: 1
`
	if n, err := countConnections(stats); n != 5 || err != nil {
		t.Errorf("%d, %v; want 5: scrapers and administrators do not keep us alive", n, err)
	}
	if _, err := countConnections("listener.x.downstream_cx_active: many\n"); err == nil {
		t.Error("nonsense was counted")
	}
}

func FuzzCountConnections(f *testing.F) {
	f.Add("listener.0.0.0.0_15001.downstream_cx_active: 2\n")
	f.Fuzz(func(t *testing.T, stats string) { countConnections(stats) })
}

// program writes a shell script that stands for Envoy.
func program(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "envoy")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// admin stands for Envoy's admin interface, with connections that end.
type admin struct {
	mu       sync.Mutex
	open     []int
	requests []string
}

func (a *admin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests = append(a.requests, r.Method+" "+r.URL.String())
	if strings.HasPrefix(r.URL.Path, "/stats") {
		fmt.Fprintf(w, "listener.x.downstream_cx_active: %d\n", a.open[0])
		if len(a.open) > 1 {
			a.open = a.open[1:]
		}
	}
}

func run(t *testing.T, p *Process) (context.CancelFunc, <-chan error) {
	t.Helper()
	p.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	return cancel, ended
}

func wait(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for !condition() {
		select {
		case <-deadline:
			t.Fatalf("never: %s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestTheEndWaitsForConnections(t *testing.T) {
	t.Parallel()
	a := &admin{open: []int{2, 1, 0, 1, 0}} // one more comes at the last moment
	server := httptest.NewServer(a)
	defer server.Close()
	p := &Process{Path: program(t, "trap 'exit 0' TERM; while :; do sleep 0.05; done"), Admin: server.Listener.Addr().String(), Drain: 10 * time.Second, InboundOnly: true}
	cancel, ended := run(t, p)
	wait(t, "running", p.Running)
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if want := "POST /drain_listeners?inboundonly&graceful&skip_exit"; a.requests[0] != want {
		t.Errorf("first asked %q, want %q", a.requests[0], want)
	}
	if want := "POST /drain_listeners?inboundonly"; len(a.requests) < 5 || a.requests[4] != want {
		t.Errorf("once they were gone, asked %q, want the fifth to be %q", a.requests, want)
	}
	if len(a.requests) != 7 {
		t.Errorf("asked %d times, want twice to drain and until the connections were gone", len(a.requests))
	}
}

func TestTheEndDoesNotWaitForEver(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(&admin{open: []int{1}})
	defer server.Close()
	// It does not even listen to being asked to go.
	p := &Process{Path: program(t, "trap '' TERM; while :; do sleep 0.05; done"), Admin: server.Listener.Addr().String(), Drain: 300 * time.Millisecond}
	cancel, ended := run(t, p)
	wait(t, "running", p.Running)
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(15 * time.Second):
		t.Error("still waiting")
	}
}

func TestACrashIsFollowedByAnotherStart(t *testing.T) {
	t.Parallel()
	marks := filepath.Join(t.TempDir(), "marks")
	p := &Process{Path: program(t, "echo x >>"+marks+"; exit 7"), Admin: "127.0.0.1:1"}
	cancel, ended := run(t, p)
	wait(t, "three starts", func() bool { data, _ := os.ReadFile(marks); return bytes.Count(data, []byte("x")) >= 3 })
	if p.Restarts() < 2 {
		t.Errorf("%d restarts counted", p.Restarts())
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestNoEnvoyIsAnErrorAtOnce(t *testing.T) {
	t.Parallel()
	p := &Process{Path: filepath.Join(t.TempDir(), "nothing")}
	if err := p.Run(t.Context()); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
}

func TestTheEnvoyOfAFormerAgentIsEnded(t *testing.T) {
	t.Parallel()
	former := exec.Command("sleep", "1000")
	if err := former.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- former.Wait() }()
	p := &Process{PIDFile: filepath.Join(t.TempDir(), "pid"), Log: slog.New(slog.DiscardHandler)}
	p.remember(former.Process.Pid)
	if err := p.endFormer(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := <-ended; !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("it ended by %v", err)
	}
}

func TestAProcessWithAnotherBeginningIsLeftAlone(t *testing.T) {
	t.Parallel()
	p := &Process{PIDFile: filepath.Join(t.TempDir(), "pid"), Log: slog.New(slog.DiscardHandler)}
	for _, text := range []string{fmt.Sprintf("%d 12345\n", os.Getpid()), "1 1\n", "x", ""} {
		if err := os.WriteFile(p.PIDFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := p.endFormer(); err != nil {
			t.Error(err)
		}
	}
}

func TestReadyIsWhatEnvoySays(t *testing.T) {
	t.Parallel()
	code := http.StatusServiceUnavailable
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code); fmt.Fprint(w, "INITIALIZING") }))
	defer server.Close()
	p := &Process{Admin: server.Listener.Addr().(*net.TCPAddr).String()}
	if err := p.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "INITIALIZING") {
		t.Errorf("%v", err)
	}
	code = http.StatusOK
	if err := p.Ready(t.Context()); err != nil {
		t.Error(err)
	}
}
