// SPDX-License-Identifier: Apache-2.0

package federation

import "time"

// ClusterRole tells what a cluster contributes.
type ClusterRole string

// The cluster roles.
const (
	Primary ClusterRole = "primary" // services and configuration
	Remote  ClusterRole = "remote"  // services only; its configuration objects do nothing, and say so
)

// Cluster is one joined Kubernetes cluster, without its credential.
type Cluster struct {
	ID        ClusterID   `json:"id"`
	Name      string      `json:"name"`
	Network   Network     `json:"network"` // of pods without a label of their own
	Role      ClusterRole `json:"role"`
	APIServer string      `json:"apiServer"`
	Joined    time.Time   `json:"joined"`
	Grant     Grant       `json:"grant"`

	// Ranges are what is known of its addresses, for findings only.
	Ranges AddressRanges `json:"ranges,omitzero"`

	// Draining clusters keep their proxies, but contribute no endpoints to others.
	Draining bool `json:"draining,omitempty"`

	Conditions []Condition `json:"conditions,omitempty"`
}

// Condition is a transition of state; ages and lags live in memory only.
type Condition struct {
	Type    string    `json:"type"`   // Reachable, Synced, CredentialsValid, GatewayReady, …
	Status  bool      `json:"status"` // true is good
	Reason  string    `json:"reason,omitempty"`
	Message string    `json:"message,omitempty"`
	Since   time.Time `json:"since"`
}

// Condition types.
const (
	Reachable        = "Reachable"
	Synced           = "Synced"
	CredentialsValid = "CredentialsValid"
	GatewayReady     = "GatewayReady"
	SameCluster      = "SameCluster" // false: another cluster answers behind its address
)
