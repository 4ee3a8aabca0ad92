// SPDX-License-Identifier: Apache-2.0

// Package report tells meshd about the workload of an agent outside
// Kubernetes: a Checker finds out whether it works, a Reporter keeps one stream
// open on which the present state is sent at every change and at the interval
// that meshd asks for.
//
// It also lends the agent of a gateway to meshd (Prober), which then learns
// whether another network's gateway can be reached from there; and it is what
// such probes end at behind a gateway (Answerer), so that a path can be proven by
// mutual TLS before any workload stands behind it.
package report
