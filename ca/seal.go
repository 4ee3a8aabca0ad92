// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// Sealer protects secrets that are kept in the shared state with a key that is not. What was sealed under a
// name opens under that name only, so that values cannot be moved between keys of the state.
type Sealer interface {
	// Seal encrypts plain. The name is bound to the result, not contained in it.
	Seal(name string, plain []byte) ([]byte, error)
	// Open gives back what Seal was given under the same name. ErrSealed if the key is missing or another
	// one, ErrCorrupt if the bytes are not what Seal wrote under that name.
	Open(name string, sealed []byte) ([]byte, error)
}

// A sealed value: one byte of format, the ID of the sealing key, the value's own data key (nonce and box under
// the sealing key), the payload (nonce and box under the data key).
const (
	sealFormat  = 1
	sealKeyID   = 8
	sealNonce   = 12
	sealTag     = 16
	sealKeySize = 32
	sealHead    = 1 + sealKeyID + sealNonce + sealKeySize + sealTag
	keyFileHead = "isthmus-sealing-key-1 "
)

// FileSealer is a Sealer whose key is a file of this machine, in mode 0600. The file is made when something is
// sealed for the first time and is absent before, so that a replica which should have been given the
// key of the others fails to open their values instead of making a key of its own.
type FileSealer struct {
	path string

	mu  sync.Mutex
	key []byte // nil until the file was read or made
}

var _ Sealer = (*FileSealer)(nil)

// NewFileSealer uses the key file at path. A file that exists is read at once, and refused if others may read it.
func NewFileSealer(path string) (*FileSealer, error) {
	s := &FileSealer{path: path}
	if _, err := s.load(false); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return s, nil
}

// Path is where the key is, for messages and for backups.
func (s *FileSealer) Path() string { return s.path }

// Seal implements Sealer.
func (s *FileSealer) Seal(name string, plain []byte) ([]byte, error) {
	key, err := s.load(true)
	if err != nil {
		return nil, err
	}
	data := make([]byte, sealKeySize)
	rand.Read(data)
	out := append([]byte{sealFormat}, keyID(key)...)
	if out, err = box(out, key, "data key of "+name, data); err != nil {
		return nil, err
	}
	return box(out, data, name, plain)
}

// Open implements Sealer.
func (s *FileSealer) Open(name string, sealed []byte) ([]byte, error) {
	if len(sealed) < sealHead+sealNonce+sealTag || sealed[0] != sealFormat {
		return nil, fmt.Errorf("sealed value of %s: %w: unknown format", name, ErrCorrupt)
	}
	key, err := s.load(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s: there is no sealing key at %s; copy it from the replica that has it, or from where the backup's key is kept",
			ErrSealed, name, s.path)
	}
	if err != nil {
		return nil, err
	}
	if id := sealed[1 : 1+sealKeyID]; !bytes.Equal(id, keyID(key)) {
		return nil, fmt.Errorf("%w: %s: sealed with key %x, but %s holds key %x; replace it by the right one",
			ErrSealed, name, id, s.path, keyID(key))
	}
	data, err := unbox(sealed[1+sealKeyID:sealHead], key, "data key of "+name)
	if err == nil {
		data, err = unbox(sealed[sealHead:], data, name)
	}
	if err != nil {
		return nil, fmt.Errorf("sealed value of %s: %w", name, ErrCorrupt)
	}
	return data, nil
}

// load returns the key, from memory or from the file, and makes the file if there is none and that is wanted.
func (s *FileSealer) load(create bool) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key != nil {
		return s.key, nil
	}
	key, err := readSealingKey(s.path)
	if errors.Is(err, fs.ErrNotExist) && create {
		if err = writeSealingKey(s.path); err == nil || errors.Is(err, fs.ErrExist) {
			key, err = readSealingKey(s.path)
		}
	}
	if err != nil {
		return nil, err
	}
	s.key = key
	return key, nil
}

func readSealingKey(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("sealing key: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("sealing key %s has mode %v; want a regular file of mode 0600", path, info.Mode())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("sealing key: %w", err)
	}
	rest, ok := strings.CutPrefix(strings.TrimSpace(string(text)), keyFileHead)
	key, err := base64.StdEncoding.DecodeString(rest)
	if !ok || err != nil || len(key) != sealKeySize {
		return nil, fmt.Errorf("sealing key %s: want %q and %d bytes in base64", path, keyFileHead, sealKeySize)
	}
	return key, nil
}

// writeSealingKey makes a key file that is whole or absent, and never replaces one.
func writeSealingKey(path string) error {
	key := make([]byte, sealKeySize)
	rand.Read(key)
	tmp, err := os.CreateTemp(filepath.Dir(path), ".sealing-key-*") // 0600
	if err != nil {
		return fmt.Errorf("sealing key: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(keyFileHead + base64.StdEncoding.EncodeToString(key) + "\n")
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("sealing key: %w", err)
	}
	if err := os.Link(tmp.Name(), path); err != nil {
		return fmt.Errorf("sealing key: %w", err)
	}
	return nil
}

// keyID names a key in messages and sealed values without giving anything of it away.
func keyID(key []byte) []byte {
	sum := sha256.Sum256(append([]byte("isthmus sealing key "), key...))
	return sum[:sealKeyID]
}

// box appends a nonce and plain, encrypted, to out.
func box(out, key []byte, name string, plain []byte) ([]byte, error) {
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, sealNonce)
	rand.Read(nonce)
	out = append(out, nonce...)
	return aead.Seal(out, nonce, plain, []byte(name)), nil
}

func unbox(sealed, key []byte, name string) ([]byte, error) {
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	return aead.Open(nil, sealed[:sealNonce], sealed[sealNonce:], []byte(name))
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("sealing key: %w", err)
	}
	return cipher.NewGCM(block)
}

// digest is how bytes appear in messages, logs and names: SHA-256 in hexadecimal.
func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
