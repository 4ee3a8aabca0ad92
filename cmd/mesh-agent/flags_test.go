// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/isthmus-mesh/isthmus/agent"
)

func parse(t *testing.T, env map[string]string, args ...string) (agent.Config, error) {
	t.Helper()
	var f proxyFlags
	flags := pflag.NewFlagSet("proxy", pflag.ContinueOnError)
	f.bind(flags, func(name string) string { return env[name] })
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return f.config()
}

func TestTheFlagWinsOverTheVariable(t *testing.T) {
	t.Parallel()
	c, err := parse(t, map[string]string{
		"MESH_SERVER": "a:1", "MESH_NETWORK": "n1", "MESH_POD_IPS": "10.0.0.5,fd00::5", "MESH_DRAIN_DURATION": "7s",
		"MESH_LABELS": "app=web,version=v1", "MESH_INBOUND_PORTS": "80, 8080", "MESH_EXCLUDE_TO": "10.0.0.1,192.168.0.0/16",
	}, "--server", "b:2")
	if err != nil {
		t.Fatal(err)
	}
	got := strings.TrimSpace(fmt.Sprintln(c.Server, c.Network, c.Addresses, c.Drain, c.Labels, c.Rules.InboundPorts, c.Rules.ExcludeTo, c.Role, c.Redirect))
	if want := "b:2 n1 [10.0.0.5 fd00::5] 7s map[app:web version:v1] [80 8080] [10.0.0.1/32 192.168.0.0/16] sidecar false"; got != want {
		t.Errorf("got %s", got)
	}
}

func TestWhatCannotBeUnderstoodIsNamed(t *testing.T) {
	t.Parallel()
	for variable, value := range map[string]string{
		"MESH_POD_IPS": "10.0.0", "MESH_DRAIN_DURATION": "-1s", "MESH_NO_DNS": "perhaps", "MESH_INBOUND_PORTS": "99999",
		"MESH_OUTBOUND_TO": "10.0.0.0/99", "MESH_CONCURRENCY": "many", "MESH_REDIRECT": "x",
	} {
		if _, err := parse(t, map[string]string{variable: value}); err == nil {
			t.Errorf("%s=%s was accepted", variable, value)
		}
	}
}

func TestAMachineReadsWhatItWasGiven(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "agent.json")
	text := `{"v":1,"name":"web-1","namespace":"legacy","serviceAccount":"web","network":"n1","server":"meshd.example:15012","ports":[{"port":8080}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := parse(t, nil, "--role", "vm", "--config", path)
	if err != nil || c.Onboard.Name != "web-1" || !c.Redirect || c.Domain != "" {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := parse(t, nil, "--role", "vm", "--config", path+"x"); err == nil {
		t.Error("a file that does not exist was accepted")
	}
}

func TestWaitTellsWhatItWaitedFor(t *testing.T) {
	t.Parallel()
	code := http.StatusServiceUnavailable
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		fmt.Fprint(w, "not ready\ncertificate: the token is spent\n")
	}))
	defer server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := wait(ctx, server.URL); err == nil || !strings.Contains(err.Error(), "the token is spent") {
		t.Errorf("%v", err)
	}
	code = http.StatusOK
	if err := wait(t.Context(), server.URL); err != nil {
		t.Error(err)
	}
}

func TestRedirectShowsBeforeItActs(t *testing.T) {
	t.Parallel()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 10.96.0.10\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	command := root()
	command.SetOut(&out)
	command.SetArgs([]string{"redirect", "--show", "--resolv-conf", conf})
	if err := command.Execute(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "ip daddr { 10.96.0.10 } udp dport 53 redirect to :15053") {
		t.Errorf("got:\n%s", out.String())
	}
	command = root()
	command.SetArgs([]string{"redirect"})
	if err := command.Execute(); err == nil {
		t.Error("neither --apply nor --undo nor --show was asked for, and it did not mind")
	}
}
