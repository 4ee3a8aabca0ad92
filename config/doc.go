// SPDX-License-Identifier: Apache-2.0

// Package config is users' intent: Istio, Gateway API and Multi-Cluster Services objects,
// decoded, validated and indexed.
//
//	federation.Snapshot.Objects ─► Decode ─► Index ─► xds asks
//
// Every object keeps its place and gets a Status, whatever it is: objects of remote
// clusters are ignored and say so, kinds and fields that are not translated yet say
// so, and what cannot be read is quarantined with the field and the value that are
// wrong. Nothing a member cluster sends is fatal, and nothing is ignored silently.
//
// An Index is immutable and a pure function of the objects and the clusters' roles.
// Its semantics are Istio's; where a lookup order matters, the function says which.
package config

import "github.com/isthmus-mesh/isthmus/federation"

// RootNamespace is where mesh-wide configuration lives, as in Istio.
const RootNamespace = "istio-system"

// The codes of this package's findings; `mesh explain` has the long text.
const (
	CodeNotTranslated = "MESH5001"
	CodeConflict      = "MESH5002"
	CodeInvalid       = "MESH5003"
	CodeIgnored       = "MESH5004"
)

// State is what became of an object.
type State string

// The states.
const (
	Active           State = "Active"           // in effect, as far as Notes do not say otherwise
	NotYetTranslated State = "NotYetTranslated" // kept; no effect yet
	IgnoredOnRemote  State = "IgnoredOnRemote"  // its cluster contributes services only
	Conflict         State = "Conflict"         // another object is in effect in its place
	Invalid          State = "Invalid"          // quarantined: it cannot be read, or means nothing
	UnknownKind      State = "UnknownKind"      // quarantined: no API of this mesh
)

// Status is what an object's owner should know about it.
type Status struct {
	State State

	// Message says why, where State alone does not.
	Message string

	// Notes are details, each "<what>: <field>[: <why>]", such as
	// "NotYetTranslated: spec.http[0].fault" or "UnknownField: spec.hots". Ordered.
	Notes []string
}

// ID is how findings name an object: "kind namespace/name @ source".
func ID(o *federation.Object) string {
	return o.Kind + " " + o.Namespace + "/" + o.Name + " @ " + string(o.Source)
}
