// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDemo plays the demo as a person sees it: to the invitation, then from a second
// terminal, then Ctrl-C, after which nothing is left.
func TestDemo(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("the demo needs root for its namespaces; run the tests as root")
	}
	programs := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", programs+"/", "../../cmd/...", "../echo", ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	demo := exec.CommandContext(ctx, filepath.Join(programs, "demo"))
	demo.Cancel = func() error { return demo.Process.Signal(syscall.SIGTERM) }
	out, err := demo.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var complaints bytes.Buffer
	demo.Stderr = &complaints
	if err := demo.Start(); err != nil {
		t.Fatal(err)
	}
	said := untilInvited(t, out, &complaints)
	for _, want := range []string{
		"catalogue  20 of 20 answers from cluster east",
		"catalogue  20 of 20 answers from cluster west",
		"payments   20 of 20 answers from cluster west",
		"stock      20 of 20 answers from virtual machine stock-1",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("it did not say %q", want)
		}
	}
	files := visit(t, said)
	if err := demo.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(out)
	if err := demo.Wait(); err != nil {
		t.Errorf("after Ctrl-C: %v\n%s%s", err, rest, &complaints)
	}
	for _, file := range files {
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s is still there", file)
		}
	}
}

// untilInvited reads what the demo says until it invites to a second terminal.
func untilInvited(t *testing.T, out io.Reader, complaints *bytes.Buffer) string {
	t.Helper()
	var said strings.Builder
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		said.WriteString(lines.Text() + "\n")
		if strings.HasPrefix(lines.Text(), "Ctrl-C removes") {
			t.Log(said.String())
			return said.String()
		}
	}
	t.Fatalf("it ended without an invitation:\n%s%s", &said, complaints)
	return ""
}

// visit does what the invitation says, and returns the files it was given.
func visit(t *testing.T, said string) (files []string) {
	t.Helper()
	access := regexp.MustCompile(`export KUBECONFIG=(\S+) MESH_CONFIG=(\S+) PATH=([^:]+):`).FindStringSubmatch(said)
	page := regexp.MustCompile(`The shop's page: (http://127\.0\.0\.1:\d+)`).FindStringSubmatch(said)
	if access == nil || page == nil {
		t.Fatalf("the invitation lacks the ways in:\n%s", said)
	}
	for _, c := range []struct {
		program, args, want string
	}{
		{"mesh", "clusters", "west  remote   Ready"},
		{"mesh", "services", "payments"},
		{"kubectl", "--context west -n shop get pods", "payments-"},
	} {
		cmd := exec.CommandContext(t.Context(), filepath.Join(access[3], c.program), strings.Fields(c.args)...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+access[1], "MESH_CONFIG="+access[2], "NO_COLOR=1")
		text, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(text), c.want) {
			t.Errorf("%s %s: %v, want it to say %q:\n%s", c.program, c.args, err, c.want, text)
		}
	}
	resp, err := (&http.Client{Timeout: 10 * time.Second}).Get(page[1])
	if err != nil {
		t.Errorf("the shop's page: %v", err)
		return access[1:]
	}
	defer resp.Body.Close()
	html, _ := io.ReadAll(resp.Body)
	if !bytes.Contains(html, []byte("virtual machine")) {
		t.Errorf("the shop's page does not show the machine:\n%s", html)
	}
	return access[1:]
}
