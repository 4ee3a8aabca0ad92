// SPDX-License-Identifier: Apache-2.0

// Package relay carries Envoy's aggregated discovery stream to meshd.
//
// Envoy opens its stream on the agent's Unix socket; for each such stream the
// relay opens one upstream over mutual TLS with the workload's certificate,
// and passes frames through as the bytes they are, in both directions.
// It adds one thing: after Envoy's first listener request it subscribes to the
// DNS name table, takes the answers out of the stream, and acknowledges them
// itself.
//
// When the upstream breaks, Envoy's stream is ended too, and Envoy comes back
// with what it holds (initial_resource_versions), so nothing is sent twice.
// Until the upstream accepts, Envoy's stream stays open and waits.
package relay
