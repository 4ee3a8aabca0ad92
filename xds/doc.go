// SPDX-License-Identifier: Apache-2.0

// Package xds translates what a proxy should know into what Envoy is told.
//
// It is one pure function, Build: from a view (what the proxies of one cluster on one
// network see), the users' configuration and a proxy to named, content-versioned
// resources. There is one file per kind of resource. Nothing here does I/O, holds state
// or knows streams.
//
// # What a sidecar is given
//
// Outbound connections arrive at 15001 with their original destination. Each address and
// port that a service is dialled by has a listener of its own there, so a service that
// comes or goes touches nothing but its own resources: one listener, one route
// configuration, one cluster, one assignment. What no listener knows is passed through
// unchanged. Inbound connections arrive at 15006, where one filter chain a port ends the
// mutual TLS and hands on to the workload's own port.
//
// Cluster, route and SNI names follow Istio's convention, so dashboards made for it work.
//
// # Choices that are seen from outside
//
//   - Priorities are exact: the panic threshold is 0, and Envoy's overprovisioning factor
//     stays at 1.4. With one of three local endpoints unready, 2/3 × 1.4 = 93.3 % of the
//     traffic stays and 6.7 % spills over to the next priority.
//   - Hops (gateways above all) are judged by their clients: three failed connects in a row
//     take a hop out for 2 s, then 4 s, at most 30 s. Answers of the application, also
//     5xx, never do, unless a DestinationRule says so.
//   - On a port whose protocol is not known, the client's first 100 ms decide: a request
//     line or an HTTP/2 preface makes it HTTP, everything else, silence included, TCP. So
//     protocols where the server speaks first work on unnamed ports too.
//   - HTTP connections that may lead to a gateway live at most GatewayConnectionDuration,
//     after which they take no new requests; streams on them are never cut. TCP
//     connections have no such bound: they end when the gateway has drained.
package xds
