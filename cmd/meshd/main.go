// SPDX-License-Identifier: Apache-2.0

// Command meshd is the control service of the mesh: it collects the services of the
// joined clusters and virtual machines into etcd, issues their workloads' certificates,
// and serves their Envoys over xDS.
//
//	meshd --data-dir /var/lib/meshd --advertise mesh.example.org:15012
//	meshd backup FILE        copy what it keeps
//	meshd restore FILE       bring it back into an empty data directory
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// usageError is a mistake in flags or in the configuration file.
type usageError struct{ error }

// collectAt is how far the heap grows, in percent of what is alive, before the collector
// runs. meshd keeps much and changes little of it: a tighter heap costs it little time.
const collectAt = 50

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAt)
	}
	// The first signal drains; the default handling is back for the second one, which
	// ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	err := command().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "meshd:", err)
	if errors.As(err, new(usageError)) {
		os.Exit(exitUsage)
	}
	os.Exit(exitFailed)
}

func command() *cobra.Command {
	flags := &flagValues{}
	root := &cobra.Command{
		Use:   "meshd",
		Short: "The control service of the mesh",
		Long: `The control service of the mesh: collects the services of clusters and virtual
machines into etcd, issues certificates, serves Envoys over xDS.

With nothing else given it runs an etcd of its own in the data directory, and
writes admin.conf there, with which ` + "`mesh`" + ` reaches it.`,
		Example: `  meshd --data-dir /var/lib/meshd --advertise mesh.example.org:15012
  meshd --config /etc/meshd.yaml
  meshd --data-dir /var/lib/meshd --advertise 192.0.2.10:15012 \
        --etcd-endpoints https://etcd-0:2379,https://etcd-1:2379 --etcd-cacert ca.pem --etcd-cert c.pem --etcd-key k.pem`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := flags.configuration(cmd.Flags())
			if err != nil {
				return usageError{err}
			}
			return serve(cmd.Context(), c, cmd.ErrOrStderr())
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	flags.add(root.PersistentFlags())
	root.AddCommand(backupCommand(flags), restoreCommand(flags), versionCommand())
	return root
}
