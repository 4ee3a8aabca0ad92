// SPDX-License-Identifier: Apache-2.0

// Package e2e tells the stories of the mesh: scripts in testdata/script, each played on a
// stage of its own, with real Kubernetes, etcd and Envoy. Its words are in words_test.go.
package e2e
