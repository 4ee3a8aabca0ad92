// SPDX-License-Identifier: Apache-2.0

// Package bed is the test bed: networks that cannot reach each other, real
// Kubernetes control planes, real etcd, and virtual machines, made of network
// namespaces on one Linux machine, and gone without a trace afterwards.
//
// A test program enters it from TestMain, a demo from main:
//
//	func TestMain(m *testing.M) { bed.Main(m) }
//
// That starts the program again inside namespaces of its own (processes,
// mounts, network, host name), with a private /run and a private folder for
// temporary files. Whatever ends the program, SIGKILL included, the kernel
// ends every process of it and drops every namespace, interface and mount. The
// inside has no route to the machine's network and the outside gets no
// interface.
//
// Inside, a test builds the world of its story:
//
//	w, err := bed.NewWorld(bed.WorldConfig{})
//	defer w.Close()
//	n1, err := w.Network("n1", bed.NetworkConfig{})
//	east, err := w.Cluster("east", bed.ClusterConfig{Network: n1})
//	web, err := w.VM("web-1", bed.VMConfig{Network: n1})
//	output, err := web.Run(ctx, "ip address")
//
// Several worlds may exist at once; they share nothing. How it looks from
// above is drawn in e2e/README.md.
package bed
