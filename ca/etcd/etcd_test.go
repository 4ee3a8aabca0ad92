// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/isthmus-mesh/isthmus/ca/etcd"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// server is one real etcd for all tests; each test has a prefix of its own.
var server *embed.Etcd

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "isthmus-ca-etcd-*")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true
	cfg.EnableGRPCGateway = false // it sets up a logger of its own, which is a data race
	anyPort := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = []url.URL{anyPort}, []url.URL{anyPort}
	if server, err = embed.StartEtcd(cfg); err != nil {
		return 0, err
	}
	defer server.Close()
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(time.Minute):
		return 0, errors.New("not ready after a minute")
	}
	return m.Run(), nil
}

func client(t testing.TB) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{server.Clients[0].Addr().String()}, Logger: zap.NewNop(), DialTimeout: 10 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func prefix(t testing.TB) string { return "/" + strings.ReplaceAll(t.Name(), "/", "_") + "/ca/" }

func state(t testing.TB) *etcd.State {
	t.Helper()
	s, err := etcd.NewState(client(t), prefix(t))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStateComparesBeforeItWrites(t *testing.T) {
	t.Parallel()
	s, ctx := state(t), t.Context()
	if _, err := s.Fetch(ctx, "a/x"); !errors.Is(err, ca.ErrNotFound) {
		t.Fatalf("Fetch of nothing = %v, want ErrNotFound", err)
	}
	first, err := s.Create(ctx, "a/x", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, "a/x", []byte("2")); !errors.Is(err, ca.ErrExists) {
		t.Errorf("second Create = %v, want ErrExists", err)
	}
	second, err := s.Replace(ctx, "a/x", []byte("2"), first)
	if err != nil || second <= first {
		t.Fatalf("Replace = %d, %v; want more than %d", second, err, first)
	}
	if _, err := s.Replace(ctx, "a/x", []byte("3"), first); !errors.Is(err, ca.ErrChanged) {
		t.Errorf("Replace of an old version = %v, want ErrChanged", err)
	}
	if _, err := s.Replace(ctx, "a/y", []byte("3"), 0); !errors.Is(err, ca.ErrChanged) {
		t.Errorf("Replace of nothing = %v, want ErrChanged", err)
	}
	if _, err := s.Create(ctx, "b/x", []byte("4")); err != nil {
		t.Fatal(err)
	}
	got, err := s.List(ctx, "a/")
	if err != nil || len(got) != 1 || got[0].Key != "a/x" || string(got[0].Value) != "2" || got[0].Version != second {
		t.Errorf("List = %v, %v", got, err)
	}
}

func TestStateTellsOfChanges(t *testing.T) {
	t.Parallel()
	s := state(t)
	ctx, cancel := context.WithCancel(t.Context())
	changes := s.Changes(ctx, "a/")
	await := func(what string) {
		t.Helper()
		select {
		case <-changes:
		case <-time.After(30 * time.Second):
			t.Fatalf("not told of %s", what)
		}
	}
	await("the start")
	if _, err := s.Create(ctx, "a/x", nil); err != nil {
		t.Fatal(err)
	}
	await("a change")
	cancel()
	for range changes { // closed, or the test times out
	}
}

func token(t testing.TB, name string) ca.JoinToken {
	t.Helper()
	return ca.JoinToken{Name: name, Network: "n1", Namespace: "legacy", ServiceAccount: "web"}
}

// A8: of a hundred machines that show the same token at once, to two replicas, one gets in.
func TestAttackA08JoinTokenRace(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	var replicas []*etcd.Tokens
	for range 2 {
		tokens, err := etcd.NewTokens(client(t), prefix(t), nil)
		if err != nil {
			t.Fatal(err)
		}
		replicas = append(replicas, tokens)
	}
	for round := range 5 {
		secret, what, err := replicas[0].Create(ctx, token(t, "web-1"), 0)
		if err != nil {
			t.Fatal(err)
		}
		if until := time.Until(what.Expires); until > etcd.DefaultTTL || until < etcd.DefaultTTL-time.Minute {
			t.Errorf("token lives %v, want %v", until, etcd.DefaultTTL)
		}
		var wins atomic.Int32
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				err := replicas[i%2].Spend(ctx, secret)
				if err == nil {
					wins.Add(1)
				} else if !errors.Is(err, ca.ErrJoinToken) {
					t.Errorf("Spend = %v, want ErrJoinToken", err)
				}
			})
		}
		wg.Wait()
		if wins.Load() != 1 {
			t.Fatalf("round %d: %d winners, want 1", round, wins.Load())
		}
	}
}

// A9: what is at rest is of no use, and neither is a token that is old, changed or withdrawn.
func TestAttackA09StolenJoinToken(t *testing.T) {
	t.Parallel()
	ctx, cli := t.Context(), client(t)
	clock := catest.NewClock()
	tokens, err := etcd.NewTokens(cli, prefix(t), clock.Now)
	if err != nil {
		t.Fatal(err)
	}
	secret, what, err := tokens.Create(ctx, token(t, "web-1"), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	got, err := cli.Get(ctx, prefix(t), clientv3.WithPrefix())
	if err != nil || len(got.Kvs) != 1 {
		t.Fatalf("etcd holds %d values, %v; want 1", len(got.Kvs), err)
	}
	if parts := strings.Split(secret, "."); strings.Contains(string(got.Kvs[0].Value), parts[2]) {
		t.Error("the secret is in etcd")
	}
	if read, err := tokens.Read(ctx, secret); err != nil || read != what {
		t.Errorf("Read = %+v, %v; want %+v", read, err, what)
	}
	other, _, _ := ca.NewJoinToken()
	stolen := secret[:strings.LastIndex(secret, ".")] + other[strings.LastIndex(other, "."):]
	for name, text := range map[string]string{"another secret": stolen, "unknown": other, "malformed": "isthmus-vm.x.y", "empty": ""} {
		if _, err := tokens.Read(ctx, text); !errors.Is(err, ca.ErrJoinToken) {
			t.Errorf("%s: Read = %v, want ErrJoinToken", name, err)
		}
		if err := tokens.Spend(ctx, text); !errors.Is(err, ca.ErrJoinToken) {
			t.Errorf("%s: Spend = %v, want ErrJoinToken", name, err)
		}
	}
	clock.Advance(2 * time.Minute)
	if err := tokens.Spend(ctx, secret); !errors.Is(err, ca.ErrJoinToken) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("Spend of an expired token = %v", err)
	}
	for _, bad := range []time.Duration{-time.Second, 25 * time.Hour} {
		if _, _, err := tokens.Create(ctx, token(t, "web-1"), bad); err == nil {
			t.Errorf("Create for %v succeeded", bad)
		}
	}
	if _, _, err := tokens.Create(ctx, ca.JoinToken{Name: "a/b", Network: "n", Namespace: "x", ServiceAccount: "y"}, 0); !errors.Is(err, ca.ErrSubject) {
		t.Errorf("Create for an impossible name = %v, want ErrSubject", err)
	}
}

func TestVoidWithdrawsTokens(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	tokens, err := etcd.NewTokens(client(t), prefix(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	secrets := map[string]string{}
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		if secrets[name], _, err = tokens.Create(ctx, token(t, name), 0); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := tokens.Void(ctx, "n1", "web-1"); n != 1 || err != nil {
		t.Errorf("Void of one = %d, %v", n, err)
	}
	if n, err := tokens.Void(ctx, "n2", ""); n != 0 || err != nil {
		t.Errorf("Void of another network = %d, %v", n, err)
	}
	if list, err := tokens.List(ctx); len(list) != 2 || err != nil {
		t.Errorf("List = %v, %v; want 2", list, err)
	}
	if n, err := tokens.Void(ctx, "", ""); n != 2 || err != nil {
		t.Errorf("Void of all = %d, %v", n, err)
	}
	for name, secret := range secrets {
		if err := tokens.Spend(ctx, secret); !errors.Is(err, ca.ErrJoinToken) {
			t.Errorf("%s: Spend after Void = %v, want ErrJoinToken", name, err)
		}
	}
}

// Two replicas begin at the same time, and issue for the same new cluster at the same time.
func TestReplicasAgreeOnAuthorities(t *testing.T) {
	t.Parallel()
	sealer, err := ca.NewFileSealer(filepath.Join(t.TempDir(), "sealing.key"))
	if err != nil {
		t.Fatal(err)
	}
	td, err := ca.ParseTrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	const replicas = 4
	var wg sync.WaitGroup
	authorities := make([]*ca.Authority, replicas)
	for i := range replicas {
		cfg := ca.Config{
			TrustDomain: td, State: state(t), Sealer: sealer, Log: slog.New(slog.DiscardHandler),
			Grants: ca.GrantFunc(func(ca.Source, string, string) error { return nil }),
		}
		log, err := ca.OpenAudit(filepath.Join(t.TempDir(), "audit.jsonl"), fmt.Sprint("replica-", i), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { log.Close() })
		cfg.Audit = log
		wg.Go(func() {
			var err error
			if authorities[i], err = ca.Open(t.Context(), cfg); err != nil {
				t.Errorf("Open: %v", err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	issued := make([]ca.Issued, replicas)
	for i, a := range authorities {
		wg.Go(func() {
			var err error
			subject := catest.Subject("kube:c1", fmt.Sprint("pod-", i), "shop")
			if issued[i], err = a.Issue(t.Context(), ca.Request{Subject: subject, CSR: catest.CSR(t, catest.Key(t), nil)}); err != nil {
				t.Errorf("Issue: %v", err)
			}
		})
	}
	wg.Wait()
	for i := range issued {
		if t.Failed() {
			return
		}
		if !issued[i].Intermediate.Equal(issued[0].Intermediate) || !issued[i].Roots[0].Equal(issued[0].Roots[0]) {
			t.Errorf("replica %d has authorities of its own", i)
		}
	}
	if err := authorities[0].Revoke(t.Context(), "kube:c1", "", "left"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	changed := authorities[1].Changed()
	wg.Go(func() { authorities[1].Run(ctx) })
	select {
	case <-changed:
	case <-time.After(30 * time.Second):
		t.Error("the other replica did not hear of the revocation")
	}
	if err := authorities[1].Revoked("kube:c1", "pod-1"); !errors.Is(err, ca.ErrRevoked) {
		t.Errorf("Revoked = %v, want ErrRevoked", err)
	}
	cancel()
	wg.Wait()
}

// pausedState is a replica that stops for a while between reading and writing.
type pausedState struct {
	ca.State
	pause func()
}

func (p *pausedState) Replace(ctx context.Context, key string, value []byte, version ca.Version) (ca.Version, error) {
	if pause := p.pause; pause != nil {
		p.pause = nil
		pause()
	}
	return p.State.Replace(ctx, key, value, version)
}

// A35: a replica that was paused while it exchanged an issuer does not undo what another one did meanwhile.
func TestAttackA35StaleReplica(t *testing.T) {
	t.Parallel()
	sealer, err := ca.NewFileSealer(filepath.Join(t.TempDir(), "sealing.key"))
	if err != nil {
		t.Fatal(err)
	}
	clock := catest.NewClock()
	open := func(s ca.State) *catest.CA {
		return catest.New(t, func(c *ca.Config) { c.State, c.Sealer, c.Clock = s, sealer, clock.Now })
	}
	slow := &pausedState{State: state(t)}
	stale, other := open(slow), open(state(t))
	issue := func(c *catest.CA) ca.Issued {
		t.Helper()
		issued, err := c.Issue(t.Context(), ca.Request{Subject: catest.Subject("kube:c1", "pod-1", "shop"), CSR: catest.CSR(t, catest.Key(t), nil)})
		if err != nil {
			t.Fatal(err)
		}
		return issued
	}
	before := issue(stale)
	clock.Advance(300 * 24 * time.Hour) // the issuer grows old
	var meanwhile ca.Issued
	slow.pause = func() { meanwhile = issue(other) }
	after := issue(stale)
	if meanwhile.Intermediate == nil || meanwhile.Intermediate.Equal(before.Intermediate) {
		t.Fatal("the other replica did not exchange the issuer")
	}
	if !after.Intermediate.Equal(meanwhile.Intermediate) {
		t.Error("the stale replica signs with an issuer of its own")
	}
	again := open(state(t))
	if !issue(again).Intermediate.Equal(meanwhile.Intermediate) {
		t.Error("the other replica's issuer is gone from the state")
	}
	active := 0
	for _, i := range again.Issuers() {
		if i.Scope == "kube:c1" && i.Phase == ca.PhaseActive {
			active++
		}
	}
	if active != 1 {
		t.Errorf("%d active issuers, want 1", active)
	}
}
