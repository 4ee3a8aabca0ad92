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

// Grant is what a source is allowed to contribute and which identities it may host.
// The zero Grant is the default: every namespace but kube-*.
type Grant struct {
	// Namespaces are names or globs with one trailing "*"; empty means all but kube-*.
	Namespaces []string `json:"namespaces,omitempty"`

	// ServiceAccounts are "namespace/name" with the same globs; empty means all accounts
	// of the granted namespaces.
	ServiceAccounts []string `json:"serviceAccounts,omitempty"`
}
