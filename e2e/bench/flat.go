// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// playFlat measures how long an endpoint takes from one cluster's API server to an Envoy
// of another cluster, on one network.
func playFlat(ctx context.Context, b *bench) error {
	return b.stage(func(s *stage.Stage) error {
		if _, err := s.Control(ctx, "hub", stage.ControlConfig{}); err != nil {
			return err
		}
		if _, err := s.Cluster(ctx, "east", stage.ClusterConfig{Network: "flat"}); err != nil {
			return err
		}
		if _, err := s.Join(ctx, "east", "--primary", "--no-gateway", "--no-wait"); err != nil {
			return err
		}
		if err := s.Deploy(ctx, "east", stage.Workload{Namespace: "bench", Name: "viewer", Inject: true}); err != nil {
			return err
		}
		west, err := s.Cluster(ctx, "west", stage.ClusterConfig{Network: "flat"})
		if err != nil {
			return err
		}
		if _, err := s.Join(ctx, "west", "--no-gateway", "--no-wait"); err != nil {
			return err
		}
		if err := west.ControllerManager.Kill(); err != nil {
			return err
		}
		const changes, warm = 50, 5
		f := fleet{prefix: "target", services: 1, endpoints: 1 + warm + changes, sliced: 1}
		if err := f.fill(ctx, west); err != nil {
			return err
		}
		admin, err := newEnvoyAdmin(ctx, s, "east", "bench/viewer")
		if err != nil {
			return err
		}
		return b.propagate(ctx, admin, west, f, warm)
	})
}

// propagate adds one endpoint after the other, and waits for each in Envoy.
func (b *bench) propagate(ctx context.Context, admin *envoyAdmin, west *stage.Cluster, f fleet, warm int) error {
	client, err := quick(west.Config())
	if err != nil {
		return err
	}
	api := client.DiscoveryV1().EndpointSlices(f.namespace(0))
	slice, err := api.Get(ctx, f.name(0)+"-x1", metav1.GetOptions{})
	if err != nil {
		return err
	}
	if _, err := admin.await(ctx, f.address(0, 0).String()); err != nil {
		return fmt.Errorf("the first endpoint: %w", err)
	}
	var took, wrote, looked []float64
	for e := 1; e < f.endpoints; e++ {
		// Idle means idle: longer than what meshd gathers, and in step with nothing.
		if err := pause(ctx, 400*time.Millisecond+rand.N(200*time.Millisecond)); err != nil {
			return err
		}
		slice.Endpoints = append(slice.Endpoints, f.endpoint(0, e))
		seen := make(chan error, 1)
		var look time.Duration
		start := time.Now()
		go func() {
			var err error
			look, err = admin.await(ctx, f.address(0, e).String())
			seen <- err
		}()
		if slice, err = api.Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
			return errors.Join(err, <-seen)
		}
		write := time.Since(start)
		if err := <-seen; err != nil {
			return fmt.Errorf("endpoint %d: %w", e, err)
		}
		if e > warm {
			took, wrote = append(took, milliseconds(time.Since(start))), append(wrote, milliseconds(write))
			looked = append(looked, milliseconds(look))
		}
	}
	note := fmt.Sprintf("from sending the EndpointSlice to west's API server until the endpoint stands in Envoy's /clusters in east, %d changes, about 2 a second; of this the API server's answer p50 %.1f ms; one look at Envoy takes %.1f ms and is followed by the next; max %.1f ms",
		len(took), quantile(wrote, 0.5), quantile(looked, 0.5), quantile(took, 1))
	b.say("milliseconds of each change: %.0f", took)
	b.report("propagation-p50-ms", quantile(took, 0.5), "%s", note)
	b.report("propagation-p99-ms", quantile(took, 0.99), "%s", note)
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// envoyAdmin asks one Envoy, on one connection.
type envoyAdmin struct{ client *http.Client }

func newEnvoyAdmin(ctx context.Context, s *stage.Stage, cluster, workload string) (*envoyAdmin, error) {
	pod, err := s.FirstPod(ctx, cluster, workload)
	if err != nil {
		return nil, err
	}
	netns, err := s.PodNetNS(cluster, pod)
	if err != nil {
		return nil, err
	}
	return &envoyAdmin{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return dialIn(ctx, netns, network, address)
		},
		MaxIdleConnsPerHost: 1,
	}}}, nil
}

// await looks until an address is an endpoint of some cluster; it tells how long the last
// look took.
func (a *envoyAdmin) await(ctx context.Context, address string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		start := time.Now()
		text, err := a.get(ctx, "/clusters")
		if err != nil {
			return 0, fmt.Errorf("waiting for %s in Envoy: %w", address, err)
		}
		if strings.Contains(text, "::"+address+":") {
			return time.Since(start), nil
		}
		// A pause as long as a look, so that the looking does not slow down what it waits for.
		time.Sleep(min(time.Since(start), time.Millisecond))
	}
}

func (a *envoyAdmin) get(ctx context.Context, page string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:15000"+page, nil)
	if err != nil {
		return "", err
	}
	response, err := a.client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(text), err
}

// dialIn opens a connection that begins in a network namespace.
func dialIn(ctx context.Context, netns, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		// The thread is not given back: it ends with this goroutine, so that nobody else
		// finds himself in there.
		runtime.LockOSThread()
		there, err := os.Open(netns)
		if err != nil {
			done <- result{err: err}
			return
		}
		defer there.Close()
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{err: fmt.Errorf("enter %s: %w", netns, err)}
			return
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}
