// SPDX-License-Identifier: Apache-2.0

// Package api defines what meshd offers over the network to people, scripts
// and agents: the admin service, the report stream of workloads outside
// Kubernetes, and the DNS name table that travels on ADS. The .proto files are
// the definition; the Go code beside them is generated and committed.
//
// The admin service is spoken as gRPC and as JSON over HTTPS on the same port.
// Its caller is always an administrator with a client certificate.
package api

//go:generate sh generate.sh
