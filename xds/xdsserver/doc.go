// SPDX-License-Identifier: Apache-2.0

// Package xdsserver tells proxies what they should know, over ADS in both variants.
//
// Three parts, each usable without the next:
//
//   - machine is the protocol of one stream without its I/O: requests and resources go
//     in, responses come out, in an order that breaks nothing on the way (make before
//     break). It decides what a proxy has, lacks and has refused.
//   - Server runs one machine per stream. A slow proxy waits by itself; what piles up for
//     it is the set of names it lacks, never a queue of messages.
//   - Pipeline turns the store's snapshots into views, and views into resources, once per
//     proxy class, and wakes only the streams whose class got different bytes. Its doors
//     hold callers back while the gateways between learn where to lead them.
//
// Before them stands the Gate, which lets proxies in as the processors allow.
//
// The protocol is described in
// https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol. Tests are named after
// its rules.
package xdsserver
