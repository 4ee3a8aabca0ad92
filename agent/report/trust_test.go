// SPDX-License-Identifier: Apache-2.0

package report_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/isthmus-mesh/isthmus/agent/report"
	"github.com/isthmus-mesh/isthmus/api"
)

// truster is the side of meshd that hands out bundles.
type truster struct {
	api.UnimplementedWorkloadsServer
	bundles chan *api.TrustBundle
	states  chan *api.TrustState
}

func (m *truster) Trust(s api.Workloads_TrustServer) error {
	go func() {
		for b := range m.bundles {
			s.Send(b)
		}
	}()
	for {
		state, err := s.Recv()
		if err != nil {
			return err
		}
		m.states <- state
	}
}

// A bundle counts once Envoy verifies peers with it, and a newer one ends the wait for the one before.
func TestABundleIsConfirmedOnceItIsInUse(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &truster{bundles: make(chan *api.TrustBundle), states: make(chan *api.TrustState, 16)}
	server := grpc.NewServer()
	api.RegisterWorkloadsServer(server, m)
	go server.Serve(l)
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(func() { cancel(); conn.Close(); server.Stop() })
	inUse := make(chan error)
	taken := make(chan uint64, 16)
	trust := &report.Trust{
		Take: func(sequence uint64, _ []byte) (bool, error) { taken <- sequence; return sequence < 100, nil },
		Acknowledged: func(ctx context.Context) error {
			select {
			case err := <-inUse:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		},
		Authority: func() (string, <-chan struct{}) { return "issuer", nil },
	}
	go trust.Talk(ctx, conn)
	next := func() *api.TrustState {
		t.Helper()
		select {
		case s := <-m.states:
			return s
		case <-ctx.Done():
			t.Fatal("nothing is said")
			return nil
		}
	}
	if s := next(); s.GetDigest() != "" || s.GetAuthority() != "issuer" {
		t.Errorf("at the beginning: %v", s)
	}
	m.bundles <- &api.TrustBundle{Sequence: 1, Roots: []byte("one")}
	<-taken
	m.bundles <- &api.TrustBundle{Sequence: 2, Roots: []byte("two")}
	if n := <-taken; n != 2 {
		t.Fatalf("took %d", n)
	}
	inUse <- nil
	const two = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3" // sha256sum of "two"
	for s := next(); s.GetDigest() != two; s = next() {
		if s.GetDigest() != "" {
			t.Fatalf("confirms %v, which is not in use", s)
		}
	}
	m.bundles <- &api.TrustBundle{Sequence: 3, Roots: []byte("three")}
	<-taken
	inUse <- errors.New("bad root")
	if s := next(); s.GetDigest() != two || s.GetProblem() != "bad root" {
		t.Errorf("Envoy refuses: %v", s)
	}
	m.bundles <- &api.TrustBundle{Sequence: 100, Roots: []byte("old")}
	if s := next(); s.GetDigest() != two || s.GetProblem() == "" {
		t.Errorf("an older bundle: %v", s)
	}
}
