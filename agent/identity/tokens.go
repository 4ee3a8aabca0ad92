// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/api"
)

// maxTokens bounds how many tokens are kept.
const maxTokens = 1000

// tokenTimeout bounds one request for a token.
const tokenTimeout = 10 * time.Second

// Tokens gets JWT-SVIDs from meshd by the workload's certificate, and follows the keys with
// which they are verified. A token is used for half of its life by everybody who asks for
// the same audiences; while meshd is away, until its end. Nothing is written to disk.
// Fields must not change once it is used.
type Tokens struct {
	// Servers are meshd's.
	Servers servers.List
	// Keeper has the certificate.
	Keeper *Keeper
	// Dial opens connections; nil uses the network as it is.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Log gets breaks of the stream of keys; nil discards.
	Log *slog.Logger

	mu      sync.Mutex
	kept    map[string]keptToken // by audiences
	keys    []byte               // nil until they have come
	changed chan struct{}
	wanted  chan struct{} // closed once somebody asks for keys
	asked   bool
}

// keptToken is a token and its times by the clock here.
type keptToken struct {
	token          string
	halfway, until time.Time
}

// JWTSVID returns a token for these audiences.
func (t *Tokens) JWTSVID(ctx context.Context, audience []string) (string, error) {
	name := nameOf(audience)
	have := t.peek(name)
	if time.Now().Before(have.halfway) {
		return have.token, nil
	}
	token, err := t.ask(ctx, audience)
	if err == nil {
		t.keep(name, token)
		return token, nil
	}
	// Only silence makes the old one do: a refusal is to be told.
	if code := status.Code(err); (code == codes.Unavailable || code == codes.DeadlineExceeded) && time.Now().Before(have.until) {
		return have.token, nil
	}
	return "", err
}

// nameOf is the same for the same audiences, and different for others.
func nameOf(audience []string) string {
	text, _ := json.Marshal(slices.Compact(slices.Sorted(slices.Values(audience)))) // strings always encode
	return string(text)
}

func (t *Tokens) peek(name string) keptToken {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.kept[name]
}

// keep remembers a token whose times can be read. By the clock here it ends as long after
// now as it was issued for, or when it says so, whichever is sooner.
func (t *Tokens) keep(name, token string) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		IssuedAt int64 `json:"iat"`
		Expiry   int64 `json:"exp"`
	}
	if err != nil || json.Unmarshal(text, &claims) != nil {
		return
	}
	now, end := time.Now(), time.Unix(claims.Expiry, 0)
	if life := now.Add(time.Duration(claims.Expiry-claims.IssuedAt) * time.Second); life.Before(end) {
		end = life
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.kept) >= maxTokens {
		for other, k := range t.kept {
			if now.After(k.halfway) {
				delete(t.kept, other)
			}
		}
	}
	if len(t.kept) >= maxTokens {
		clear(t.kept)
	}
	if t.kept == nil {
		t.kept = make(map[string]keptToken)
	}
	t.kept[name] = keptToken{token: token, halfway: now.Add(end.Sub(now) / 2), until: end}
}

func (t *Tokens) ask(ctx context.Context, audience []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, tokenTimeout)
	defer cancel()
	conn, err := t.connect()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	answer, err := api.NewIdentityClient(conn).CreateJWTSVID(ctx, &api.CreateJWTSVIDRequest{Audience: audience})
	return answer.GetToken(), err
}

// connect opens a connection that shows the present certificate.
func (t *Tokens) connect() (*grpc.ClientConn, error) {
	conn, err := t.Servers.Client(t.Dial, grpc.WithTransportCredentials(Credentials(t.Keeper)))
	if err != nil {
		return nil, fmt.Errorf("JWT service: %w", err)
	}
	return conn, nil
}

// JWTKeys returns the keys of the trust domain as soon as there are any. Nobody follows
// them before somebody has asked.
func (t *Tokens) JWTKeys(ctx context.Context) ([]byte, error) {
	for {
		changed := t.JWTKeysChanged()
		t.mu.Lock()
		if !t.asked {
			t.asked = true
			close(t.wantedLocked())
		}
		keys := t.keys
		t.mu.Unlock()
		if keys != nil {
			return keys, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("no keys of JWT-SVIDs from meshd yet: %w", ctx.Err())
		}
	}
}

// JWTKeysChanged returns a channel that is closed at the next change of the keys.
func (t *Tokens) JWTKeysChanged() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.changed == nil {
		t.changed = make(chan struct{})
	}
	return t.changed
}

func (t *Tokens) wantedLocked() chan struct{} {
	if t.wanted == nil {
		t.wanted = make(chan struct{})
	}
	return t.wanted
}

// Run follows the keys, once somebody wants them, until ctx ends, and then returns nil. What
// is known stays while meshd is away.
func (t *Tokens) Run(ctx context.Context) error {
	if t.Log == nil {
		t.Log = slog.New(slog.DiscardHandler)
	}
	t.mu.Lock()
	wanted := t.wantedLocked()
	t.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil
	case <-wanted:
	}
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval = 250 * time.Millisecond
	wait.MaxInterval = 15 * time.Second
	for reported := ""; ctx.Err() == nil; {
		received, err := t.watch(ctx)
		if received {
			wait.Reset()
			reported = ""
		}
		if reason := err.Error(); ctx.Err() == nil && reason != reported {
			reported = reason
			t.Log.Warn("keys of JWT-SVIDs not followed, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait.NextBackOff()):
		}
	}
	return nil
}

// watch follows one stream to its end.
func (t *Tokens) watch(ctx context.Context) (received bool, err error) {
	if _, err := t.Keeper.Wait(ctx); err != nil {
		return false, err
	}
	conn, err := t.connect()
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stream, err := api.NewIdentityClient(conn).WatchJWTBundle(ctx, &api.WatchJWTBundleRequest{})
	if err != nil {
		return false, err
	}
	for {
		bundle, err := stream.Recv()
		if err != nil {
			return received, err
		}
		if len(bundle.GetJwks()) == 0 {
			return received, errors.New("an empty message")
		}
		received = true
		t.set(bundle.GetJwks())
	}
}

func (t *Tokens) set(keys []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if bytes.Equal(keys, t.keys) {
		return
	}
	t.keys = keys
	if t.changed != nil {
		close(t.changed)
		t.changed = nil
	}
}
