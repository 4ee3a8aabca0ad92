// SPDX-License-Identifier: Apache-2.0

package onboard

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strings"
)

// ScriptName is what the script is called on the machine.
const ScriptName = "mesh-onboard.sh"

// LineOptions are what the printed line is made of.
type LineOptions struct {
	// Address is host:port under which the machine reaches meshd's HTTPS.
	Address string
	// Name of the machine.
	Name string
	// RootPEM is the mesh's root certificate, with which the script is fetched.
	RootPEM []byte
	// Script is the script's content; its checksum is on the line.
	Script []byte
}

// Line is what `mesh vm onboard` prints for the machine's owner to paste.
//
// The root certificate itself is on it, so that not even the script is fetched
// from a server nobody verified, and no option that switches verification off
// is needed. A root of the kind meshd makes is some ten lines of text; the
// public key of meshd's own certificate would be shorter to pin, but changes
// whenever that certificate is renewed. The token is not on the line: the
// script asks for it, because a shell keeps what it was given.
// It asks for sudo where there is one, and is root already where there is none.
func Line(o LineOptions) (string, error) {
	fingerprint, err := Fingerprint(o.RootPEM)
	if err != nil {
		return "", err
	}
	block, _ := pem.Decode(o.RootPEM)
	var quoted []string
	for line := range strings.Lines(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes}))) {
		quoted = append(quoted, "'"+strings.TrimSpace(line)+"'")
	}
	script := sha256.Sum256(o.Script)
	return fmt.Sprintf(
		"printf '%%s\\n' %s > mesh-root.pem && curl -fsS --cacert mesh-root.pem -o %s https://%s/onboard/onboard.sh && "+
			"echo \"%s  %s\" | sha256sum -c && $(command -v sudo) sh %s --server %s --name %s --ca mesh-root.pem --ca-sha256 %s",
		strings.Join(quoted, " "), ScriptName, o.Address,
		hex.EncodeToString(script[:]), ScriptName, ScriptName, o.Address, o.Name, fingerprint,
	), nil
}

// Fingerprint is the SHA-256 of the first certificate's DER in hex: what
// `openssl x509 -fingerprint -sha256` shows, without the colons, and what a
// shell can compute with base64 and sha256sum alone.
func Fingerprint(rootPEM []byte) (string, error) {
	block, _ := pem.Decode(rootPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return "", fmt.Errorf("%w: the root is not a PEM certificate", ErrInvalid)
	}
	sum := sha256.Sum256(block.Bytes)
	return hex.EncodeToString(sum[:]), nil
}
