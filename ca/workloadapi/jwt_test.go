// SPDX-License-Identifier: Apache-2.0

package workloadapi_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	spiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/isthmus-mesh/isthmus/ca/workloadapi"
)

// tokens are those of a real authority, for one workload; a test may hold the keys back.
type tokens struct {
	authority *ca.JWTAuthority
	subject   ca.Subject
	err       error

	mu      sync.Mutex
	old     []byte // shown instead of the present keys
	changed chan struct{}
}

func (k *tokens) JWTSVID(ctx context.Context, audience []string) (string, error) {
	if k.err != nil {
		return "", k.err
	}
	issued, err := k.authority.Issue(ctx, ca.JWTRequest{Subject: k.subject, Audience: audience})
	return issued.Token, err
}

func (k *tokens) JWTKeys(context.Context) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.old != nil {
		return k.old, k.err
	}
	return k.authority.Bundle(), k.err
}

func (k *tokens) JWTKeysChanged() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.old != nil {
		return k.changed
	}
	return k.authority.Changed()
}

// release shows the present keys.
func (k *tokens) release() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.old = nil
	close(k.changed)
}

func newTokens(t testing.TB, authority *catest.CA) *tokens {
	t.Helper()
	j, err := ca.OpenJWT(t.Context(), authority.Authority, ca.JWTConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return &tokens{authority: j, subject: catest.Subject("kube:c1", "pod-1", "shop"), changed: make(chan struct{})}
}

// The library that everybody uses gets tokens, verifies them, and is told of new keys.
func TestUnmodifiedClientOfTokens(t *testing.T) {
	t.Parallel()
	authority := catest.New(t)
	k := newTokens(t, authority)
	address := serve(t, &workloadapi.Server{Source: &held{svid: issued(t, authority, "shop")}, Tokens: k})
	source, err := spiffe.NewJWTSource(within(t), spiffe.WithClientOptions(spiffe.WithAddr(address)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.FetchJWTSVID(within(t), jwtsvid.Params{Audience: "billing", ExtraAudiences: []string{"stock"}})
	if err != nil {
		t.Fatal(err)
	}
	const want = "spiffe://cluster.local/ns/shop/sa/default"
	if svid.ID.String() != want || len(svid.Audience) != 2 {
		t.Errorf("got %s for %v", svid.ID, svid.Audience)
	}
	ctx := within(t)
	for { // the first key of this source was made by the first token
		if _, err = jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"stock"}); err == nil {
			break
		}
		if waited := source.WaitUntilUpdated(ctx); waited != nil {
			t.Fatalf("the library does not verify what it got: %v", err)
		}
	}
	client, err := spiffe.New(within(t), spiffe.WithAddr(address))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if said, err := client.ValidateJWTSVID(within(t), svid.Marshal(), "billing"); err != nil || said.ID.String() != want || said.Claims["jti"] == "" {
		t.Errorf("the server says %v, %v", said, err)
	}
	if _, err := client.ValidateJWTSVID(within(t), svid.Marshal(), "bank"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("for another audience: %v", err)
	}
}

// The rules of the JWT profile of the SPIFFE Workload API, by the names they have in this project.
func TestSpiffeWorkloadAPITokens(t *testing.T) {
	t.Parallel()
	authority := catest.New(t)
	k := newTokens(t, authority)
	api := workload.NewSpiffeWorkloadAPIClient(dial(t, serve(t, &workloadapi.Server{Source: &held{svid: issued(t, authority, "shop")}, Tokens: k})))
	const own = "spiffe://cluster.local/ns/shop/sa/default"
	first, err := api.FetchJWTSVID(withHeader(within(t)), &workload.JWTSVIDRequest{Audience: []string{"billing"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("W-10", func(t *testing.T) {
		t.Parallel()
		for name, c := range map[string]struct {
			audience []string
			id       string
			want     codes.Code
		}{
			"all identities":      {[]string{"billing"}, "", codes.OK},
			"its own":             {[]string{"billing"}, own, codes.OK},
			"no audience":         {nil, "", codes.InvalidArgument},
			"an empty audience":   {[]string{"billing", ""}, "", codes.InvalidArgument},
			"another's":           {[]string{"billing"}, "spiffe://cluster.local/ns/bank/sa/root", codes.PermissionDenied},
			"something else":      {[]string{"billing"}, "root", codes.InvalidArgument},
			"much too long an ID": {[]string{"billing"}, own + strings.Repeat("a", 2048), codes.InvalidArgument},
		} {
			answer, err := api.FetchJWTSVID(withHeader(within(t)), &workload.JWTSVIDRequest{Audience: c.audience, SpiffeId: c.id})
			if status.Code(err) != c.want || err == nil && (len(answer.GetSvids()) != 1 || answer.GetSvids()[0].GetSpiffeId() != own) {
				t.Errorf("%s: %v, %v; want %v", name, answer, err, c.want)
			}
		}
	})
	t.Run("W-9 only keys of tokens", func(t *testing.T) {
		t.Parallel()
		stream, err := api.FetchJWTBundles(withHeader(within(t)), &workload.JWTBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		bundle := answer.GetBundles()["spiffe://cluster.local"]
		if len(answer.GetBundles()) != 1 || bytes.Contains(bundle, []byte("x5c")) || bytes.Contains(bundle, []byte(`"d"`)) || bytes.Count(bundle, []byte(`"use":"jwt-svid"`)) != 1 {
			t.Errorf("bundles %v", answer)
		}
	})
	t.Run("W-7 mandatory fields", func(t *testing.T) {
		t.Parallel()
		for _, in := range []*workload.ValidateJWTSVIDRequest{{}, {Audience: "billing"}, {Svid: first.GetSvids()[0].GetSvid()}} {
			if _, err := api.ValidateJWTSVID(withHeader(within(t)), in); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%v: %v", in, err)
			}
		}
	})
	t.Run("J-5 another trust domain", func(t *testing.T) {
		t.Parallel()
		td, err := ca.ParseTrustDomain("other.example")
		if err != nil {
			t.Fatal(err)
		}
		other := newTokens(t, catest.New(t, func(c *ca.Config) { c.TrustDomain = td }))
		token, err := other.JWTSVID(t.Context(), []string{"billing"})
		if err != nil {
			t.Fatal(err)
		}
		// Even with the other domain's key among ours: a key counts for its own domain only.
		pooled := &tokens{authority: other.authority, changed: make(chan struct{})}
		server := serve(t, &workloadapi.Server{Source: &held{svid: issued(t, authority, "shop")}, Tokens: pooled})
		_, err = workload.NewSpiffeWorkloadAPIClient(dial(t, server)).ValidateJWTSVID(withHeader(within(t)), &workload.ValidateJWTSVIDRequest{Audience: "billing", Svid: token})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("a token of another trust domain: %v", err)
		}
	})
	t.Run("W-4 codes", func(t *testing.T) {
		t.Parallel()
		for _, c := range []struct {
			err  error
			want codes.Code
		}{
			{errors.New("away"), codes.Unavailable}, {status.Error(codes.Unauthenticated, "x"), codes.Unavailable},
			{status.Error(codes.PermissionDenied, "x"), codes.PermissionDenied}, {status.Error(codes.InvalidArgument, "x"), codes.InvalidArgument},
		} {
			server := serve(t, &workloadapi.Server{Source: &held{svid: issued(t, authority, "shop")}, Tokens: &tokens{err: c.err, authority: k.authority}})
			_, err := workload.NewSpiffeWorkloadAPIClient(dial(t, server)).FetchJWTSVID(withHeader(within(t)), &workload.JWTSVIDRequest{Audience: []string{"a"}})
			if status.Code(err) != c.want {
				t.Errorf("%v: %v, want %v", c.err, err, c.want)
			}
		}
	})
}

// A token of a key that is newer than the bundle here is not refused for it: the keys are on their way.
func TestNewerKeyIsWaitedFor(t *testing.T) {
	t.Parallel()
	authority := catest.New(t)
	k := newTokens(t, authority)
	k.old = []byte(`{"keys":[]}`)
	token, err := k.JWTSVID(t.Context(), []string{"billing"})
	if err != nil {
		t.Fatal(err)
	}
	api := workload.NewSpiffeWorkloadAPIClient(dial(t, serve(t, &workloadapi.Server{Source: &held{svid: issued(t, authority, "shop")}, Tokens: k})))
	answered := make(chan error, 1)
	go func() {
		_, err := api.ValidateJWTSVID(withHeader(within(t)), &workload.ValidateJWTSVIDRequest{Audience: "billing", Svid: token})
		answered <- err
	}()
	k.release()
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// Whatever a request holds, it is refused, or answered with the workload's own identity.
func FuzzRequest(f *testing.F) {
	authority := catest.New(f)
	k := newTokens(f, authority)
	server := &workloadapi.Server{Source: &held{svid: issued(f, authority, "shop")}, Tokens: k}
	token, err := k.JWTSVID(f.Context(), []string{"a"})
	if err != nil {
		f.Fatal(err)
	}
	fetch, err := proto.Marshal(&workload.JWTSVIDRequest{Audience: []string{"a"}})
	if err != nil {
		f.Fatal(err)
	}
	validate, err := proto.Marshal(&workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(fetch, validate)
	f.Add([]byte("\n\x01a\x12\x03x/y"), []byte("\n\x01a\x12\x03a.b"))
	f.Fuzz(func(t *testing.T, fetch, validate []byte) {
		const own = "spiffe://cluster.local/ns/shop/sa/default"
		fetched, validated := workloadapi.CallUndecoded(t, server, fetch, validate)
		if fetched != nil && fetched.GetSvids()[0].GetSpiffeId() != own || validated != nil && validated.GetSpiffeId() != own {
			t.Errorf("%v %v", fetched, validated)
		}
	})
}
