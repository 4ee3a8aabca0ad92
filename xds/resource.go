// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"crypto/sha256"
	"encoding/base64"
	"sort"

	"google.golang.org/protobuf/proto"
)

// The type URLs of what Build makes. A name table has the names of one service; tables one
// behind the other are one with the names of all, since protobuf merges maps.
const (
	ClusterType   = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType  = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	ListenerType  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType     = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	NameTableType = "type.googleapis.com/istio.networking.nds.v1.NameTable"
)

// Resource is one thing a proxy is told, encoded once and shared by all that get it.
// It is immutable.
type Resource struct {
	Name string

	// Version is a hash of Body: equal on every replica and after every restart.
	Version string

	// Body is the deterministic wire encoding of the message, as it stands in the value
	// of a google.protobuf.Any.
	Body []byte

	fragment []byte // around Body; nil for those that NewResource did not make
}

// Resources is everything the proxies of one class are told: by type URL, each list
// ordered by name and without duplicates. It is immutable.
type Resources map[string][]Resource

// Get finds one resource; false if there is none of that name.
func (r Resources) Get(typeURL, name string) (Resource, bool) {
	list := r[typeURL]
	i := sort.Search(len(list), func(i int) bool { return list[i].Name >= name })
	if i < len(list) && list[i].Name == name {
		return list[i], true
	}
	return Resource{}, false
}

// NewResource encodes a message. It fails only on strings that are not UTF-8.
func NewResource(name string, m proto.Message) (Resource, error) {
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return Resource{}, err
	}
	return newResource(name, typeOf(m), body), nil
}

// newResource is the resource of a message that is encoded already.
func newResource(name, typeURL string, body []byte) Resource {
	version := versionOf(body)
	fragment := freeze(encodeFragment(name, version, typeURL, body))
	return Resource{Name: name, Version: version, Body: within(fragment, name, body), fragment: fragment}
}

// versionOf is a cryptographic hash, since a tenant who can make two bodies with the same
// version could keep an update from being sent. 120 bits are 20 characters.
func versionOf(body []byte) string {
	sum := sha256.Sum256(body)
	return base64.RawURLEncoding.EncodeToString(sum[:15])
}
