// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/agent"
	"github.com/isthmus-mesh/isthmus/agent/onboard"
	"github.com/isthmus-mesh/isthmus/api"
)

// runAs makes the test program an agent: it is started again inside a network
// namespace, with its configuration in this variable.
const runAs = "AGENT_TEST_CONFIG"

func TestMain(m *testing.M) {
	text := os.Getenv(runAs)
	if text == "" {
		os.Exit(m.Run())
	}
	var config agent.Config
	err := json.Unmarshal([]byte(text), &config)
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		var one *agent.Agent
		if one, err = agent.New(config, slog.New(slog.NewTextHandler(os.Stderr, nil))); err == nil {
			err = one.Run(ctx)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var namespaces atomic.Int64

// namespace is a network namespace of one test.
type namespace struct{ name string }

// wire makes two namespaces joined by a cable: 10.1.0.5 here, 10.1.0.1 there.
// Neither has a route to anywhere else.
func wire(t *testing.T) (here, there namespace) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: install iproute2 and nftables", tool)
		}
	}
	make1 := func() namespace {
		n := namespace{fmt.Sprintf("agent-%d-%d", os.Getpid(), namespaces.Add(1))}
		ip(t, "netns", "add", n.name)
		t.Cleanup(func() { ip(t, "netns", "delete", n.name) })
		ip(t, "-n", n.name, "link", "set", "lo", "up")
		return n
	}
	here, there = make1(), make1()
	ip(t, "link", "add", "eth0", "netns", here.name, "type", "veth", "peer", "name", "eth0", "netns", there.name)
	for n, address := range map[namespace]string{here: "10.1.0.5/24", there: "10.1.0.1/24"} {
		ip(t, "-n", n.name, "address", "add", address, "dev", "eth0")
		ip(t, "-n", n.name, "link", "set", "eth0", "up")
	}
	return here, there
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

// do runs f on a thread inside the namespace. Sockets opened there stay there.
// The thread is not unlocked, so it ends with its goroutine and nobody else
// finds himself in the wrong place.
func (n namespace) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		handle, err := os.Open("/run/netns/" + n.name)
		if err == nil {
			defer handle.Close()
			err = unix.Setns(int(handle.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func (n namespace) listen(t *testing.T, address string) net.Listener {
	t.Helper()
	var l net.Listener
	if err := n.do(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// dial connects once, on the namespace's own thread, without happy eyeballs,
// which would use others.
func (n namespace) dial(network, address string) (conn net.Conn, err error) {
	err = n.do(func() (err error) {
		d := net.Dialer{Timeout: 3 * time.Second, FallbackDelay: -1}
		conn, err = d.Dial(network, address)
		return err
	})
	return conn, err
}

// get asks an HTTP server for "/" over a connection of the namespace.
func (n namespace) get(address string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(_ context.Context, network, address string) (net.Conn, error) { return n.dial(network, address) },
	}}
	response, err := client.Get("http://" + address + "/")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

// whoami serves HTTP that answers with a name and the caller's address.
func (n namespace) whoami(t *testing.T, name, address string) *http.Server {
	t.Helper()
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "%s called from %s", name, host)
	})}
	l := n.listen(t, address)
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return server
}

// resolve asks for the IPv4 addresses of a name as a C library would.
func (n namespace) resolve(network, server, name string) ([]netip.Addr, error) {
	resolver := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return n.dial(network, server) }}
	return resolver.LookupNetIP(context.Background(), "ip4", name)
}

// program is an agent in a namespace, as a process of its own.
type program struct {
	cmd  *exec.Cmd
	done chan error
}

func (n namespace) agent(t *testing.T, config agent.Config) *program {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	p := &program{cmd: exec.Command("ip", "netns", "exec", n.name, os.Args[0]), done: make(chan error, 1)}
	p.cmd.Env = append(os.Environ(), runAs+"="+string(text))
	p.cmd.Stdout, p.cmd.Stderr = t.Output(), t.Output()
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	t.Cleanup(func() { p.stop(t) })
	return p
}

// stop ends it as an init system would, and waits.
func (p *program) stop(t *testing.T) {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-p.done:
		if err != nil {
			t.Errorf("the agent ended with: %v", err)
		}
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		t.Error("the agent did not end")
	}
	p.cmd = nil
}

// reachable makes Envoy accessible for the user it runs as.
func reachable(t *testing.T, envoy string) (string, string) {
	t.Helper()
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "envoy")
	if os.Link(envoy, path) == nil && os.Chmod(path, 0o755) == nil {
		return dir, path
	}
	data, err := os.ReadFile(envoy)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir, path
}

// place is a workload at 10.1.0.5 with an agent to come, and meshd at 10.1.0.1.
type place struct {
	*mesh
	here, there namespace
	config      agent.Config
}

func settle(t *testing.T) *place {
	t.Helper()
	envoy := envoyPath(t)
	here, there := wire(t)
	p := &place{mesh: newMesh(t, there.listen(t, "10.1.0.1:15012")), here: here, there: there}
	dir, envoy := reachable(t, envoy)
	conf := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 10.1.0.53\nsearch corp.example\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p.config = agent.Config{
		RootCertFile: p.roots(t), TokenFile: filepath.Join(dir, "token"),
		Envoy: envoy, Concurrency: 1, RunDir: filepath.Join(dir, "run"), StateDir: filepath.Join(dir, "state"),
		ResolvConf: conf, Redirect: true, Drain: time.Second, DrainAtLeast: 100 * time.Millisecond, Version: "test",
	}
	// Capture as xds makes it, by TCP alone. Envoy opens connections to the
	// workload from the address that redirection knows.
	p.put(t, "inside", passthrough("inside", "127.0.0.6"))
	p.put(t, "outside", passthrough("outside", ""))
	p.put(t, "pay", staticCluster("pay", "10.1.0.1", 9000))
	p.put(t, "self", staticCluster("self", "10.1.0.5", 8080))
	p.put(t, "virtualInbound", captured(t, "virtualInbound", 15006, corev3.TrafficDirection_INBOUND, forward(t, "inside")))
	p.put(t, "virtualOutbound", captured(t, "virtualOutbound", 15001, corev3.TrafficDirection_OUTBOUND,
		only(forward(t, "pay"), "240.240.0.9"), only(forward(t, "self"), "240.240.0.8"), forward(t, "outside")))
	p.put(t, "nametable", &api.NameTable{Table: map[string]*api.NameTable_NameInfo{
		"pay.shop.svc.cluster.local": {Ips: []string{"240.240.0.9"}, Registry: "Kubernetes", Shortname: "pay", Namespace: "shop"},
	}})
	return p
}

// only limits a filter chain to one destination.
func only(chain *listenerv3.FilterChain, destination string) *listenerv3.FilterChain {
	chain.FilterChainMatch = &listenerv3.FilterChainMatch{PrefixRanges: []*corev3.CidrRange{{
		AddressPrefix: destination, PrefixLen: wrapperspb.UInt32(32),
	}}}
	return chain
}

func (p *place) token(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(p.config.TokenFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// ready asks from the other side, as a kubelet does.
func (p *place) ready() error {
	conn, err := p.there.dial("tcp", "10.1.0.5:15021")
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /healthz/ready HTTP/1.0\r\n\r\n")
	body, err := io.ReadAll(conn)
	if err == nil && !strings.Contains(string(body), "200 OK") {
		err = errors.New(strings.ReplaceAll(string(body), "\n", "; "))
	}
	return err
}

// answers checks who answered a call and whom it saw.
func answers(t *testing.T, why string, from namespace, address, want string) {
	t.Helper()
	got, err := from.get(address)
	if err != nil || got != want {
		t.Errorf("%s: %s says %q, %v; want %q", why, address, got, err, want)
	}
}

func TestAMachineIsCapturedForTheMeshOnly(t *testing.T) {
	t.Parallel()
	p := settle(t)
	p.token(t, p.mesh.token)
	p.config.Role = agent.VM
	p.config.Onboard = &onboard.Config{
		V: onboard.Version, Name: "web-1", Namespace: "legacy", ServiceAccount: "web", Network: "n1", Server: p.address,
		Ports: []onboard.Port{{Name: "http", Port: 8080}}, Health: &onboard.Health{IntervalSeconds: 1},
	}
	app := p.here.whoami(t, "web", "10.1.0.5:8080")
	p.here.whoami(t, "shell", "10.1.0.5:22")
	p.there.whoami(t, "pay", "10.1.0.1:9000")
	running := p.here.agent(t, p.config)
	eventually(t, "ready", p.ready)

	answers(t, "the workload's port goes through Envoy", p.there, "10.1.0.5:8080", "web called from 127.0.0.6")
	answers(t, "a remote shell does not", p.there, "10.1.0.5:22", "shell called from 10.1.0.1")
	answers(t, "a mesh service is reached at its virtual address", p.here, "240.240.0.9:80", "pay called from 10.1.0.5")
	for _, network := range []string{"udp", "tcp"} {
		for _, name := range []string{"pay.shop.svc.cluster.local.", "pay.shop."} {
			found, err := p.here.resolve(network, "10.1.0.53:53", name)
			if err != nil || len(found) != 1 || found[0].String() != "240.240.0.9" {
				t.Errorf("%s over %s is %v, %v", name, network, found, err)
			}
		}
	}
	if _, err := p.here.resolve("udp", "10.1.0.53:53", "nobody.shop.svc.cluster.local."); err == nil || !strings.Contains(err.Error(), "no such host") {
		t.Errorf("a mesh name that does not exist: %v, want no such host", err)
	}
	eventually(t, "reported healthy", func() error { return reported(p, true) })
	if r := p.lastReport(); len(r.GetAddresses()) != 1 || r.GetAddresses()[0] != "10.1.0.5" || len(r.GetPorts()) != 1 || r.GetPorts()[0] != 8080 {
		t.Errorf("report %v", r)
	}
	app.Close()
	eventually(t, "reported unhealthy once the workload is gone", func() error { return reported(p, false) })

	running.stop(t)
	p.here.whoami(t, "web", "10.1.0.5:8080")
	answers(t, "nothing is captured after the end", p.there, "10.1.0.5:8080", "web called from 10.1.0.1")
	if out, err := exec.Command("ip", "-n", p.here.name, "route").Output(); err != nil || strings.Contains(string(out), "240.240") {
		t.Errorf("routes left behind: %s %v", out, err)
	}

	// A reboot: the token is spent, and its file gone.
	if err := os.Remove(p.config.TokenFile); err != nil {
		t.Fatal(err)
	}
	p.here.agent(t, p.config)
	eventually(t, "ready again without a token", p.ready)
	eventually(t, "reported healthy again", func() error { return reported(p, true) })
}

func reported(p *place, healthy bool) error {
	if r := p.lastReport(); r.GetHealthy() != healthy {
		return fmt.Errorf("last report %v", r)
	}
	return nil
}

func TestAPodIsCapturedWhole(t *testing.T) {
	t.Parallel()
	p := settle(t)
	p.token(t, p.cluster.Token(t, "shop", "default", "web-0", "pod-uid"))
	p.config.Role, p.config.Server = agent.Sidecar, p.address
	p.config.Name, p.config.Namespace = "web-0", "shop"
	p.config.Addresses = []netip.Addr{netip.MustParseAddr("10.1.0.5")}
	p.config.Probes = `{"web/readyz":{"http":{"port":8080}}}`
	ip(t, "-n", p.here.name, "route", "add", "default", "via", "10.1.0.1")
	p.here.whoami(t, "web", "10.1.0.5:8080")
	p.there.whoami(t, "pay", "10.1.0.1:9000")
	p.there.whoami(t, "other", "10.1.0.1:9001")
	running := p.here.agent(t, p.config)
	eventually(t, "ready", p.ready)

	answers(t, "any port goes through Envoy", p.there, "10.1.0.5:8080", "web called from 127.0.0.6")
	answers(t, "a mesh service", p.here, "240.240.0.9:80", "pay called from 10.1.0.5")
	answers(t, "a service that the mesh does not know", p.here, "10.1.0.1:9001", "other called from 10.1.0.5")
	answers(t, "the workload calls itself by its service, through its own inbound side", p.here, "240.240.0.8:80", "web called from 127.0.0.6")
	answers(t, "the workload calls itself by its address, directly", p.here, "10.1.0.5:8080", "web called from 10.1.0.5")
	probe, err := p.there.dial("tcp", "10.1.0.5:15020")
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	fmt.Fprintf(probe, "GET /app-health/web/readyz HTTP/1.0\r\n\r\n")
	if body, _ := io.ReadAll(probe); !strings.Contains(string(body), "web called from 127.0.0.6") {
		t.Errorf("the kubelet's probe got %q", body)
	}
	if n := connections(t, p.here, 15001); n == 0 {
		t.Error("no outbound connection was captured")
	}
	running.stop(t)
	answers(t, "nothing is captured after the end", p.there, "10.1.0.5:8080", "web called from 10.1.0.1")
}

// connections asks Envoy how many a listener has had.
func connections(t *testing.T, n namespace, port int) int {
	t.Helper()
	conn, err := n.dial("tcp", "127.0.0.1:15000")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /stats?filter=^listener.0.0.0.0_%d.downstream_cx_total$ HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n", port)
	body, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	var total int
	_, value, _ := strings.Cut(string(body), "downstream_cx_total: ")
	if _, err := fmt.Sscan(value, &total); err != nil {
		t.Fatalf("%v in %q", err, body)
	}
	return total
}
