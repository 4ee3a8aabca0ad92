// SPDX-License-Identifier: Apache-2.0

// Package inject writes the mesh's containers into pod templates: an init
// container that programs redirection, and the proxy as a native sidecar that
// is ready before the workload starts and ends after it.
//
// Pod is the pure function, the same for the command line and for a webhook;
// YAML applies it to a stream of manifests and leaves everything else in the
// stream as it is, down to the comments. Applying twice changes nothing.
package inject
