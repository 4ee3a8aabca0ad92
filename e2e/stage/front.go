// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// Front is the load balancer before the replicas of the control service: one address,
// connections spread over those whose /healthz answers. One that does not is left out and
// its connections are reset, as load balancers do that can be told so.
type Front struct {
	host *bed.Namespace

	mu       sync.Mutex
	replicas []*replica
	next     int
}

// replica is one meshd behind a front.
type replica struct {
	addr    netip.Addr
	healthy bool
	failed  int
	open    map[net.Conn]bool
}

const (
	frontInterval = time.Second // between two checks, and how long each may take
	frontFailures = 2           // in a row, until a replica is left out
)

// Front makes the load balancer on a host of its own, for ControlConfig.Front.
func (s *Stage) Front(name string) (*Front, error) {
	host, err := s.World.Host(name)
	if err != nil {
		return nil, err
	}
	f := &Front{host: host}
	for _, port := range []string{"15012", "8443"} {
		l, err := host.Listen("tcp", net.JoinHostPort(host.Addr().String(), port))
		if err != nil {
			return nil, err
		}
		s.World.Go(func(ctx context.Context) {
			defer context.AfterFunc(ctx, func() { l.Close() })()
			f.serve(ctx, l, port)
		})
	}
	s.World.Go(f.check)
	return f, nil
}

// Addr is the address that replicas advertise.
func (f *Front) Addr() netip.Addr { return f.host.Addr() }

func (f *Front) add(addr netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.replicas = append(f.replicas, &replica{addr: addr, healthy: true, open: map[net.Conn]bool{}})
}

func (f *Front) serve(ctx context.Context, l net.Listener, port string) {
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		go f.carry(ctx, client, port)
	}
}

// carry connects a client to a replica that is well, and copies until either ends.
func (f *Front) carry(ctx context.Context, client net.Conn, port string) {
	defer client.Close()
	r, server := f.dial(ctx, port)
	if server == nil {
		return
	}
	defer server.Close()
	defer f.forget(r, server)
	defer context.AfterFunc(ctx, func() { client.Close() })()
	go func() {
		_, _ = io.Copy(server, client) // its end is the end of the other direction
		server.Close()
	}()
	_, _ = io.Copy(client, server)
}

// dial tries the replicas in turn.
func (f *Front) dial(ctx context.Context, port string) (*replica, net.Conn) {
	f.mu.Lock()
	candidates := make([]*replica, 0, len(f.replicas))
	for i := range f.replicas {
		if r := f.replicas[(f.next+i)%len(f.replicas)]; r.healthy {
			candidates = append(candidates, r)
		}
	}
	f.next++
	f.mu.Unlock()
	for _, r := range candidates {
		short, cancel := context.WithTimeout(ctx, frontInterval)
		conn, err := f.host.Dial(short, "tcp", net.JoinHostPort(r.addr.String(), port))
		cancel()
		if err != nil {
			continue
		}
		f.mu.Lock()
		r.open[conn] = true
		f.mu.Unlock()
		return r, conn
	}
	return nil, nil
}

func (f *Front) forget(r *replica, conn net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(r.open, conn)
}

// check asks all replicas how they are until ctx ends.
func (f *Front) check(ctx context.Context) {
	client := &http.Client{Timeout: frontInterval, Transport: &http.Transport{
		DialContext: f.host.Dial, DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	tick := time.NewTicker(frontInterval)
	defer tick.Stop()
	for {
		f.mu.Lock()
		replicas := append([]*replica(nil), f.replicas...)
		f.mu.Unlock()
		for _, r := range replicas {
			f.judge(r, ask(ctx, client, r.addr))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func ask(ctx context.Context, client *http.Client, addr netip.Addr) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+addr.String()+":8443/healthz", nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("/healthz: %s", response.Status)
	}
	return nil
}

// judge takes in one check.
func (f *Front) judge(r *replica, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		r.failed, r.healthy = 0, true
		return
	}
	if r.failed++; r.failed < frontFailures {
		return
	}
	r.healthy = false
	for conn := range r.open {
		conn.Close()
	}
}
