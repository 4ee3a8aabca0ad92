// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"crypto/sha256"
	"encoding/base64"

	"github.com/isthmus-mesh/isthmus/xds"
)

// setVersion is the version of a whole list: a hash of names and versions, so that it is
// the same on every replica.
func setVersion(list []xds.Resource) string {
	h := sha256.New()
	for _, r := range list {
		h.Write([]byte(r.Name))
		h.Write([]byte{0})
		h.Write([]byte(r.Version))
		h.Write([]byte{0})
	}
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:15])
}

// setKey is the same for equal lists of names.
func setKey(list []string) string {
	h := sha256.New()
	for _, name := range list {
		h.Write([]byte(name))
		h.Write([]byte{0})
	}
	return string(h.Sum(nil))
}
