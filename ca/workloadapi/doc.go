// SPDX-License-Identifier: Apache-2.0

// Package workloadapi serves a workload's identity to the workload itself: the SPIFFE Workload API over a Unix
// socket, as unmodified SPIFFE libraries ask for it.
//
// Who may ask is decided by the kernel: [Server.Users] are compared with the credentials of the other end of the
// socket. Every message of a stream is the whole state; the next one comes when something of it has changed. A
// call without the metadata workload.spiffe.io: true is refused, so that nobody can be made to call by a URL.
//
// Numbers such as W-2 are the lines of the project's checklist of the SPIFFE specifications.
package workloadapi
