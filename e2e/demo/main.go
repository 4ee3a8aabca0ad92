// SPDX-License-Identifier: Apache-2.0

// Command demo shows the main job on one machine: two clusters on two networks that cannot
// reach each other, a virtual machine, the control service, and a small shop spread over
// all of them. It leaves everything running until Ctrl-C; with ONCE=1 it ends after the
// last step, with exit code 0 only if every answer was the announced one.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/kubelet"
	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

func main() {
	kubelet.Shim()
	bed.Enter()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	once, _ := strconv.ParseBool(os.Getenv("ONCE"))
	if err := run(ctx, once); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, once bool) (err error) {
	s, err := stage.New(stage.Config{})
	if err != nil {
		return err
	}
	t := newTeller(os.Stdout)
	defer func() {
		t.say("\nremoving all of it")
		err = errors.Join(err, s.Close())
	}()
	shop := &shop{Stage: s, teller: t}
	for _, act := range []struct {
		title string
		play  func(context.Context) error
	}{
		{"two clusters, each on a network of its own, with the same addresses", shop.clusters},
		{"the control service, with an etcd of its own", shop.control},
		{"join the clusters", shop.join},
		{"a shop: front end in east, catalogue in both, payments only in west", shop.open},
		{"stock is a legacy service on a virtual machine", shop.machine},
		{"who answers the front end?", shop.visit},
		{"the catalogue in east goes away", shop.failover},
		{"and comes back", shop.recover},
	} {
		if err := t.act(act.title, func() error { return act.play(ctx) }); err != nil {
			return err
		}
	}
	if once {
		t.say("\nEvery answer was the announced one.")
		return nil
	}
	if err := shop.invite(ctx); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}
