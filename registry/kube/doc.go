// SPDX-License-Identifier: Apache-2.0

// Package kube is everything about a member cluster: its source of records, the
// credentials with which meshd reads it, and what it is given when it joins.
package kube
