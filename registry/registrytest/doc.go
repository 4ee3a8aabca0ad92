// SPDX-License-Identifier: Apache-2.0

// Package registrytest has what tests of the registry share: a conformance suite that
// every registry.Store must pass, a source that reports what a script says, and records
// to report.
package registrytest
