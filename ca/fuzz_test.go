// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/url"
	"testing"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// FuzzCSR: a request is refused as such, or its certificate is the subject's and nobody else's.
func FuzzCSR(f *testing.F) {
	c := catest.New(f)
	own, err := url.Parse("spiffe://cluster.local/ns/shop/sa/reviews")
	if err != nil {
		f.Fatal(err)
	}
	for _, template := range []*x509.CertificateRequest{nil, {URIs: []*url.URL{own}}, {DNSNames: []string{"*"}}} {
		text := catest.CSR(f, catest.Key(f), template)
		block, _ := pem.Decode(text)
		f.Add(text)
		f.Add(block.Bytes)
	}
	f.Fuzz(func(t *testing.T, csr []byte) {
		issued, err := c.Issue(t.Context(), ca.Request{Subject: reviews, CSR: csr, AllowRSA: true})
		if err != nil {
			if !errors.Is(err, ca.ErrRequest) && !errors.Is(err, ca.ErrForeignName) {
				t.Errorf("Issue = %v", err)
			}
			return
		}
		if id, err := c.Verify([]*x509.Certificate{issued.Leaf, issued.Intermediate}); err != nil || id.Subject != reviews {
			t.Errorf("issued %+v, %v", id, err)
		}
	})
}

// FuzzChain: only what the authority signed is trusted.
func FuzzChain(f *testing.F) {
	c := catest.New(f)
	cert := c.Leaf(f, reviews)
	f.Add(cert.Certificate[0], cert.Certificate[1])
	f.Fuzz(func(t *testing.T, leaf, issuer []byte) {
		var chain []*x509.Certificate
		for _, der := range [][]byte{leaf, issuer} {
			parsed, err := x509.ParseCertificate(der)
			if err != nil {
				return
			}
			chain = append(chain, parsed)
		}
		if id, err := c.Verify(chain); err == nil && (id.Subject != reviews || !bytes.Equal(leaf, cert.Certificate[0])) {
			t.Errorf("trusted as %+v", id)
		}
	})
}

// FuzzState: a value in the state is an error or decodes to something that encodes again.
func FuzzState(f *testing.F) {
	c := catest.New(f)
	c.Leaf(f, reviews)
	if err := c.Revoke(f.Context(), east, "pod-1", "x"); err != nil {
		f.Fatal(err)
	}
	entries, err := c.State.List(f.Context(), "")
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range entries {
		f.Add(e.Key, e.Value)
	}
	f.Add("authorities/root", []byte(`{"v":1,"body":{"scope":"root","issuers":[null]}}`))
	f.Add("authorities/root", []byte(`{"v":1,"body":null}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		again, err := ca.DecodeUnsealed(key, value)
		if err != nil {
			return
		}
		if _, err := ca.DecodeUnsealed(key, again); err != nil {
			t.Errorf("%q decodes, and not after it was encoded again: %v", value, err)
		}
	})
}

// FuzzAudit: no log passes that was not written line by line.
func FuzzAudit(f *testing.F) {
	f.Add([]byte(`{"seq":1,"prev":"","hash":"00"}` + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		head, err := ca.VerifyAudit(bytes.NewReader(text))
		if err == nil && head.Sequence > 0 && bytes.Count(text, []byte("\n")) < int(head.Sequence)-1 {
			t.Errorf("%d lines out of %q", head.Sequence, text)
		}
	})
}

// FuzzSealed: what was not sealed does not open.
func FuzzSealed(f *testing.F) {
	s := sealer(f)
	good, err := s.Seal("name", []byte("secret"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, sealed []byte) {
		if plain, err := s.Open("name", sealed); err == nil && !bytes.Equal(sealed, good) {
			t.Errorf("opened to %q", plain)
		}
	})
}
