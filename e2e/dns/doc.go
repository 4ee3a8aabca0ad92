// SPDX-License-Identifier: Apache-2.0

// Package dns is the cluster DNS of a test cluster.
//
// It answers by the Kubernetes DNS specification 1.1
// (https://github.com/kubernetes/dns/blob/master/docs/specification.md) for the
// Services of one cluster: A and AAAA of ClusterIPs, of the ready endpoints of
// headless Services and of their named pods, SRV of named ports, CNAME of
// ExternalNames. Every other name does not exist: the bed is closed.
//
// [Zone] knows the names, [Server] speaks the protocol over UDP and TCP.
package dns
