// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/isthmus-mesh/isthmus/registry/etcd"
)

// link is the way from a replica to etcd, which a test can cut.
type link struct {
	t       testing.TB
	from    string // socket that the replica dials
	to      string // that of etcd
	mu      sync.Mutex
	cut     bool
	conns   map[net.Conn]bool
	pending sync.WaitGroup
}

// newLink leads to the embedded etcd of a data directory.
func newLink(t testing.TB, dataDir string) *link {
	t.Helper()
	dir, err := os.MkdirTemp("", "link") // short enough for the name of a socket
	if err != nil {
		t.Fatal(err)
	}
	l := &link{t: t, from: filepath.Join(dir, "s"), to: filepath.Join(dataDir, etcd.SocketName), conns: map[net.Conn]bool{}}
	listener, err := net.Listen("unix", l.from)
	if err != nil {
		t.Fatal(err)
	}
	l.pending.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			l.pending.Go(func() { l.carry(conn) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		l.set(true)
		l.pending.Wait()
		os.RemoveAll(dir)
	})
	return l
}

func (l *link) carry(a net.Conn) {
	defer a.Close()
	b, err := net.Dial("unix", l.to)
	if err != nil {
		return
	}
	defer b.Close()
	l.mu.Lock()
	if l.cut {
		l.mu.Unlock()
		return
	}
	l.conns[a], l.conns[b] = true, true
	l.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(a, b)
		a.Close()
	}()
	io.Copy(b, a)
	b.Close()
	<-done
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, a)
	delete(l.conns, b)
}

// set cuts the link, or heals it.
func (l *link) set(cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = cut
	if cut {
		for c := range l.conns {
			c.Close()
		}
	}
}

// database is an external etcd at the end of the link.
func (l *link) database() *etcd.Database {
	l.t.Helper()
	db, err := etcd.Open(l.t.Context(), etcd.DatabaseConfig{Endpoints: []string{"unix://" + l.from}})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { db.Close() })
	return db
}
