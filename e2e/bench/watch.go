// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
)

func processors() string {
	if runtime.NumCPU() == 1 {
		return "1 processor"
	}
	return fmt.Sprintf("%d processors", runtime.NumCPU())
}

// memory is what a process takes, in MiB.
type memory struct {
	resident, peak float64 // VmRSS, VmHWM
	heap           float64 // live, after a collection
}

// measure reads the memory of a meshd that has come to rest: the median of some seconds.
func (b *bench) measure(ctx context.Context, hub *stage.Control, what string) (memory, error) {
	var resident []float64
	for range 11 {
		if err := pause(ctx, time.Second); err != nil {
			return memory{}, err
		}
		now, err := statusOf(hub.Process.Pid())
		if err != nil {
			return memory{}, err
		}
		resident = append(resident, now["VmRSS"])
	}
	last, err := statusOf(hub.Process.Pid())
	if err != nil {
		return memory{}, err
	}
	// The collection comes last: it would give memory back that nobody has asked for.
	heap, err := b.liveHeap(ctx, hub, what)
	m := memory{resident: quantile(resident[5:], 0.5), peak: last["VmHWM"], heap: heap}
	b.say("%s: resident %.1f MiB (anonymous %.1f, of files %.1f), peak %.1f, live heap %.1f", what, m.resident, last["RssAnon"], last["RssFile"], m.peak, m.heap)
	return m, err
}

// statusOf reads the sizes in /proc/<pid>/status, in MiB.
func statusOf(pid int) (map[string]float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	sizes := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		if kib, ok := strings.CutSuffix(strings.TrimSpace(value), " kB"); ok {
			if n, err := strconv.ParseFloat(kib, 64); err == nil {
				sizes[key] = n / 1024
			}
		}
	}
	return sizes, nil
}

// liveHeap asks meshd to collect, and what is left, in MiB. Its profile is kept with the logs.
func (b *bench) liveHeap(ctx context.Context, hub *stage.Control, what string) (float64, error) {
	_, profile, err := hub.Host.Get(ctx, "http://127.0.0.1:15014/debug/pprof/heap?gc=1")
	if err != nil {
		return 0, err
	}
	if b.keepLogs != "" {
		if err := os.WriteFile(filepath.Join(b.keepLogs, "heap "+what+".pprof"), []byte(profile), 0o644); err != nil {
			return 0, err
		}
	}
	bytes, err := hub.Metric(ctx, "go_memstats_heap_inuse_bytes")
	return bytes / (1 << 20), err
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// until repeats a condition quickly, since the time until it holds is what is measured.
func until(ctx context.Context, every time.Duration, holds func() (bool, error)) error {
	for {
		ok, err := holds()
		if ok {
			return nil
		}
		if wait := pause(ctx, every); wait != nil {
			return errors.Join(wait, err)
		}
	}
}

// quantile of values, by the nearest rank.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// peek is a look into the embedded etcd of a meshd, through the socket for local tools.
type peek struct{ client *clientv3.Client }

func newPeek(hub *stage.Control) (peek, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"unix://" + filepath.Join(hub.DataDir(), etcd.SocketName)}, DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
	})
	return peek{client}, err
}

// count is how many keys there are below a prefix.
func (p peek) count(ctx context.Context, prefix string) (int, error) {
	response, err := p.client.Get(ctx, "/isthmus/"+prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return 0, err
	}
	return int(response.Count), nil
}

// revision of etcd: it rises by one with every transaction that writes.
func (p peek) revision(ctx context.Context) (int64, error) {
	response, err := p.client.Get(ctx, "/isthmus/", clientv3.WithCountOnly())
	if err != nil {
		return 0, err
	}
	return response.Header.Revision, nil
}
