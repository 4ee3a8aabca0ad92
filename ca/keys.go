// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
)

// Keys is where the private keys of authorities live. Whoever keeps them elsewhere (a token, a cloud's key
// service) stores only a reference in the authority's record.
type Keys interface {
	// Generate makes a P-256 key for an authority of that name. The bytes are stored in the authority's
	// record and later given to Signer; they must be of no use to a reader of the record.
	Generate(ctx context.Context, name string) (crypto.Signer, []byte, error)
	// Import keeps a key that was made elsewhere, ECDSA or RSA, as Generate keeps its own.
	Import(ctx context.Context, name string, key crypto.Signer) ([]byte, error)
	// Signer gives the key back. Errors wrap ErrSealed or ErrCorrupt where that is the reason.
	Signer(ctx context.Context, name string, stored []byte) (crypto.Signer, error)
}

// SealedKeys keeps keys in the records themselves, sealed. Each has a data key of its own, which vanishes with it.
type SealedKeys struct{ Sealer Sealer }

var _ Keys = SealedKeys{}

// Generate implements Keys.
func (k SealedKeys) Generate(_ context.Context, name string) (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("key of %s: %w", name, err)
	}
	sealed, err := k.seal(name, key)
	return key, sealed, err
}

// Import implements Keys.
func (k SealedKeys) Import(_ context.Context, name string, key crypto.Signer) ([]byte, error) {
	return k.seal(name, key)
}

func (k SealedKeys) seal(name string, key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("key of %s: %w", name, err)
	}
	sealed, err := k.Sealer.Seal(sealedKeyName(name), der)
	if err != nil {
		return nil, fmt.Errorf("key of %s: %w", name, err)
	}
	return sealed, nil
}

// Signer implements Keys.
func (k SealedKeys) Signer(_ context.Context, name string, stored []byte) (crypto.Signer, error) {
	der, err := k.Sealer.Open(sealedKeyName(name), stored)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("key of %s: %w", name, ErrCorrupt)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok || checkAuthorityKey(key.Public()) != nil {
		return nil, fmt.Errorf("key of %s: %w: want ECDSA or RSA", name, ErrCorrupt)
	}
	return key, nil
}

func sealedKeyName(record string) string { return "authority key of " + record }
