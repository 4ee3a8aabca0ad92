// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/isthmus-mesh/isthmus/agent"
	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/isthmus-mesh/isthmus/e2e/ports"
)

const listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"

// pod is one workload whose agent runs inside the test.
type pod struct {
	*mesh
	config  agent.Config
	agent   *agent.Agent
	inbound string // the address of Envoy's mutual TLS listener
	stop    context.CancelFunc
	ended   chan error
}

func (p *pod) url(path string) string { return "http://" + p.config.StatusAddress + path }

// start runs a pod "web-0" of service account default in namespace shop, whose
// workload is an HTTP server. Ports are free ones of loopback, so that tests
// run side by side.
func start(t *testing.T, workload http.Handler) *pod {
	t.Helper()
	envoy := envoyPath(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := newMesh(t, l)
	app := httptest.NewServer(workload)
	t.Cleanup(app.Close)
	appPort := app.Listener.Addr().(*net.TCPAddr).Port
	inbound := ports.Free(t)
	m.put(t, "app", staticCluster("app", "127.0.0.1", appPort))
	m.put(t, "inbound", &listenerv3.Listener{
		Name: "inbound", Address: socketAddress("127.0.0.1", inbound), TrafficDirection: corev3.TrafficDirection_INBOUND,
		FilterChains: []*listenerv3.FilterChain{secured(t, forward(t, "app"))},
	})
	m.put(t, "nametable", &api.NameTable{Table: map[string]*api.NameTable_NameInfo{
		"pay.shop.svc.cluster.local": {Ips: []string{"240.240.0.9"}, Registry: "Kubernetes", Shortname: "pay", Namespace: "shop"},
	}})
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(m.cluster.Token(t, "shop", "default", "web-0", "pod-uid")), 0o600); err != nil {
		t.Fatal(err)
	}
	local := func() string { return fmt.Sprintf("127.0.0.1:%d", ports.Free(t)) }
	p := &pod{mesh: m, inbound: fmt.Sprintf("127.0.0.1:%d", inbound), ended: make(chan error, 1)}
	p.config = agent.Config{
		Role: agent.Sidecar, Server: m.address, RootCertFile: m.roots(t), TokenFile: token,
		Name: "web-0", Namespace: "shop", ServiceAccount: "default", UID: "pod-uid",
		Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Network: "n1",
		Envoy: envoy, EnvoyUID: -1, Concurrency: 1,
		RunDir:       shortDir(t),
		ResolvConf:   os.DevNull,
		ReadyAddress: local(), StatusAddress: local(), DNSAddresses: []string{local()},
		AdminPort: uint16(ports.Free(t)), StatsPort: uint16(ports.Free(t)),
		Drain: 2 * time.Second, DrainAtLeast: 100 * time.Millisecond,
		WorkloadSocket: filepath.Join(shortDir(t), "new", "socket"),

		Probes:  fmt.Sprintf(`{"web/readyz":{"http":{"path":"/ready","port":%d}}}`, appPort),
		Version: "test",
	}
	p.run(t)
	return p
}

// shortDir is a folder for sockets, whose paths may have 107 bytes only.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (p *pod) run(t *testing.T) {
	t.Helper()
	one, err := agent.New(p.config, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	p.stop, p.agent = stop, one
	go func() { p.ended <- one.Run(ctx) }()
	t.Cleanup(func() { p.end(t) })
}

func (p *pod) end(t *testing.T) {
	if p.stop == nil {
		return
	}
	p.stop()
	p.stop = nil
	select {
	case err := <-p.ended:
		if err != nil {
			t.Errorf("the agent ended with: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the agent does not end")
	}
}

func get(url string) (int, string, error) {
	response, err := http.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

func (p *pod) ready() error {
	code, body, err := get("http://" + p.config.ReadyAddress + "/healthz/ready")
	if err == nil && code != http.StatusOK {
		err = errors.New(strings.ReplaceAll(body, "\n", "; "))
	}
	return err
}

// call sends one request through Envoy with a mesh identity, and returns the
// SPIFFE ID of the certificate that answered.
func (p *pod) call(t *testing.T) (string, error) {
	t.Helper()
	conn, err := tls.Dial("tcp", p.inbound, p.mutual(t, "istio"))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
	body, err := io.ReadAll(conn)
	if err != nil {
		return "", err
	}
	if !strings.Contains(string(body), "here is the workload") {
		return "", fmt.Errorf("answer %q", body)
	}
	return conn.ConnectionState().PeerCertificates[0].URIs[0].String(), nil
}

// callAnonymously has no certificate; TLS 1.3 tells so only at the first read.
func (p *pod) callAnonymously() error {
	config := p.ClientTLS()
	config.InsecureSkipVerify, config.NextProtos = true, []string{"istio"}
	conn, err := tls.Dial("tcp", p.inbound, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Read(make([]byte, 1))
	return err
}

func workload(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/ready" {
		w.WriteHeader(http.StatusAccepted)
	}
	fmt.Fprintln(w, "here is the workload")
}

func TestAPodJoinsTheMesh(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)

	id, err := p.call(t)
	if err != nil {
		t.Fatal(err)
	}
	const want = "spiffe://cluster.local/ns/shop/sa/default"
	if id != want {
		t.Errorf("served as %s, want %s", id, want)
	}
	if err := p.callAnonymously(); err == nil || !strings.Contains(err.Error(), "certificate required") {
		t.Errorf("a caller without identity: %v, want a refusal", err)
	}
	first := p.seen()[0]
	if first.peer != want {
		t.Errorf("discovery was opened as %q, want the workload's certificate", first.peer)
	}
	if want := "sidecar~127.0.0.1~web-0.shop~shop.svc.cluster.local"; first.node != want {
		t.Errorf("node %q, want %q", first.node, want)
	}
	eventually(t, "name table acknowledged", func() error {
		if n := p.seen()[0].acks[nameTableType]; n != 1 {
			return fmt.Errorf("%d acknowledgements", n)
		}
		return nil
	})
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, p.config.DNSAddresses[0])
	}}
	addresses, err := resolver.LookupNetIP(t.Context(), "ip4", "pay.shop.svc.cluster.local.")
	if err != nil || len(addresses) != 1 || addresses[0].String() != "240.240.0.9" {
		t.Errorf("pay.shop is %v, %v", addresses, err)
	}
}

func TestAPodIsProbedAndScrapedThroughTheAgent(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)
	if code, _, err := get(p.url("/app-health/web/readyz")); err != nil || code != http.StatusAccepted {
		t.Errorf("probe answered %d, %v; want the workload's own 202", code, err)
	}
	if code, _, _ := get(p.url("/app-health/web/livez")); code != http.StatusNotFound {
		t.Errorf("a probe that does not exist answered %d", code)
	}
	code, body, err := get(p.url("/stats/prometheus"))
	if err != nil || code != http.StatusOK {
		t.Fatalf("metrics: %d, %v", code, err)
	}
	for _, name := range []string{"envoy_server_live", "isthmus_agent_connected 1", "isthmus_agent_dns_names 1"} {
		if !strings.Contains(body, name) {
			t.Errorf("metrics lack %s", name)
		}
	}
}

// The workload asks for its identity with the library that everybody uses, and is told
// when it has been renewed.
func TestAWorkloadGetsItsIdentity(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+p.config.WorkloadSocket)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	first, err := source.GetX509SVID()
	if err != nil || first.ID.String() != "spiffe://cluster.local/ns/shop/sa/default" {
		t.Fatalf("got %v, %v", first, err)
	}
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(first.ID))
	config.NextProtos = []string{"istio"}
	conn, err := tls.Dial("tcp", p.inbound, config)
	if err != nil {
		t.Fatalf("a connection with that identity: %v", err)
	}
	conn.Close()
	p.agent.Renew()
	for first.Certificates[0].SerialNumber.Cmp(serial(t, source)) == 0 {
		if err := source.WaitUntilUpdated(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// Tokens are for the workload's own identity, are kept for a while, and do without meshd
// as long as they last.
func TestAWorkloadGetsTokens(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+p.config.WorkloadSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	fetch := func(audience ...string) string {
		t.Helper()
		svid, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]})
		if err != nil {
			t.Fatal(err)
		}
		if svid.ID.String() != "spiffe://cluster.local/ns/shop/sa/default" {
			t.Errorf("a token for %s", svid.ID)
		}
		return svid.Marshal()
	}
	first := fetch("billing", "stock")
	if fetch("stock", "billing") != first {
		t.Error("the same audiences got another token at once")
	}
	if fetch("billing") == first {
		t.Error("other audiences got the same token")
	}
	issued := 0
	for _, line := range p.AuditEntries(t) {
		if line.Event == ca.AuditJWTIssued {
			issued++
		}
	}
	if issued != 2 {
		t.Errorf("%d tokens were issued, want 2", issued)
	}
	if _, err := client.ValidateJWTSVID(ctx, first, "stock"); err != nil {
		t.Error(err)
	}
	p.server.Stop()
	if fetch("billing", "stock") != first {
		t.Error("while meshd is away, another token came")
	}
	if _, err := client.ValidateJWTSVID(ctx, first, "stock"); err != nil {
		t.Errorf("while meshd is away: %v", err)
	}
}

func serial(t *testing.T, source *workloadapi.X509Source) *big.Int {
	t.Helper()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid.Certificates[0].SerialNumber
}

func TestABrokenStreamComesBackWithWhatItHolds(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)
	p.breakStreams()
	if err := p.ready(); err != nil {
		t.Errorf("not ready while meshd is away: %v", err)
	}
	if _, err := p.call(t); err != nil {
		t.Errorf("not served while meshd is away: %v", err)
	}
	eventually(t, "the second stream is subscribed", func() error {
		streams := p.seen()
		if len(streams) < 2 || streams[1].initial[listenerType] == nil || streams[1].initial[nameTableType] == nil {
			return fmt.Errorf("streams %+v", streams)
		}
		return nil
	})
	second := p.seen()[1]
	if !slices.Equal(second.initial[listenerType], []string{"inbound"}) || !slices.Equal(second.initial[nameTableType], []string{"nametable"}) {
		t.Errorf("came back holding %v, want its listener and its name table", second.initial)
	}
}

func TestAnEnvoyThatDiesIsStartedAgain(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)
	before := p.envoy(t)
	if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "served again", func() error {
		if p.envoy(t) == before {
			return errors.New("the same process number")
		}
		_, err := p.call(t)
		return err
	})
}

// envoy is the process number of the running Envoy.
func (p *pod) envoy(t *testing.T) int {
	t.Helper()
	var pid int
	data, err := os.ReadFile(filepath.Join(p.config.RunDir, "envoy.pid"))
	if err == nil {
		_, err = fmt.Sscan(string(data), &pid)
	}
	if err != nil {
		t.Logf("process number: %v", err)
	}
	return pid
}

func TestAnEndIsGraceful(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	entered := make(chan struct{})
	p := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			close(entered)
			<-release
		}
		workload(w, r)
	}))
	eventually(t, "ready", p.ready)
	pid := p.envoy(t)
	answered := make(chan error, 1)
	go func() { _, err := p.call(t); answered <- err }()
	<-entered
	go p.stop()
	eventually(t, "unready once the end was asked for", func() error {
		if err := p.ready(); err == nil {
			return errors.New("still ready")
		}
		return nil
	})
	close(release)
	if err := <-answered; err != nil {
		t.Errorf("a request in flight was cut: %v", err)
	}
	p.end(t)
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("envoy %d is still there: %v", pid, err)
	}
}

// An agent that comes back while its token is the same one gets on without it:
// meshd would refuse the token with a new key.
func TestARestartNeedsNoToken(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)
	p.end(t)
	if err := os.Remove(p.config.TokenFile); err != nil {
		t.Fatal(err)
	}
	p.run(t)
	eventually(t, "ready again", p.ready)
	if _, err := p.call(t); err != nil {
		t.Error(err)
	}
}

// While all of meshd is away, an agent that starts again serves what it had before, and
// a meshd that is back is listened to.
func TestARestartNeedsNoMeshd(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	eventually(t, "ready", p.ready)
	p.server.Stop()
	p.end(t)
	p.run(t)
	eventually(t, "ready again", p.ready)
	if _, err := p.call(t); err != nil {
		t.Error(err)
	}
	code, body, err := get(p.url("/stats/prometheus"))
	if err != nil || code != http.StatusOK || !strings.Contains(body, "isthmus_agent_configuration_remembered 1") || !strings.Contains(body, "isthmus_agent_dns_names 1") {
		t.Errorf("metrics: %d, %v; want them to tell of remembered configuration and names", code, err)
	}
	l, err := net.Listen("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	before := len(p.seen())
	p.serve(t, l)
	eventually(t, "meshd is listened to", func() error {
		streams := p.seen()
		if len(streams) == before || streams[len(streams)-1].initial[listenerType] == nil {
			return fmt.Errorf("streams %+v", streams[before:])
		}
		return nil
	})
	if err := p.ready(); err != nil {
		t.Error(err)
	}
}

func TestAStrangeRootIsNotBelieved(t *testing.T) {
	t.Parallel()
	p := start(t, http.HandlerFunc(workload))
	p.end(t)
	if err := os.WriteFile(p.config.RootCertFile, catest.New(t).Bundle().PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	p.config.RunDir = shortDir(t)
	p.run(t)
	eventually(t, "the reason is told", func() error {
		err := p.ready()
		if err == nil {
			t.Fatal("ready although meshd is a stranger")
		}
		if !strings.Contains(err.Error(), "unknown authority") {
			return err
		}
		return nil
	})
}
