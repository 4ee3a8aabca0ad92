// SPDX-License-Identifier: Apache-2.0

package bootstrap_test

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/agent/bootstrap"
)

func config() bootstrap.Config {
	return bootstrap.Config{
		NodeType: "sidecar", Name: "web-0", Namespace: "shop", Address: netip.MustParseAddr("10.1.0.5"),
		Metadata: map[string]any{"NETWORK": "n1", "LABELS": map[string]any{"app": "web"}},
		Socket:   "/var/run/isthmus/agent.sock", Region: "eu",
	}
}

func TestBootstrapSaysWhoAndWhere(t *testing.T) {
	t.Parallel()
	c := config()
	b, err := c.Build()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := b.GetNode().GetId(), "sidecar~10.1.0.5~web-0.shop~shop.svc.cluster.local"; got != want {
		t.Errorf("node %q, want %q", got, want)
	}
	if got := b.GetAdmin().GetAddress().GetSocketAddress(); got.GetAddress() != "127.0.0.1" || got.GetPortValue() != 15000 {
		t.Errorf("admin at %v: it must not be reachable from outside", got)
	}
	for _, cluster := range b.GetStaticResources().GetClusters()[:2] {
		path := cluster.GetLoadAssignment().GetEndpoints()[0].GetLbEndpoints()[0].GetEndpoint().GetAddress().GetPipe().GetPath()
		if path != c.Socket {
			t.Errorf("%s goes to %q", cluster.GetName(), path)
		}
	}
	if source := b.GetDynamicResources().GetLdsConfig(); source.GetAds() == nil || source.GetInitialFetchTimeout().AsDuration() != 0 {
		t.Errorf("listeners from %v: an Envoy without configuration would call itself ready", source)
	}
}

func TestBootstrapNamesWhatIsMissing(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*bootstrap.Config){
		"node type": func(c *bootstrap.Config) { c.NodeType = "proxy" },
		"needed":    func(c *bootstrap.Config) { c.Address = netip.Addr{} },
		"metadata":  func(c *bootstrap.Config) { c.Metadata["X"] = make(chan int) },
	} {
		c := config()
		change(&c)
		if _, err := c.JSON(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v, want it to name %q", err, name)
		}
	}
}

func TestEnvoyAcceptsIt(t *testing.T) {
	t.Parallel()
	envoy := os.Getenv("ENVOY")
	if envoy == "" {
		cache, _ := os.UserCacheDir()
		found, _ := filepath.Glob(filepath.Join(cache, "isthmus", "envoy-*", "envoy"))
		if len(found) == 0 {
			t.Skip("no Envoy: set $ENVOY, or let make fetch it")
		}
		envoy = found[0]
	}
	c := config()
	data, err := c.JSON()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(envoy, "--mode", "validate", "--disable-hot-restart", "-c", path).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "[warning]") || strings.Contains(line, "eprecat") {
			t.Errorf("envoy warns: %s", line)
		}
	}
}

func TestAccessLogsAreOffUnlessAskedForAndCanBeTurnedOn(t *testing.T) {
	t.Parallel()
	for on, want := range map[bool]float64{false: 0, true: 100} {
		c := config()
		c.AccessLog = on
		b, err := c.Build()
		if err != nil {
			t.Fatal(err)
		}
		layers := b.GetLayeredRuntime().GetLayers()
		if len(layers) != 2 || layers[1].GetAdminLayer() == nil {
			t.Fatalf("got the layers %v, want what the agent says below what the admin port says", layers)
		}
		if got := layers[0].GetStaticLayer().GetFields()["isthmus.access_log"].GetNumberValue(); got != want {
			t.Errorf("access log %v: got %v %%, want %v %%", on, got, want)
		}
	}
}
