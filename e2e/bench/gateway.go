// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// callers is how many calls of the load are under way at most.
const callers = 16

// playGateway measures what the way through an east-west gateway costs a call: the same
// client calls the same program in a cluster of its own network, and in one behind a
// gateway, at half of what the latter can take.
func playGateway(ctx context.Context, b *bench) error {
	return b.stage(func(s *stage.Stage) error {
		if _, err := s.Control(ctx, "hub", stage.ControlConfig{}); err != nil {
			return err
		}
		for _, c := range []struct{ name, network, role, workload string }{
			{"east", "n1", "--primary", "client"}, {"near", "n1", "--no-gateway", "direct"}, {"far", "n2", "--yes", "behind"},
		} {
			if _, err := s.Cluster(ctx, c.name, stage.ClusterConfig{Network: c.network}); err != nil {
				return err
			}
			if _, err := s.Join(ctx, c.name, c.role); err != nil {
				return err
			}
			b.say("joined %s", c.name)
			w := stage.Workload{
				Namespace: "bench", Name: c.workload, Inject: true, Export: true,
				Ports: []stage.WorkloadPort{{Name: "http", Port: 80, Target: 8080}},
			}
			if err := s.Deploy(ctx, c.name, w); err != nil {
				return err
			}
		}
		return b.hop(ctx, s)
	})
}

// hop compares the two ways.
func (b *bench) hop(ctx context.Context, s *stage.Stage) error {
	ways := map[string]string{"direct": "http://direct.bench/", "behind": "http://behind.bench/"}
	for _, url := range ways {
		err := until(ctx, 200*time.Millisecond, func() (bool, error) {
			report, err := s.Call(ctx, "east", "bench/client", url, "-n", "20")
			if err == nil {
				err = report.Err
			}
			return err == nil, err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", url, err)
		}
	}
	const full = 5 * time.Second
	_, most, err := b.load(ctx, s, ways["behind"], 0, full)
	if err != nil {
		return err
	}
	half := most / 2
	b.say("through the gateway %.0f calls a second at most, measured at %.0f", most, half)
	p50, p99 := map[string][]float64{}, map[string][]float64{}
	for range 7 {
		for way, url := range ways {
			latency, _, err := b.load(ctx, s, url, half, full)
			if err != nil {
				return err
			}
			p50[way], p99[way] = append(p50[way], latency.p50), append(p99[way], latency.p99)
		}
	}
	b.report("gateway-hop-p99-ms", quantile(p99["behind"], 0.5)-quantile(p99["direct"], 0.5),
		"median of 7 runs of 5 s in turn, HTTP/1.1 at %.0f calls a second (half of the most through the gateway), client, proxies, gateway, routers and servers on this one machine; p99 direct %.2f, through the gateway %.2f ms; p50 %.2f and %.2f ms",
		half, quantile(p99["direct"], 0.5), quantile(p99["behind"], 0.5), quantile(p50["direct"], 0.5), quantile(p50["behind"], 0.5))
	return nil
}

// latency of calls, in milliseconds.
type latency struct{ p50, p99 float64 }

// load calls a URL from the client's pod at a rate (0: as fast as it goes), and tells the
// latency and how many calls a second were answered. A call that fails is an error.
func (b *bench) load(ctx context.Context, s *stage.Stage, url string, rate float64, d time.Duration) (latency, float64, error) {
	report, err := s.Call(ctx, "east", "bench/client", url, "-n", "0", "-c", strconv.Itoa(callers),
		"--rate", strconv.FormatFloat(rate, 'f', 1, 64), "--duration", d.String())
	if err == nil {
		err = report.Err
	}
	if err != nil {
		return latency{}, 0, err
	}
	var l latency
	var answers float64
	for line := range strings.Lines(report.Text) {
		if n, _, ok := strings.Cut(line, " answers:"); ok {
			if answers, err = strconv.ParseFloat(n, 64); err != nil {
				return l, 0, fmt.Errorf("report of calls: %q: %w", line, err)
			}
		}
		var p50, p99 string
		if n, _ := fmt.Sscanf(strings.ReplaceAll(line, ",", " "), "p50 %s p99 %s", &p50, &p99); n == 2 {
			at50, err1 := time.ParseDuration(p50)
			at99, err2 := time.ParseDuration(p99)
			if err1 != nil || err2 != nil {
				return l, 0, fmt.Errorf("report of calls: %q", line)
			}
			l = latency{milliseconds(at50), milliseconds(at99)}
		}
	}
	if answers == 0 || l.p99 == 0 {
		return l, 0, fmt.Errorf("no answers in %q", report.Text)
	}
	return l, answers / d.Seconds(), nil
}
