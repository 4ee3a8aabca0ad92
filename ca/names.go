// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

var (
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
)

// Context tags of GeneralName (RFC 5280, 4.2.1.6) that have a meaning here.
const (
	nameDNS = 2
	nameURI = 6
	nameIP  = 7
)

// maxNames bounds the alternative names of one certificate or request.
const maxNames = 64

// generalName is one subject alternative name with the very bytes that are in the certificate, because what
// another library makes of them may differ from what this one makes of them.
type generalName struct {
	kind  int
	bytes []byte
}

// altNames reads the subject alternative names out of a list of extensions.
func altNames(extensions []pkix.Extension) ([]generalName, error) {
	var names []generalName
	seen := false
	for _, ext := range extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		if seen {
			return nil, errors.New("subject alternative names appear twice")
		}
		seen = true
		var err error
		if names, err = parseAltNames(ext.Value); err != nil {
			return nil, err
		}
	}
	return names, nil
}

func parseAltNames(der []byte) ([]generalName, error) {
	input := cryptobyte.String(der)
	var sequence cryptobyte.String
	if !input.ReadASN1(&sequence, cbasn1.SEQUENCE) || !input.Empty() {
		return nil, errors.New("subject alternative names: not a sequence")
	}
	var names []generalName
	for !sequence.Empty() {
		var value cryptobyte.String
		var tag cbasn1.Tag
		if !sequence.ReadAnyASN1(&value, &tag) {
			return nil, errors.New("subject alternative names: malformed name")
		}
		if len(names) == maxNames {
			return nil, fmt.Errorf("more than %d subject alternative names", maxNames)
		}
		names = append(names, generalName{kind: int(tag &^ 0xe0), bytes: value})
	}
	return names, nil
}

// uris picks the URIs, as strings.
func uris(names []generalName) []string {
	var out []string
	for _, n := range names {
		if n.kind == nameURI {
			out = append(out, string(n.bytes))
		}
	}
	return out
}
