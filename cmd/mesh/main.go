// SPDX-License-Identifier: Apache-2.0

// Command mesh is how people talk to meshd, the control service of the mesh, and
// how clusters and virtual machines join it.
//
// There is one file for every verb. What they share is the session: where the
// input and output go, and the flags that every verb has.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	os.Exit(mesh())
}

// mesh runs the command line of this process and returns its exit code.
func mesh() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// After the first signal the command stops at its next step; the second
	// signal ends the process at once.
	context.AfterFunc(ctx, stop)
	return newSession().run(ctx, os.Args[1:])
}
