// SPDX-License-Identifier: Apache-2.0

// Command echo is the workload of the stories: it answers with where it is and what it
// received, in every protocol that the mesh carries, and it can be told to be slow, to
// fail, or to become unready while it still answers.
//
//	echo serve                        listen (see -h for the ports)
//	echo call URL [flags]             call, and tell who answered
//	echo get URL                      one plain GET, its body printed (for hooks and probes)
//	echo identity                     ask the SPIFFE Workload API who I am
//	echo shop NAME=URL…               the front end of the demo
//
// URLs of call: http:// https:// h2c:// grpc:// ws:// tcp:// first:// (the server speaks
// first) tls:// (TLS without HTTP).
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{Use: "echo", Short: "answer with where I am", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(serveCommand(), callCommand(), getCommand(), identityCommand(), shopCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}
