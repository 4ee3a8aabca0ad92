// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultTTL is how long a join token is good for unless its maker says otherwise; MaxTTL is the longest.
const (
	DefaultTTL = 15 * time.Minute
	MaxTTL     = 24 * time.Hour
)

const tokenSchema = 1

// Tokens is the join tokens that were handed out and not been used. Only their hashes are kept.
type Tokens struct {
	client *clientv3.Client
	prefix string
	clock  func() time.Time
}

// storedToken is the value of <prefix>tokens/<id>.
type storedToken struct {
	V              int       `json:"v"`
	Hash           []byte    `json:"hash"` // SHA-256 of the secret, which is itself random
	Name           string    `json:"name"`
	Network        string    `json:"network"`
	Namespace      string    `json:"namespace"`
	ServiceAccount string    `json:"serviceAccount"`
	Expires        time.Time `json:"expires"`
}

// NewTokens uses the keys below prefix, the same one as that of the State. A nil clock is time.Now.
func NewTokens(client *clientv3.Client, prefix string, clock func() time.Time) (*Tokens, error) {
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	if clock == nil {
		clock = time.Now
	}
	return &Tokens{client: client, prefix: prefix + "tokens/", clock: clock}, nil
}

// Create makes a token for one virtual machine. ID and Expires of what is passed are ignored; a ttl of zero is
// DefaultTTL. The token is returned once and kept nowhere.
func (t *Tokens) Create(ctx context.Context, what ca.JoinToken, ttl time.Duration) (string, ca.JoinToken, error) {
	if ttl == 0 {
		ttl = DefaultTTL
	}
	if ttl < time.Second || ttl > MaxTTL {
		return "", ca.JoinToken{}, fmt.Errorf("join token for %v: want 1 s to %v", ttl, MaxTTL)
	}
	if err := what.Subject().Check(); err != nil {
		return "", ca.JoinToken{}, err
	}
	token, id, secret := ca.NewJoinToken()
	what.ID, what.Expires = id, t.clock().Add(ttl).UTC().Truncate(time.Second)
	hash := sha256.Sum256([]byte(secret))
	value, err := json.Marshal(storedToken{
		V: tokenSchema, Hash: hash[:], Name: what.Name, Network: what.Network,
		Namespace: what.Namespace, ServiceAccount: what.ServiceAccount, Expires: what.Expires,
	})
	if err != nil {
		return "", ca.JoinToken{}, err
	}
	// The lease only tidies up; what counts is the time in the value.
	lease, err := t.client.Grant(ctx, int64((ttl+time.Minute)/time.Second))
	if err != nil {
		return "", ca.JoinToken{}, fmt.Errorf("join token: %w", err)
	}
	if _, err := t.client.Put(ctx, t.prefix+id, string(value), clientv3.WithLease(lease.ID)); err != nil {
		return "", ca.JoinToken{}, fmt.Errorf("join token: %w", err)
	}
	return token, what, nil
}

// Read tells what a token is for and leaves it unspent. Errors wrap ca.ErrJoinToken unless etcd is away.
func (t *Tokens) Read(ctx context.Context, token string) (ca.JoinToken, error) {
	what, _, err := t.read(ctx, token)
	return what, err
}

// Spend uses a token up: it is deleted if it is still the value that was read. Of any number of concurrent
// calls one succeeds, the others get ca.ErrJoinToken.
func (t *Tokens) Spend(ctx context.Context, token string) error {
	what, revision, err := t.read(ctx, token)
	if err != nil {
		return err
	}
	key := t.prefix + what.ID
	got, err := t.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
		Then(clientv3.OpDelete(key)).
		Commit()
	if err != nil {
		return fmt.Errorf("join token %s: %w", what.ID, err)
	}
	if !got.Succeeded {
		return fmt.Errorf("%w: %s was used meanwhile", ca.ErrJoinToken, what.ID)
	}
	return nil
}

func (t *Tokens) read(ctx context.Context, token string) (ca.JoinToken, int64, error) {
	id, secret, err := ca.ParseJoinToken(token)
	if err != nil {
		return ca.JoinToken{}, 0, err
	}
	got, err := t.client.Get(ctx, t.prefix+id)
	if err != nil {
		return ca.JoinToken{}, 0, fmt.Errorf("join token %s: %w", id, err)
	}
	if len(got.Kvs) == 0 {
		return ca.JoinToken{}, 0, fmt.Errorf("%w: %s is unknown, expired or used; make a new one", ca.ErrJoinToken, id)
	}
	what, hash, err := decodeToken(id, got.Kvs[0].Value)
	if err != nil {
		return ca.JoinToken{}, 0, err
	}
	given := sha256.Sum256([]byte(secret))
	if subtle.ConstantTimeCompare(given[:], hash) != 1 {
		return ca.JoinToken{}, 0, fmt.Errorf("%w: %s has another secret", ca.ErrJoinToken, id)
	}
	if !t.clock().Before(what.Expires) {
		return ca.JoinToken{}, 0, fmt.Errorf("%w: %s expired at %s; make a new one", ca.ErrJoinToken, id, what.Expires.Format(time.RFC3339))
	}
	return what, got.Kvs[0].ModRevision, nil
}

// decodeToken reads a stored value. One that cannot be read lets nobody in.
func decodeToken(id string, value []byte) (ca.JoinToken, []byte, error) {
	var s storedToken
	if err := json.Unmarshal(value, &s); err != nil {
		return ca.JoinToken{}, nil, fmt.Errorf("%w: %s: %w: %v", ca.ErrJoinToken, id, ca.ErrCorrupt, err)
	}
	if s.V > tokenSchema {
		return ca.JoinToken{}, nil, fmt.Errorf("%w: %s: %w", ca.ErrJoinToken, id, ca.ErrNewerSchema)
	}
	if s.V < 1 || len(s.Hash) != sha256.Size {
		return ca.JoinToken{}, nil, fmt.Errorf("%w: %s: %w", ca.ErrJoinToken, id, ca.ErrCorrupt)
	}
	return ca.JoinToken{
		ID: id, Name: s.Name, Network: s.Network, Namespace: s.Namespace, ServiceAccount: s.ServiceAccount, Expires: s.Expires,
	}, s.Hash, nil
}

// List tells which tokens are unspent, and for whom. Unreadable ones are in the error, beside the others.
func (t *Tokens) List(ctx context.Context) ([]ca.JoinToken, error) {
	got, err := t.client.Get(ctx, t.prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("list join tokens: %w", err)
	}
	var out []ca.JoinToken
	var bad error
	for _, kv := range got.Kvs {
		what, _, err := decodeToken(strings.TrimPrefix(string(kv.Key), t.prefix), kv.Value)
		if err != nil {
			bad = errors.Join(bad, err)
			continue
		}
		if t.clock().Before(what.Expires) {
			out = append(out, what)
		}
	}
	return out, bad
}

// Void withdraws the unspent tokens of a virtual machine, with an empty name those of a network, and with
// neither all of them: a restored backup must not bring spent tokens back. It returns how many.
func (t *Tokens) Void(ctx context.Context, network, name string) (int, error) {
	got, err := t.client.Get(ctx, t.prefix, clientv3.WithPrefix())
	if err != nil {
		return 0, fmt.Errorf("void join tokens: %w", err)
	}
	voided := 0
	for _, kv := range got.Kvs {
		what, _, err := decodeToken(strings.TrimPrefix(string(kv.Key), t.prefix), kv.Value)
		if err == nil && (network != "" && what.Network != network || name != "" && what.Name != name) {
			continue
		}
		if err != nil && (network != "" || name != "") {
			continue
		}
		gone, err := t.client.Delete(ctx, string(kv.Key))
		if err != nil {
			return voided, fmt.Errorf("void join tokens: %w", err)
		}
		voided += int(gone.Deleted)
	}
	return voided, nil
}
