// SPDX-License-Identifier: Apache-2.0

// Package kubelet runs the pods of a test cluster without a container engine.
//
// A [Kubelet] plays all nodes of one cluster. It registers Node objects, binds
// pending pods to them, and for every bound Pod it makes what a container
// engine would make: a network namespace with an address of the node's range,
// and for each container a process with its own PID, mount and UTS namespaces,
// whose root is a throw-away overlay of the machine's. Images are names of
// local programs, see [Image]. Volumes, environment, probes, hooks, restarts,
// termination, status, exec, logs and port-forward follow the behaviour of the
// real kubelet as far as workloads and controllers can see it. What is not
// supported is refused in the pod's status by name, never ignored silently.
//
// What differs on purpose:
//
//   - A container is root with the engine's usual capabilities unless it says
//     otherwise; a user other than root has none, as in a real cluster.
//   - Until a container's first successful readiness or startup probe, the
//     probe is repeated quickly, and these early failures do not count; scripts
//     need not wait for a period of seconds.
//   - Changes of ConfigMaps and Secrets reach volumes at once.
//   - Probes come from [Config.ProbeFrom], as they come from the node in a real
//     cluster: they meet the pod's own redirection. Without it they come from
//     within the pod and its loopback interface.
//
// A program that uses this package calls [Shim] first thing in main:
//
//	func TestMain(m *testing.M) {
//		kubelet.Shim()
//		os.Exit(m.Run())
//	}
package kubelet
