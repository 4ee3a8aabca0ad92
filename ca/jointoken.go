// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// JoinTokenPrefix begins every join token: isthmus-vm.<id>.<secret>.
const JoinTokenPrefix = "isthmus-vm."

// JoinToken is what a join token was made for: one virtual machine, once.
type JoinToken struct {
	ID             string // not secret
	Name           string // of the virtual machine
	Network        string
	Namespace      string
	ServiceAccount string
	Expires        time.Time
}

// Subject is who the token lets in.
func (j JoinToken) Subject() Subject {
	return Subject{Source: Source("vm:" + j.Network), Instance: j.Name, Namespace: j.Namespace, ServiceAccount: j.ServiceAccount}
}

const (
	joinIDSize     = 8  // bytes, in hexadecimal
	joinSecretSize = 32 // bytes, in unpadded URL base64
)

// NewJoinToken makes a token, and the parts that it consists of. The ID may be shown; the secret is to be hashed
// before it is kept.
func NewJoinToken() (token, id, secret string) {
	var random [joinIDSize + joinSecretSize]byte
	rand.Read(random[:])
	id = hex.EncodeToString(random[:joinIDSize])
	secret = base64.RawURLEncoding.EncodeToString(random[joinIDSize:])
	return JoinTokenPrefix + id + "." + secret, id, secret
}

// ParseJoinToken takes a token apart. Errors wrap ErrJoinToken and never contain it.
func ParseJoinToken(token string) (id, secret string, err error) {
	rest, ok := strings.CutPrefix(token, JoinTokenPrefix)
	id, secret, two := strings.Cut(rest, ".")
	idBytes, idErr := hex.DecodeString(id)
	secretBytes, secretErr := base64.RawURLEncoding.Strict().DecodeString(secret)
	if !ok || !two || idErr != nil || secretErr != nil || len(idBytes) != joinIDSize || len(secretBytes) != joinSecretSize ||
		id != hex.EncodeToString(idBytes) || len(secret) != base64.RawURLEncoding.EncodedLen(joinSecretSize) {
		return "", "", fmt.Errorf("%w: not a join token: want %s<id>.<secret>", ErrJoinToken, JoinTokenPrefix)
	}
	return id, secret, nil
}
