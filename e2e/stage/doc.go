// SPDX-License-Identifier: Apache-2.0

// Package stage plays whole meshes in the test bed: clusters with their nodes and DNS,
// control services, virtual machines, and a laptop from which `mesh` and `kubectl` are
// run as a person would run them. The scripts, the demo and the benchmarks stand on it.
//
//	s, err := stage.New(stage.Config{})
//	defer s.Close()
//	east, err := s.Cluster(ctx, "east", stage.ClusterConfig{Network: "n1"})
//	hub, err := s.Control(ctx, "hub", stage.ControlConfig{})
//	err = s.Join(ctx, "east", "--primary")
//	err = s.Deploy(ctx, "east", stage.Workload{Namespace: "shop", Name: "web"})
//	answers, err := s.Call(ctx, "east", "shop/web", "http://payments.shop/")
package stage
