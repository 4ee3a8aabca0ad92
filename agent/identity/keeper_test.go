// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// authority issues leaves with a life of one hour, root first in memory.
type authority struct {
	root    *x509.Certificate
	rootPEM string
	key     *ecdsa.PrivateKey
	serial  int64

	mu       sync.Mutex
	fail     error          // answer of the next requests, nil to issue; see answer
	byCert   error          // answer to requests with a certificate
	keys     []string       // public keys asked for
	with     []*Certificate // credentials shown, nil for the token
	lifetime time.Duration
	early    time.Duration // how much its clock is early
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{root: root, key: key, lifetime: time.Hour, rootPEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
}

// answer decides about the next requests: nil issues.
func (a *authority) answer(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fail = err
}

// Issue implements Issuer.
func (a *authority) Issue(_ context.Context, csr []byte, current *Certificate) ([]string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	block, _ := pem.Decode(csr)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(request.PublicKey)
	if err != nil {
		return nil, err
	}
	a.keys, a.with = append(a.keys, string(public)), append(a.with, current)
	if current != nil && a.byCert != nil {
		return nil, a.byCert
	}
	if a.fail != nil {
		return nil, a.fail
	}
	return a.sign(request.PublicKey)
}

func (a *authority) sign(public any) ([]string, error) {
	a.serial++
	id, _ := url.Parse("spiffe://cluster.local/ns/shop/sa/web")
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), URIs: []*url.URL{id}, NotBefore: time.Now().Add(a.early - time.Minute), NotAfter: time.Now().Add(a.early + a.lifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, public, a.key)
	if err != nil {
		return nil, err
	}
	return []string{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), a.rootPEM}, nil
}

// keep runs a keeper in the bubble of a synctest.
func keep(t *testing.T, k *Keeper) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

func serial(t *testing.T, k *Keeper) int64 {
	t.Helper()
	cert, err := k.Current()
	if err != nil {
		t.Fatal(err)
	}
	return cert.Leaf.SerialNumber.Int64()
}

func TestRenewsAroundHalfOfItsLife(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		jitter float64
		after  time.Duration
	}{{0, 27 * time.Minute}, {0.5, 30 * time.Minute}, {0.999, 33 * time.Minute}} {
		synctest.Test(t, func(t *testing.T) {
			a := newAuthority(t)
			k := &Keeper{Issuer: a, Jitter: func() float64 { return c.jitter }}
			keep(t, k)
			synctest.Wait()
			if got := serial(t, k); got != 1 {
				t.Fatalf("serial %d at the start", got)
			}
			time.Sleep(c.after - time.Second)
			synctest.Wait()
			if got := serial(t, k); got != 1 {
				t.Errorf("jitter %v: renewed before %v", c.jitter, c.after)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if got := serial(t, k); got != 2 {
				t.Errorf("jitter %v: not renewed at %v", c.jitter, c.after)
			}
			if a.with[0] != nil || a.with[1] == nil {
				t.Error("the first certificate needs the token, the second the first certificate")
			}
			if a.keys[0] == a.keys[1] {
				t.Error("a renewal makes a new key")
			}
		})
	}
}

func TestRenewsWhenAsked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		k := &Keeper{Issuer: a}
		keep(t, k)
		synctest.Wait()
		for want := int64(2); want < 5; want++ {
			k.Renew()
			k.Renew() // one wish, until it is met
			synctest.Wait()
			if got := serial(t, k); got != want {
				t.Fatalf("serial %d, want %d", got, want)
			}
		}
		if a.with[1] == nil || a.keys[0] == a.keys[1] {
			t.Error("a renewal shows the certificate and makes a new key")
		}
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if got := serial(t, k); got != 4 {
			t.Errorf("serial %d: nobody asked again", got)
		}
	})
}

func TestKeepsTheOldOneWhileTheServiceIsAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		k := &Keeper{Issuer: a, Jitter: func() float64 { return 0 }}
		keep(t, k)
		synctest.Wait()
		a.answer(errors.New("away"))
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		if got := serial(t, k); got != 1 {
			t.Fatalf("serial %d", got)
		}
		if n := len(a.keys); n < 20 || n > 400 {
			t.Errorf("%d attempts in 23 minutes: want patience without sleep", n)
		}
		a.answer(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := serial(t, k); got != 2 {
			t.Errorf("serial %d, want a renewal soon after the service is back", got)
		}
	})
}

func TestARefusedRenewalFallsBackToTheTokenAndItsKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		a.byCert = fmt.Errorf("%w: cut off", ErrRefused)
		k := &Keeper{Issuer: a, Jitter: func() float64 { return 0 }}
		keep(t, k)
		time.Sleep(28 * time.Minute)
		synctest.Wait()
		if got := serial(t, k); got != 2 {
			t.Fatalf("serial %d", got)
		}
		if len(a.keys) != 3 || a.keys[0] != a.keys[2] {
			t.Error("the service binds a token to its first key, so that key must come again")
		}
	})
}

func TestSaysWhyThereIsNone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		a.answer(errors.New("the grant does not cover namespace shop"))
		k := &Keeper{Issuer: a}
		keep(t, k)
		synctest.Wait()
		if _, err := k.Current(); !errors.Is(err, ErrNoCertificate) || !strings.Contains(err.Error(), "grant") {
			t.Errorf("%v", err)
		}
		a.answer(nil)
		if _, err := k.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestARebootNeedsNobody(t *testing.T) {
	t.Parallel()
	store := &Store{Path: filepath.Join(t.TempDir(), "identity.pem")}
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		ctx, cancel := context.WithCancel(t.Context())
		first := &Keeper{Issuer: a, Store: store}
		done := make(chan error, 1)
		go func() { done <- first.Run(ctx) }()
		synctest.Wait()
		cancel()
		<-done
		for _, file := range []string{store.Path, store.keyPath()} {
			info, err := os.Stat(file)
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("%s: %v, %v; want mode 0600", file, info, err)
			}
		}
		a.answer(errors.New("away"))
		second := &Keeper{Issuer: a, Store: store}
		keep(t, second)
		synctest.Wait()
		if got := serial(t, second); got != 1 {
			t.Errorf("serial %d, want the stored certificate", got)
		}
		if !bytes.Contains(second.Roots(), []byte("CERTIFICATE")) {
			t.Error("the roots were not kept")
		}
	})
}

func TestAnExpiredStoredCertificateIsNotUsed(t *testing.T) {
	t.Parallel()
	store := &Store{Path: filepath.Join(t.TempDir(), "identity.pem")}
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		first := &Keeper{Issuer: a, Store: store}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- first.Run(ctx) }()
		synctest.Wait()
		cancel()
		<-done
		time.Sleep(2 * time.Hour)
		second := &Keeper{Issuer: a, Store: store}
		keep(t, second)
		synctest.Wait()
		if got := serial(t, second); got != 2 {
			t.Errorf("serial %d", got)
		}
		if a.with[len(a.with)-1] != nil {
			t.Error("an expired certificate was shown")
		}
	})
}

func TestRootsOfTheFileJoinThoseOfTheAnswer(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "root-cert.pem")
	synctest.Test(t, func(t *testing.T) {
		a, next := newAuthority(t), newAuthority(t)
		if err := os.WriteFile(file, []byte(a.rootPEM), 0o600); err != nil {
			t.Fatal(err)
		}
		k := &Keeper{Issuer: a, RootsFile: file}
		keep(t, k)
		synctest.Wait()
		if n := bytes.Count(k.Roots(), []byte("BEGIN")); n != 1 {
			t.Fatalf("%d roots, want the same one once", n)
		}
		changed := k.Changed()
		if err := os.WriteFile(file, []byte(a.rootPEM+next.rootPEM), 0o600); err != nil {
			t.Fatal(err)
		}
		<-changed
		if n := bytes.Count(k.Roots(), []byte("BEGIN")); n != 2 {
			t.Errorf("%d roots, want the new one too", n)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if n := bytes.Count(k.Roots(), []byte("BEGIN")); n != 2 {
			t.Errorf("%d roots after the file vanished, want no change", n)
		}
	})
}

// What meshd tells replaces what was there, also the root that was taken out; an older bundle changes nothing.
func TestRootsThatMeshdTellsReplaceTheOthers(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "root-cert.pem")
	synctest.Test(t, func(t *testing.T) {
		a, next := newAuthority(t), newAuthority(t)
		if err := os.WriteFile(file, []byte(a.rootPEM), 0o600); err != nil {
			t.Fatal(err)
		}
		k := &Keeper{Issuer: a, RootsFile: file}
		keep(t, k)
		synctest.Wait()
		trust := func(sequence uint64, roots string, taken bool) {
			t.Helper()
			if ok, err := k.Trust(sequence, []byte(roots)); ok != taken || err != nil {
				t.Errorf("Trust(%d) = %v, %v", sequence, ok, err)
			}
		}
		trust(7, a.rootPEM+next.rootPEM, true)
		if n := bytes.Count(k.Roots(), []byte("BEGIN")); n != 2 {
			t.Errorf("%d roots", n)
		}
		trust(6, a.rootPEM, false)
		trust(8, next.rootPEM, true)
		if got := string(k.Roots()); got != next.rootPEM {
			t.Errorf("roots %s", got)
		}
		if _, err := k.Trust(9, []byte("nothing")); err == nil {
			t.Error("an empty bundle is taken")
		}
		// What comes with a later answer counts besides: whoever told the bundle may have gone.
		k.Renew()
		time.Sleep(time.Minute)
		if n := bytes.Count(k.Roots(), []byte("BEGIN")); n != 2 {
			t.Errorf("%d roots after a renewal", n)
		}
	})
}

func TestUnusableAnswersAreNamed(t *testing.T) {
	t.Parallel()
	a, other := newAuthority(t), newAuthority(t)
	mine, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	good, err := a.sign(mine.Public())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := a.sign(theirs.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		chain []string
		want  string
	}{
		{"leaf alone", good[:1], "1 elements"},
		{"for another key", foreign, "another key"},
		{"from another root", []string{good[0], other.rootPEM}, "unknown authority"},
		{"no PEM", []string{"x", good[1]}, "element 0"},
		{"no root", []string{good[0], ""}, "root"},
		{"a root as leaf", []string{a.rootPEM, a.rootPEM}, "another key"},
	} {
		if _, err := assemble(mine, c.chain); !errors.Is(err, ErrBadChain) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if _, err := assemble(mine, good); err != nil {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nMC4=\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cert, err := decode(data)
		if err == nil && (cert.Leaf == nil || len(cert.RootsPEM) == 0) {
			t.Fatal("half a certificate")
		}
	})
}

func FuzzAssemble(f *testing.F) {
	key, err := newKey()
	if err != nil {
		f.Fatal(err)
	}
	f.Add("a", "b")
	f.Fuzz(func(t *testing.T, leaf, root string) {
		if cert, err := assemble(key, []string{leaf, root}); err == nil && cert.URI() == "" {
			t.Fatal("accepted a certificate without name")
		}
	})
}

// A39: a certificate from an authority whose clock is early is not shown to peers before they would believe it,
// while there is one that they do believe.
func TestAttackA39NotYetValid(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		k := &Keeper{Issuer: a, Jitter: func() float64 { return 0.5 }}
		keep(t, k)
		synctest.Wait()
		first := serial(t, k)
		a.mu.Lock()
		a.early = 6 * time.Minute
		a.mu.Unlock()
		time.Sleep(34 * time.Minute) // renewed at 30, valid from 35
		synctest.Wait()
		if got := serial(t, k); got != first {
			t.Errorf("serial %d before it is valid, want %d", got, first)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := serial(t, k); got != first+1 {
			t.Errorf("serial %d once it is valid, want %d", got, first+1)
		}
		// When the present one ends first, the new one is the better of two that are refused.
		a.mu.Lock()
		a.early = 5 * time.Hour
		a.mu.Unlock()
		cert, err := k.Current()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(cert.Leaf.NotAfter) + time.Second)
		synctest.Wait()
		if got := serial(t, k); got != first+2 {
			t.Errorf("serial %d after the present one ended, want %d", got, first+2)
		}
	})
}
