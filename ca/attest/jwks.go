// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/go-jose/go-jose/v4"
)

// Limits of a key set.
const (
	maxJWKS = 256 << 10
	maxKeys = 64
)

// ParseJWKS reads the public signing keys of a cluster. Elements of other kinds are left out, as the standard
// wants; a set without any usable key is an error. Join uses it to refuse a key set before it is kept.
func ParseJWKS(text []byte) ([]jose.JSONWebKey, error) {
	if len(text) > maxJWKS {
		return nil, fmt.Errorf("key set of %d bytes, at most %d", len(text), maxJWKS)
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(text, &set); err != nil {
		return nil, fmt.Errorf("key set: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("key set of %d keys, at most %d", len(set.Keys), maxKeys)
	}
	var out []jose.JSONWebKey
	for _, element := range set.Keys {
		var key jose.JSONWebKey
		if key.UnmarshalJSON(element) == nil && usable(key) {
			out = append(out, key)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("key set of %d keys has no public RSA or ECDSA signing key with a kid", len(set.Keys))
	}
	return out, nil
}

// usable accepts public keys for signatures that somebody could not just compute.
func usable(key jose.JSONWebKey) bool {
	if key.KeyID == "" || key.Use != "" && key.Use != "sig" || !key.Valid() {
		return false
	}
	switch k := key.Key.(type) {
	case *rsa.PublicKey:
		return k.N.BitLen() >= 2048 && k.N.BitLen() <= 8192
	case *ecdsa.PublicKey:
		return true
	}
	return false
}

// keyCache remembers parsed key sets.
type keyCache struct {
	mu   sync.Mutex
	sets map[string]parsedSet // by cluster
}

type parsedSet struct {
	text []byte
	keys []jose.JSONWebKey
}

// of gives the keys of a cluster; none if its key set is not readable.
func (c *keyCache) of(cluster ClusterKeys) []jose.JSONWebKey {
	c.mu.Lock()
	defer c.mu.Unlock()
	if have, ok := c.sets[cluster.ClusterID]; ok && bytes.Equal(have.text, cluster.JWKS) {
		return have.keys
	}
	keys, err := ParseJWKS(cluster.JWKS)
	if err != nil {
		keys = nil
	}
	if c.sets == nil || len(c.sets) > 10_000 {
		c.sets = make(map[string]parsedSet)
	}
	c.sets[cluster.ClusterID] = parsedSet{bytes.Clone(cluster.JWKS), keys}
	return keys
}
