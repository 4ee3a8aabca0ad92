// SPDX-License-Identifier: Apache-2.0

// Package agent is what runs beside each Envoy: in a pod, in an east-west
// gateway, on a virtual machine.
//
//	            certificates (identity)        names (dns) ◄── the workload
//	meshd ◄──►  discovery    (relay)   ◄─socket─►  Envoy   ◄── redirected traffic
//	            health       (report)          (supervised by package envoy)
//
// An Agent is made of a Config and lives as long as its Run. It makes the key,
// obtains the certificate, carries discovery between Envoy and meshd, answers
// the workload's name queries, and says on port 15021 whether traffic may come.
// At the end it drains Envoy first and everything else after it.
package agent
