// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Store keeps one certificate with its key and roots in a single PEM file of
// mode 0600: key, leaf, intermediates, roots. One file, because two could be
// torn apart by a crash between their renames.
type Store struct {
	// Path is the file; its folder must exist.
	Path string
}

// Load returns the stored certificate, or ErrNoCertificate if there is none.
// It may have expired.
func (s *Store) Load() (*Certificate, error) {
	data, err := os.ReadFile(s.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoCertificate
	}
	if err != nil {
		return nil, fmt.Errorf("read stored certificate: %w", err)
	}
	cert, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("stored certificate %s: %w", s.Path, err)
	}
	return cert, nil
}

// Save replaces the stored certificate; after a crash the file holds either
// the old one or the new one.
func (s *Store) Save(c *Certificate) error {
	return replace(s.Path, encode(c))
}

// LoadKey returns the key of the first request, nil if none is stored.
func (s *Store) LoadKey() crypto.Signer {
	data, err := os.ReadFile(s.keyPath())
	if err != nil {
		return nil
	}
	key, _, err := decodeKey(data)
	if err != nil {
		return nil
	}
	return key
}

// SaveKey keeps the key of the first request beside the certificate.
func (s *Store) SaveKey(key crypto.Signer) error {
	data, err := encodeKey(key)
	if err != nil {
		return err
	}
	return replace(s.keyPath(), data)
}

func (s *Store) keyPath() string { return s.Path + ".key" }

func replace(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".identity-*") // mode 0600 by definition
	if err != nil {
		return fmt.Errorf("store certificate: %w", err)
	}
	defer os.Remove(f.Name()) // gone already after a successful rename
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("store certificate: %w", err)
	}
	return nil
}

func encode(c *Certificate) []byte {
	return bytes.Join([][]byte{c.KeyPEM, c.ChainPEM, c.RootsPEM}, nil)
}

// decode tells roots from intermediates by what makes a root one: it is its
// own issuer.
func decode(data []byte) (*Certificate, error) {
	key, rest, err := decodeKey(data)
	if err != nil {
		return nil, err
	}
	certs, err := parseCertificates(rest)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadChain, err)
	}
	var chain []string
	var roots []*x509.Certificate
	for _, c := range certs {
		if bytes.Equal(c.RawIssuer, c.RawSubject) && c.IsCA && c.CheckSignatureFrom(c) == nil {
			roots = append(roots, c)
			continue
		}
		chain = append(chain, string(encodeCertificates([]*x509.Certificate{c})))
	}
	return assemble(key, append(chain, string(encodeCertificates(roots))))
}

func decodeKey(data []byte) (crypto.Signer, []byte, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, nil, fmt.Errorf("%w: does not begin with a private key", ErrBadChain)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrBadChain, err)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("%w: key of type %T cannot sign", ErrBadChain, parsed)
	}
	return key, rest, nil
}
