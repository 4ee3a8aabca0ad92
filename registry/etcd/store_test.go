// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// fakeSealer binds a value to its name without hiding it.
type fakeSealer struct{}

func (fakeSealer) Seal(name string, plain []byte) ([]byte, error) {
	return append([]byte("sealed "+name+"\n"), plain...), nil
}

func (fakeSealer) Open(name string, sealed []byte) ([]byte, error) {
	plain, ok := bytes.CutPrefix(sealed, []byte("sealed "+name+"\n"))
	if !ok {
		return nil, errors.New("sealed under another name")
	}
	return plain, nil
}

// openDatabase starts an embedded etcd for one test.
func openDatabase(t testing.TB, dir string) *etcd.Database {
	t.Helper()
	db, err := etcd.Open(t.Context(), etcd.DatabaseConfig{DataDir: dir, Unsynced: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// newStore starts a store and waits until it is loaded.
func newStore(t testing.TB, config etcd.StoreConfig) *etcd.Store {
	t.Helper()
	if config.Sealer == nil {
		config.Sealer = fakeSealer{}
	}
	store := etcd.New(config)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		store.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	select {
	case <-store.Ready():
	case <-t.Context().Done():
	}
	return store
}

// one etcd serves all tests that do not stop it, each below a prefix of its own.
var shared struct {
	once sync.Once
	db   *etcd.Database
	next int
	mu   sync.Mutex
	of   map[*testing.T]string
}

func sharedPrefix(t *testing.T) string {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.of == nil {
		shared.of = map[*testing.T]string{}
	}
	if shared.of[t] == "" {
		shared.next++
		shared.of[t] = fmt.Sprintf("/test-%d/", shared.next)
	}
	return shared.of[t]
}

func TestStore(t *testing.T) {
	t.Parallel()
	db := openDatabase(t, t.TempDir())
	registrytest.Store(t, func(t *testing.T) registry.Store {
		return newStore(t, etcd.StoreConfig{Client: db.Client(), Prefix: sharedPrefix(t)})
	})
}
