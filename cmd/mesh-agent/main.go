// SPDX-License-Identifier: Apache-2.0

// Command mesh-agent runs beside each Envoy of the mesh: it starts Envoy,
// obtains and renews the workload's certificate, carries configuration from
// meshd, answers name queries, and programs traffic redirection.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := root().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "mesh-agent:", err)
		os.Exit(1)
	}
}
