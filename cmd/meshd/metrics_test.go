// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

const metricsPage = "../../docs/reference/metrics.md"

var metricName = regexp.MustCompile(`fqName: "([a-z_]+)", help: "([^"]*)"`)

// TestMetricsAreDocumented holds the page of metrics to what meshd registers, in both
// directions.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(metricsPage)
	noErr(t, err)
	page, _, _ := strings.Cut(string(text), "## mesh-agent")
	db, err := etcd.Open(t.Context(), etcd.DatabaseConfig{DataDir: t.TempDir(), Unsynced: true})
	noErr(t, err)
	defer db.Close()
	store := etcd.New(etcd.StoreConfig{Client: db.Client()})
	pipeline := xdsserver.NewPipeline(xdsserver.PipelineConfig{Log: slog.New(slog.DiscardHandler)})
	streams := xdsserver.New(xdsserver.Config{Source: pipeline, Log: slog.New(slog.DiscardHandler)})
	runner := registry.NewRunner(registry.RunnerConfig{Store: store})
	known := map[string]bool{}
	for _, c := range []prometheus.Collector{store, pipeline, streams, xdsserver.NewGate(xdsserver.Limits{}), runner, buildInfo()} {
		descriptions := make(chan *prometheus.Desc)
		go func() { defer close(descriptions); c.Describe(descriptions) }()
		for d := range descriptions {
			m := metricName.FindStringSubmatch(d.String())
			if m == nil {
				t.Fatalf("%s", d)
			}
			known[m[1]] = true
			if !strings.Contains(page, "`"+m[1]+"`") {
				t.Errorf("%s does not have %s: %s", metricsPage, m[1], m[2])
			}
		}
	}
	for _, name := range regexp.MustCompile("`(isthmus_[a-z_]+)`").FindAllStringSubmatch(page, -1) {
		// Those of a source are described once there is one.
		if !known[name[1]] && !strings.HasPrefix(name[1], "isthmus_source_") {
			t.Errorf("%s has %s, which meshd does not", metricsPage, name[1])
		}
	}
}
