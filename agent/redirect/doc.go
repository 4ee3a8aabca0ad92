// SPDX-License-Identifier: Apache-2.0

// Package redirect sends a workload's traffic through its Envoy with one
// nftables table, and takes it out again.
//
// The table "inet isthmus" is replaced whole in one transaction, so applying
// twice is the same as applying once, and undoing is deleting it. Rendering is
// pure (Rules.Text); Apply and Undo run nft.
//
// What never goes through Envoy: traffic of Envoy's own user, packets with the
// agent's socket mark (see Dialer), loopback, and what Rules exclude. On a
// machine that is not a pod, only what Rules name is captured: addresses of
// mesh services outbound, the workload's ports inbound. A remote shell
// therefore never passes Envoy.
package redirect
