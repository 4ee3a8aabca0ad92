// SPDX-License-Identifier: Apache-2.0

package report_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/agent/report"
	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

func TestTheVerdictNeedsSeveralFailuresInARow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		failing := errors.New("connection refused")
		var result atomic.Value // of a func() error
		result.Store(func() error { return nil })
		c := &report.Checker{Check: func(context.Context) error { return result.Load().(func() error)() }, Interval: time.Second, Failures: 3, Successes: 2}
		if s := c.State(); s.Healthy || s.Message != "not checked yet" {
			t.Errorf("before the first check: %+v", s)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go c.Run(ctx)
		synctest.Wait()
		if !c.State().Healthy {
			t.Error("the first result is the first verdict")
		}
		for _, step := range []struct {
			result  error
			healthy bool
		}{
			{failing, true}, {failing, true}, {nil, true}, // a streak that was broken
			{failing, true}, {failing, true}, {failing, false},
			{nil, false}, {failing, false}, {nil, false}, {nil, true},
		} {
			result.Store(func() error { return step.result })
			time.Sleep(time.Second)
			synctest.Wait()
			if s := c.State(); s.Healthy != step.healthy {
				t.Errorf("after %v: %+v, want healthy %v", step.result, s, step.healthy)
			}
		}
		changed := c.Changed()
		c.Leave("stopping")
		<-changed
		time.Sleep(10 * time.Second)
		if s := c.State(); s.Healthy || s.Message != "stopping" {
			t.Errorf("after it left: %+v", s)
		}
	})
}

// meshd takes reports and hands out probes.
type meshd struct {
	api.UnimplementedWorkloadsServer
	reports chan *api.HealthReport
	probes  chan *api.ProbeRequest
	results chan *api.ProbeResult
}

func (m *meshd) Report(s api.Workloads_ReportServer) error {
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		m.reports <- r
		if err := s.Send(&api.HealthAck{IntervalSeconds: 1, Accepted: true}); err != nil {
			return err
		}
	}
}

func (m *meshd) Probe(s api.Workloads_ProbeServer) error {
	hello, err := s.Recv()
	if err != nil {
		return err
	}
	m.results <- hello
	for {
		select {
		case <-s.Context().Done():
			return nil
		case p := <-m.probes:
			if err := s.Send(p); err != nil {
				return err
			}
			r, err := s.Recv()
			if err != nil {
				return err
			}
			m.results <- r
		}
	}
}

func serve(t *testing.T, authority *catest.CA) (*meshd, report.Connection) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &meshd{reports: make(chan *api.HealthReport, 64), probes: make(chan *api.ProbeRequest, 1), results: make(chan *api.ProbeResult, 1)}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(authority.ServerTLS(t, "127.0.0.1"))))
	api.RegisterWorkloadsServer(server, m)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	client := authority.ClientTLS(authority.Leaf(t, catest.Subject("vm:n1", "web-1", "legacy")))
	return m, report.Connection{
		Servers: servers.List{l.Addr().String()}, Credentials: credentials.NewTLS(client),
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		},
	}
}

func TestTheStateIsSentAtOnceAndRepeated(t *testing.T) {
	t.Parallel()
	m, connection := serve(t, catest.New(t))
	checker := &report.Checker{Check: func(context.Context) error { return nil }, Interval: time.Hour}
	r := &report.Reporter{Connection: connection, Checker: checker, Addresses: []string{"10.0.0.5"}, Ports: []uint32{80}, Version: "v1"}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ended := make(chan error, 2)
	go func() { ended <- checker.Run(ctx) }()
	go func() { ended <- r.Run(ctx) }()
	healthy := 0
	for healthy < 3 { // at least two of them repeat what is known, a second apart
		got := <-m.reports
		if got.GetAddresses()[0] != "10.0.0.5" || got.GetPorts()[0] != 80 || got.GetVersion() != "v1" {
			t.Fatalf("report %v", got)
		}
		if got.GetHealthy() {
			healthy++
		}
	}
	if !r.Accepted() {
		t.Error("not known to be accepted")
	}
	checker.Leave("stopping")
	for got := range m.reports {
		if !got.GetHealthy() && got.GetMessage() == "stopping" {
			break
		}
	}
	cancel()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

func TestAGatewayTriesPathsForMeshd(t *testing.T) {
	t.Parallel()
	authority, stranger := catest.New(t), catest.New(t)
	m, connection := serve(t, authority)
	own := authority.Leaf(t, catest.Subject("kube:east", "gw-0", "isthmus-system"))
	p := &report.Prober{Connection: connection, TLS: func() (*tls.Config, error) { return authority.ClientTLS(own), nil }}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go p.Run(ctx)
	<-m.results // it made itself known

	peer := func(certificate tls.Certificate) string {
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"istio"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() { conn.(*tls.Conn).Handshake(); conn.Close() }()
			}
		}()
		return l.Addr().String()
	}
	web := ca.Subject{Source: "kube:west", Instance: "web-0", Namespace: "shop", ServiceAccount: "web"}
	good, bad := peer(authority.Leaf(t, web)), peer(stranger.Leaf(t, web))
	const id = "spiffe://cluster.local/ns/shop/sa/web"
	for i, c := range []struct {
		why                 string
		request             *api.ProbeRequest
		connected, verified bool
		message             string
	}{
		{"a mesh workload", &api.ProbeRequest{Address: good, Sni: "outbound_.80_._.x", Alpn: []string{"istio"}, Identities: []string{id}}, true, true, ""},
		{"only a connection", &api.ProbeRequest{Address: good}, true, false, ""},
		{"somebody else", &api.ProbeRequest{Address: good, Sni: "x", Identities: []string{"spiffe://cluster.local/ns/shop/sa/other"}}, true, false, id},
		{"another mesh", &api.ProbeRequest{Address: bad, Sni: "x"}, true, false, "unknown authority"},
		{"nobody", &api.ProbeRequest{Address: "127.0.0.1:1", Timeout: durationpb.New(time.Second)}, false, false, "refused"},
	} {
		c.request.Id = uint64(i)
		m.probes <- c.request
		got := <-m.results
		if got.GetId() != uint64(i) || got.GetConnected() != c.connected || got.GetVerified() != c.verified || !strings.Contains(got.GetMessage(), c.message) {
			t.Errorf("%s: %v", c.why, got)
		}
		if c.verified && got.GetPeer() != id {
			t.Errorf("peer %s", got.GetPeer())
		}
	}
}

// The answerer stands where a gateway's Envoy passes the reserved name on to: both ends
// see each other's certificate, and only ends of this mesh get an answer.
func TestAGatewaysAgentAnswersProbes(t *testing.T) {
	t.Parallel()
	authority, stranger := catest.New(t), catest.New(t)
	west := authority.Leaf(t, catest.Subject("kube:west", "gw-1", "isthmus-system"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	answering := &report.Answerer{TLS: func() (*tls.Config, error) { return authority.ClientTLS(west), nil }, Protocols: []string{"istio", "isthmus"}}
	ended := make(chan error, 1)
	go func() { ended <- answering.Serve(ctx, l) }()

	request := func() *api.ProbeRequest {
		return &api.ProbeRequest{Address: l.Addr().String(), Sni: api.ProbeName, Alpn: []string{"istio"}, Answered: true,
			Identities: []string{"spiffe://cluster.local/ns/isthmus-system/sa/default"}}
	}
	east := catest.Subject("kube:east", "gw-0", "isthmus-system")
	for _, c := range []struct {
		why      string
		tls      *tls.Config
		change   func(*api.ProbeRequest)
		verified bool
		message  string
	}{
		{"a gateway of the mesh", authority.ClientTLS(authority.Leaf(t, east)), func(*api.ProbeRequest) {}, true, ""},
		{"nobody", authority.ClientTLS(), func(*api.ProbeRequest) {}, false, "whom it saw"},
		{"another mesh's gateway", authority.ClientTLS(stranger.Leaf(t, east)), func(*api.ProbeRequest) {}, false, "whom it saw"},
		{"no protocol of the mesh", authority.ClientTLS(authority.Leaf(t, east)), func(r *api.ProbeRequest) { r.Alpn = []string{"h2"} }, false, "no application protocol"},
	} {
		m, connection := serve(t, authority)
		p := &report.Prober{Connection: connection, TLS: func() (*tls.Config, error) { return c.tls, nil }}
		running, stop := context.WithCancel(ctx)
		go p.Run(running)
		<-m.results
		r := request()
		c.change(r)
		m.probes <- r
		got := <-m.results
		stop()
		if got.GetVerified() != c.verified || !strings.Contains(got.GetMessage(), c.message) {
			t.Errorf("%s: %v", c.why, got)
		}
		if c.verified && (len(got.GetChain()) < 2 || got.GetElapsed().AsDuration() <= 0) {
			t.Errorf("%s: chain of %d, in %v", c.why, len(got.GetChain()), got.GetElapsed())
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
