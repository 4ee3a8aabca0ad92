// SPDX-License-Identifier: Apache-2.0

package gateways_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/gateways"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
	"github.com/isthmus-mesh/isthmus/xds/xdstest"
)

// mesh is two clusters on two networks: a client and a local callee in east, a callee and
// a gateway in west.
type mesh struct {
	snapshot *federation.Snapshot
	pipeline *xdsserver.Pipeline
	ca       *authority

	client, near, far, gateway    *place
	clientProxy, nearProxy        *envoy
	farProxy, gatewayProxy        *envoy
	clientServer, gatewayServer   *xdsserver.Server
	clientLoad, nearLoad, farLoad *federation.Workload
}

const farIP = "10.2.0.2"

func generators() map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator {
	sidecar := func(r xdsserver.Restraint) xdsserver.Generator { return &xds.Builder{Weigh: r.Weigh, Closed: r.Closed} }
	return map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator{
		federation.Sidecar: sidecar, federation.VMRole: sidecar,
		federation.GatewayRole: func(xdsserver.Restraint) xdsserver.Generator { return &gateways.Builder{} },
	}
}

// newMesh starts four proxies, and the programs behind near and far.
func newMesh(t *testing.T) *mesh {
	t.Helper()
	run(t, "mount --make-rprivate /; mount -t tmpfs none /run; mkdir -p /run/netns; ip link set lo up")
	m := &mesh{ca: newAuthority(t)}
	m.client, m.near, m.far, m.gateway = newPlace(t, "client"), newPlace(t, "near"), newPlace(t, "far"), newPlace(t, "gw")
	cable(t, m.client, xdstest.ClientIP, m.near, xdstest.NearIP)
	cable(t, m.client, "172.16.0.1", m.gateway, xdstest.GatewayIP)
	cable(t, m.gateway, "10.2.0.1", m.far, farIP)
	for _, p := range []*place{m.client, m.near, m.far} {
		p.capture(t)
	}
	m.clientLoad = xdstest.Workload("kube:east", "client", "n1", xdstest.ClientIP, federation.Sidecar)
	m.nearLoad = xdstest.Workload("kube:east", "near", "n1", xdstest.NearIP, federation.Sidecar)
	m.farLoad = xdstest.Workload("kube:west", "far", "n2", farIP, federation.Sidecar)
	gw := xdstest.Workload("kube:west", "gw", "n2", "10.2.0.1", federation.GatewayRole)
	m.snapshot = xdstest.Snapshot([]*federation.Workload{m.clientLoad, m.nearLoad, m.farLoad, gw}, xdstest.Record("kube:west", xdstest.Endpoint(m.farLoad)))

	m.pipeline = xdsserver.NewPipeline(xdsserver.PipelineConfig{Generators: generators()})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go func() { _ = m.pipeline.Run(ctx) }()
	m.pipeline.Update(m.snapshot)

	start := func(p *place, w *federation.Workload) (*envoy, *xdsserver.Server) {
		socket, server := serveProxy(t, m.pipeline, w, m.ca)
		variant := "DELTA_GRPC"
		if p == m.gateway || p == m.far {
			variant = "GRPC" // state of the world
		}
		return startEnvoy(t, p, "sidecar~1~"+w.Name+".shop~shop.svc.cluster.local", socket, variant), server
	}
	m.clientProxy, m.clientServer = start(m.client, m.clientLoad)
	m.nearProxy, _ = start(m.near, m.nearLoad)
	m.farProxy, _ = start(m.far, m.farLoad)
	m.gatewayProxy, m.gatewayServer = start(m.gateway, gw)
	serveApps(t, m.near, "near", m.ca)
	serveApps(t, m.far, "far", m.ca)
	for _, e := range []*envoy{m.clientProxy, m.nearProxy, m.farProxy, m.gatewayProxy} {
		until(t, "Envoy "+e.place.name+" is live", func() bool { return strings.Contains(e.admin("/ready"), "LIVE") })
	}
	return m
}

// change computes another snapshot and waits until the client's proxy has it.
func (m *mesh) change(t *testing.T, f func(*federation.Snapshot)) {
	t.Helper()
	s := xdstest.Later(m.snapshot)
	f(s)
	m.snapshot = s
	m.pipeline.Update(s)
	until(t, "the client's proxy is in sync", func() bool {
		list := m.clientServer.Proxies()
		return len(list) == 1 && list[0].Revision == s.Revision && list[0].Synced
	})
}

// serveApps are the programs of one callee.
func serveApps(t *testing.T, p *place, name string, ca *authority) {
	t.Helper()
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
			conn, rw, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer conn.Close()
			fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
			_, _ = io.Copy(conn, rw)
			return
		}
		w.Header().Set("X-From", name)
		fmt.Fprintf(w, "%s %s xfcc=%s", name, r.Proto, r.Header.Get("X-Forwarded-Client-Cert"))
	})
	for _, port := range []string{"8080", "8081", "8082"} {
		server := &http.Server{Handler: handler, Protocols: new(http.Protocols)}
		server.Protocols.SetHTTP1(true)
		server.Protocols.SetUnencryptedHTTP2(true)
		go func() { _ = server.Serve(p.listen(t, "0.0.0.0:"+port)) }()
		t.Cleanup(func() { server.Close() })
	}
	for _, port := range []string{"9000", "9001"} {
		go serve(p.listen(t, "0.0.0.0:"+port), func(c net.Conn) {
			fmt.Fprintf(c, "hello from %s\n", name)
			_, _ = io.Copy(c, c)
		})
	}
	cert, key := ca.issue(t, "spiffe://app/"+name)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	secure := tls.NewListener(p.listen(t, "0.0.0.0:8443"), &tls.Config{Certificates: []tls.Certificate{pair}})
	go serve(secure, func(c net.Conn) {
		_ = c.(*tls.Conn).Handshake()
		fmt.Fprintf(c, "%s sni=%s\n", name, c.(*tls.Conn).ConnectionState().ServerName)
	})
}

func serve(l net.Listener, f func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { defer c.Close(); f(c) }()
	}
}

func TestEnvoy(t *testing.T) {
	if !enterWorld(t) {
		return
	}
	m := newMesh(t)
	http1 := m.client.client()

	t.Run("HTTP across the gateway", func(t *testing.T) {
		until(t, "an answer from far", func() bool {
			code, body, err := get(http1, "http://"+xdstest.VirtualIP+"/")
			t.Log(code, body, err)
			return code == 200 && strings.HasPrefix(body, "far HTTP/1.1") && strings.Contains(body, "URI=spiffe://cluster.local/ns/shop/sa/client")
		})
		if m.gatewayProxy.stat("tcp.eastwest.downstream_cx_total") == "" {
			t.Error("the gateway counted no connection")
		}
	})
	t.Run("a forged identity header is dropped", func(t *testing.T) {
		_, body, err := get(http1, "http://"+xdstest.VirtualIP+"/", "X-Forwarded-Client-Cert", "URI=spiffe://cluster.local/ns/evil/sa/evil")
		if err != nil || strings.Contains(body, "evil") {
			t.Errorf("%s %v", body, err)
		}
	})
	t.Run("HTTP on an unnamed port", func(t *testing.T) {
		code, body, err := get(http1, "http://"+xdstest.VirtualIP+":82/")
		if code != 200 || !strings.HasPrefix(body, "far HTTP/1.1") || !strings.Contains(body, "sa/client") {
			t.Errorf("%d %s %v", code, body, err)
		}
	})
	t.Run("HTTP/2 with prior knowledge", func(t *testing.T) {
		transport := &http.Transport{
			Protocols:   new(http.Protocols),
			DialContext: func(_ context.Context, _, address string) (net.Conn, error) { return m.client.dial(address) },
		}
		transport.Protocols.SetUnencryptedHTTP2(true)
		h2 := &http.Client{Timeout: 10 * time.Second, Transport: transport}
		for _, port := range []string{"80", "81", "82"} {
			code, body, err := get(h2, "http://"+xdstest.VirtualIP+":"+port+"/")
			if code != 200 || !strings.HasPrefix(body, "far HTTP/2.0") {
				t.Errorf("port %s: %d %s %v", port, code, body, err)
			}
		}
	})
	t.Run("server-first TCP, named and unnamed", func(t *testing.T) {
		for _, port := range []string{"83", "84"} {
			start := time.Now()
			conn, err := m.client.dial(xdstest.VirtualIP + ":" + port)
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
			line, err := bufio.NewReader(conn).ReadString('\n')
			t.Logf("port %s: %q after %v", port, line, time.Since(start))
			if line != "hello from far\n" {
				t.Errorf("port %s: %q %v", port, line, err)
			}
			// Half-close: what was sent comes back after we are done.
			fmt.Fprint(conn, "bye")
			_ = conn.(*net.TCPConn).CloseWrite()
			rest, err := io.ReadAll(conn)
			if string(rest) != "bye" {
				t.Errorf("port %s: half-close: %q %v", port, rest, err)
			}
			conn.Close()
		}
	})
	t.Run("the application's own TLS keeps its SNI", func(t *testing.T) {
		conn, err := m.client.dial(xdstest.VirtualIP + ":443")
		if err != nil {
			t.Fatal(err)
		}
		secure := tls.Client(conn, &tls.Config{ServerName: "pay.example", InsecureSkipVerify: true})
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		line, err := bufio.NewReader(secure).ReadString('\n')
		if line != "far sni=pay.example\n" {
			t.Errorf("%q %v", line, err)
		}
	})
	t.Run("a WebSocket outlives unrelated changes and the age of connections", func(t *testing.T) {
		webSocketLives(t, m)
	})
	t.Run("plaintext from outside the mesh", func(t *testing.T) { plaintext(t, m) })
	t.Run("what an SNI can name", func(t *testing.T) { attackGateway(t, m) })
	t.Run("headless pods by their own addresses", func(t *testing.T) { headless(t, m) })
	t.Run("a headless service that exists only elsewhere", func(t *testing.T) { remoteHeadless(t, m) })
	t.Run("routes, subsets and weights across the gateway", func(t *testing.T) { routes(t, m) })
	t.Run("connections outlive a change of their cluster", func(t *testing.T) { outlives(t, m) })
	t.Run("failover follows readiness", func(t *testing.T) { failover(t, m) })
	t.Run("an update resends only what changed", func(t *testing.T) { resends(t, m) })
	t.Run("who comes back is sent nothing", func(t *testing.T) { reconnects(t, m) })
	t.Run("a connection into a cut network ends", func(t *testing.T) { cut(t, m) })
}

// webSocketLives holds a WebSocket while services come and go, for longer than HTTP
// connections to gateways take new requests.
func webSocketLives(t *testing.T, m *mesh) {
	conn, err := m.client.dial(xdstest.VirtualIP + ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(40 * time.Second))
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: pay\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("%v %v", resp, err)
	}
	hold := xds.GatewayConnectionDuration + 5*time.Second
	if testing.Short() {
		hold = 2 * time.Second
	}
	other := federation.ServiceName{Namespace: "shop", Name: "other"}
	for start, n := time.Now(), 0; time.Since(start) < hold; n++ {
		fmt.Fprintf(conn, "%d\n", n)
		if line, err := in.ReadString('\n'); err != nil || line != fmt.Sprintf("%d\n", n) {
			t.Fatalf("after %v: %q %v", time.Since(start), line, err)
		}
		if _, _, err := get(m.client.client(), "http://"+xdstest.VirtualIP+"/"); err != nil {
			t.Fatalf("after %v: %v", time.Since(start), err)
		}
		m.change(t, func(s *federation.Snapshot) {
			if n%2 == 1 {
				delete(s.Records, other)
				return
			}
			r := *xdstest.Record("kube:east")
			r.Name, r.ClusterIPs = other, []netip.Addr{netip.MustParseAddr("10.96.0.77")}
			s.Records[other] = []*federation.Record{&r}
		})
		time.Sleep(400 * time.Millisecond)
	}
	t.Logf("HTTP connections that reached their age: %s", m.clientProxy.stat("cluster.outbound|80||pay.shop.svc.cluster.local.upstream_cx_max_duration_reached"))
}

// plaintext calls near without a proxy: accepted by default, refused where STRICT.
func plaintext(t *testing.T, m *mesh) {
	// Not captured: no mark.
	direct := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext:       func(_ context.Context, _, address string) (net.Conn, error) { return m.client.dialMarked(address, 0) },
		DisableKeepAlives: true,
	}}
	// Nothing of the mesh sends to near yet, so its ports have no service.
	if code, body, err := get(direct, "http://"+xdstest.NearIP+":8080/"); code != 200 || body != "near HTTP/1.1 xfcc=" {
		t.Errorf("%d %q %v", code, body, err)
	}
	m.change(t, func(s *federation.Snapshot) {
		s.Records[xdstest.Pay] = []*federation.Record{xdstest.Record("kube:east", xdstest.Endpoint(m.nearLoad)), xdstest.Record("kube:west", xdstest.Endpoint(m.farLoad))}
	})
	until(t, "near knows its ports", func() bool { return strings.Contains(m.nearProxy.admin("/clusters"), "inbound|8080||") })
	until(t, "plaintext to a port of a service", func() bool {
		code, body, err := get(direct, "http://"+xdstest.NearIP+":8080/", "X-Forwarded-Client-Cert", "URI=spiffe://evil")
		return code == 200 && body == "near HTTP/1.1 xfcc=" && err == nil
	})
	start := time.Now()
	conn, err := m.client.dialMarked(xdstest.NearIP+":9000", 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	line, err := bufio.NewReader(conn).ReadString('\n')
	t.Logf("plaintext server-first: %q after %v", line, time.Since(start))
	if line != "hello from near\n" {
		t.Errorf("%q %v", line, err)
	}
	strict := &federation.Object{
		Source: "kube:east", APIVersion: "security.istio.io/v1", Kind: "PeerAuthentication", Namespace: "istio-system", Name: "default",
		Raw: []byte(`{"apiVersion":"security.istio.io/v1","kind":"PeerAuthentication","metadata":{"name":"default","namespace":"istio-system"},"spec":{"mtls":{"mode":"STRICT"}}}`),
	}
	m.change(t, func(s *federation.Snapshot) { s.Objects = []*federation.Object{strict} })
	until(t, "plaintext is refused", func() bool {
		_, _, err := get(direct, "http://"+xdstest.NearIP+":8080/")
		return err != nil
	})
	until(t, "the refusal is counted", func() bool {
		return m.nearProxy.stat("tcp."+xds.PlaintextRefused+".downstream_cx_total") != ""
	})
	if code, body, err := get(m.client.client(), "http://10.96.0.9/"); code != 200 || !strings.HasPrefix(body, "near ") {
		t.Errorf("mutual TLS under STRICT: %d %q %v", code, body, err)
	}
	m.change(t, func(s *federation.Snapshot) { s.Objects = nil })
}

// attackGateway dials the gateway itself.
func attackGateway(t *testing.T, m *mesh) {
	hello := func(sni string, alpn ...string) error {
		conn, err := m.client.dialMarked(xdstest.GatewayIP+":15443", 0)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
		return tls.Client(conn, &tls.Config{ServerName: sni, NextProtos: alpn, InsecureSkipVerify: true}).Handshake()
	}
	good := "outbound_.80_._.pay.shop.svc.cluster.local"
	for _, c := range []struct {
		what, sni string
		alpn      []string
		counter   string
	}{
		{"no ALPN", good, nil, "listener.eastwest.no_filter_chain_match"},
		{"another ALPN", good, []string{"h2"}, "listener.eastwest.no_filter_chain_match"},
		{"a helper cluster", "xds-grpc", []string{"istio"}, "listener.eastwest.no_filter_chain_match"},
		{"another helper cluster", "sds-grpc", []string{"isthmus"}, "listener.eastwest.no_filter_chain_match"},
		{"a service that is not there", "outbound_.80_._.none.shop.svc.cluster.local", []string{"istio"}, "tcp.eastwest.downstream_cx_no_route"},
		{"a port that is not there", "outbound_.79_._.pay.shop.svc.cluster.local", []string{"istio"}, "tcp.eastwest.downstream_cx_no_route"},
		{"the plain host", "pay.shop.svc.cluster.local", []string{"istio"}, "tcp.eastwest.downstream_cx_no_route"},
	} {
		before := m.gatewayProxy.stat(c.counter)
		if err := hello(c.sni, c.alpn...); err == nil {
			t.Errorf("%s: the handshake succeeded", c.what)
		}
		until(t, c.what+" is counted", func() bool { return m.gatewayProxy.stat(c.counter) != before })
	}
	// Go's client cuts a trailing dot off, so it is written into the hello afterwards.
	counter := "listener.eastwest.no_filter_chain_match"
	before := m.gatewayProxy.stat(counter)
	raw, err := m.client.dialMarked(xdstest.GatewayIP+":15443", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(3 * time.Second))
	if err := tls.Client(&patched{raw, []byte(good + "x"), []byte(good + ".")}, &tls.Config{ServerName: good + "x", NextProtos: []string{"istio"}, InsecureSkipVerify: true}).Handshake(); err == nil {
		t.Error("a trailing dot: the handshake succeeded")
	}
	until(t, "a trailing dot is counted", func() bool { return m.gatewayProxy.stat(counter) != before })
	// Envoy reads SNIs without regard to case: upper case names the same service, and
	// where there is none in lower case it names nothing.
	if err := hello("XDS-GRPC", "istio"); err == nil {
		t.Error("a helper cluster in upper case: the handshake succeeded")
	}
	if err := hello("OUTBOUND_.80_._.NONE.SHOP.SVC.CLUSTER.LOCAL", "istio"); err == nil {
		t.Error("an unknown service in upper case: the handshake succeeded")
	}
	// Without a certificate the callee refuses.
	conn, err := m.client.dialMarked(xdstest.GatewayIP+":15443", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	c := tls.Client(conn, &tls.Config{ServerName: good, NextProtos: []string{"istio"}, InsecureSkipVerify: true})
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: pay\r\n\r\n")
	if b, err := io.ReadAll(c); err == nil || len(b) > 0 {
		t.Errorf("without a certificate: %q %v", b, err)
	}
}

// patched replaces bytes in what is written.
type patched struct {
	net.Conn
	from, to []byte
}

func (p *patched) Write(b []byte) (int, error) {
	return p.Conn.Write(bytes.ReplaceAll(b, p.from, p.to))
}

// object is a piece of configuration of the primary east.
func object(apiVersion, kind, name, spec string) *federation.Object {
	return &federation.Object{
		Source: "kube:east", APIVersion: apiVersion, Kind: kind, Namespace: "shop", Name: name, Created: time.Unix(1, 0),
		Raw: fmt.Appendf(nil, `{"apiVersion":%q,"kind":%q,"metadata":{"name":%q,"namespace":"shop"},"spec":%s}`, apiVersion, kind, name, spec),
	}
}

// outlives holds connections while the list of accounts of their service changes, which
// replaces the cluster.
func outlives(t *testing.T, m *mesh) {
	tcp, err := m.client.dial("10.96.0.9:83")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	ws, err := m.client.dial("10.96.0.9:80")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	for _, c := range []net.Conn{tcp, ws} {
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	}
	tcpIn, wsIn := bufio.NewReader(tcp), bufio.NewReader(ws)
	if _, err := tcpIn.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(ws, "GET / HTTP/1.1\r\nHost: pay\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if resp, err := http.ReadResponse(wsIn, nil); err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	before := m.clientProxy.stat("cluster_manager.cluster_modified")
	for n := range 4 {
		m.change(t, func(s *federation.Snapshot) {
			other := xdstest.Endpoint(m.farLoad)
			other.Workload, other.UID, other.ServiceAccount = "new", "uid-new", fmt.Sprintf("account-%d", n)
			s.Records[xdstest.Pay] = []*federation.Record{
				xdstest.Record("kube:east", xdstest.Endpoint(m.nearLoad)), xdstest.Record("kube:west", xdstest.Endpoint(m.farLoad), other),
			}
		})
		for name, c := range map[string]struct {
			conn net.Conn
			in   *bufio.Reader
		}{"TCP": {tcp, tcpIn}, "WebSocket": {ws, wsIn}} {
			fmt.Fprintf(c.conn, "%d\n", n)
			if line, err := c.in.ReadString('\n'); err != nil || line != fmt.Sprintf("%d\n", n) {
				t.Errorf("%s after change %d: %q %v", name, n, line, err)
			}
		}
	}
	if m.clientProxy.stat("cluster_manager.cluster_modified") == before {
		t.Error("no cluster was replaced: the test shows nothing")
	}
}

// headless calls a pod of the own cluster by its address.
func headless(t *testing.T, m *mesh) {
	db := federation.ServiceName{Namespace: "shop", Name: "db"}
	m.change(t, func(s *federation.Snapshot) {
		e := xdstest.Endpoint(m.nearLoad)
		e.Hostname = "near-0"
		r := *xdstest.Record("kube:east", e)
		r.Name, r.Type, r.ClusterIPs = db, federation.Headless, nil
		s.Records[db] = []*federation.Record{&r}
	})
	until(t, "a call by the pod's address is mutual TLS", func() bool {
		code, body, err := get(m.client.client(), "http://"+xdstest.NearIP+":8080/")
		return err == nil && code == 200 && strings.Contains(body, "sa/client")
	})
	conn, err := m.client.dial(xdstest.NearIP + ":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if line, err := bufio.NewReader(conn).ReadString('\n'); line != "hello from near\n" {
		t.Errorf("%q %v", line, err)
	}
	if got := m.clientProxy.stat("cluster.outbound|83||db.shop.svc.cluster.local.ssl.handshake"); got == "" {
		t.Error("server-first TCP to a headless pod was not encrypted")
	}
	m.change(t, func(s *federation.Snapshot) { delete(s.Records, db) })
}

// remoteHeadless calls a pod of another cluster by its name's own address.
func remoteHeadless(t *testing.T, m *mesh) {
	db := federation.ServiceName{Namespace: "shop", Name: "rdb"}
	m.change(t, func(s *federation.Snapshot) {
		e := xdstest.Endpoint(m.farLoad)
		e.Hostname = "rdb-0"
		r := *xdstest.Record("kube:west", e)
		r.Name, r.Type, r.ClusterIPs = db, federation.Headless, nil
		s.Records[db] = []*federation.Record{&r}
		addresses := map[string]federation.VirtualAddress{}
		for host, a := range s.Addresses {
			addresses[host] = a
		}
		for i, host := range []string{"rdb.shop.svc.cluster.local", "rdb-0.rdb.shop.svc.cluster.local", "rdb-0.west.rdb.shop.svc.clusterset.local"} {
			addresses[host] = federation.VirtualAddress{Host: host, V4: netip.MustParseAddr(fmt.Sprintf("240.240.0.%d", 20+i))}
		}
		s.Addresses = addresses
	})
	for _, ip := range []string{"240.240.0.20", "240.240.0.21", "240.240.0.22"} {
		until(t, "an answer by "+ip, func() bool {
			code, body, err := get(m.client.client(), "http://"+ip+"/")
			return err == nil && code == 200 && strings.HasPrefix(body, "far ")
		})
	}
	m.change(t, func(s *federation.Snapshot) { delete(s.Records, db) })
}

// routes sends by header and by weight to subsets in both networks.
func routes(t *testing.T, m *mesh) {
	m.change(t, func(s *federation.Snapshot) {
		near, far := xdstest.Endpoint(m.nearLoad), xdstest.Endpoint(m.farLoad)
		near.Labels, far.Labels = map[string]string{"at": "near"}, map[string]string{"at": "far"}
		s.Records[xdstest.Pay] = []*federation.Record{xdstest.Record("kube:east", near), xdstest.Record("kube:west", far)}
		s.Objects = []*federation.Object{
			object("networking.istio.io/v1", "DestinationRule", "pay", `{"host":"pay","subsets":[{"name":"near","labels":{"at":"near"}},{"name":"Far","labels":{"at":"far"}}]}`),
			object("networking.istio.io/v1", "VirtualService", "pay", `{"hosts":["pay"],"http":[
				{"match":[{"headers":{"x-at":{"exact":"far"}}}],"route":[{"destination":{"host":"pay","subset":"Far"}}]},
				{"match":[{"uri":{"prefix":"/half"}}],"route":[{"destination":{"host":"pay","subset":"near"},"weight":50},{"destination":{"host":"pay","subset":"Far"},"weight":50}]},
				{"route":[{"destination":{"host":"pay","subset":"near"}}]}]}`),
		}
	})
	count := func(path string, headers ...string) map[string]int {
		got := map[string]int{}
		for range 40 {
			code, body, err := get(m.client.client(), "http://10.96.0.9"+path, headers...)
			who, _, _ := strings.Cut(body, " ")
			if err != nil || code != 200 {
				who = fmt.Sprint(code, body, err)
			}
			got[who]++
		}
		return got
	}
	until(t, "all to near", func() bool { return count("/")["near"] == 40 })
	until(t, "all with the header to far", func() bool { return count("/", "x-at", "far")["far"] == 40 })
	half := count("/half")
	if half["near"] < 8 || half["far"] < 8 || half["near"]+half["far"] != 40 {
		t.Errorf("50 to 50: %v", half)
	}
	m.change(t, func(s *federation.Snapshot) { s.Objects = nil })
}

// failover makes the local endpoint unready while it still answers.
func failover(t *testing.T, m *mesh) {
	pay := xdstest.Pay
	from := func() string {
		_, body, err := get(m.client.client(), "http://10.96.0.9/")
		if err != nil {
			return err.Error()
		}
		who, _, _ := strings.Cut(body, " ")
		return who
	}
	set := func(h federation.Health) {
		m.change(t, func(s *federation.Snapshot) {
			e := xdstest.Endpoint(m.nearLoad)
			e.Health = h
			s.Records[pay] = []*federation.Record{xdstest.Record("kube:east", e), xdstest.Record("kube:west", xdstest.Endpoint(m.farLoad))}
		})
	}
	for _, step := range []struct {
		health federation.Health
		want   string
	}{{federation.Ready, "near"}, {federation.NotReady, "far"}, {federation.Ready, "near"}} {
		set(step.health)
		until(t, "answers from "+step.want, func() bool { return from() == step.want })
		for range 20 {
			if got := from(); got != step.want {
				t.Fatalf("near is %s: answer from %q", step.health, got)
			}
		}
	}
}

// resends counts what an endpoint's change costs.
func resends(t *testing.T, m *mesh) {
	before := m.clientProxy.stat("listener_manager.lds.update_success") + "/" + m.clientProxy.stat("cluster_manager.cds.update_success")
	m.change(t, func(s *federation.Snapshot) {
		e := xdstest.Endpoint(m.nearLoad)
		e.Health = federation.NotReady
		s.Records[xdstest.Pay] = []*federation.Record{xdstest.Record("kube:east", e), xdstest.Record("kube:west", xdstest.Endpoint(m.farLoad))}
	})
	after := m.clientProxy.stat("listener_manager.lds.update_success") + "/" + m.clientProxy.stat("cluster_manager.cds.update_success")
	if before != after {
		t.Errorf("listeners/clusters were sent again: %s, then %s", before, after)
	}
	for _, e := range []*envoy{m.clientProxy, m.nearProxy, m.farProxy, m.gatewayProxy} {
		if got := e.stat("listener_manager.lds.update_rejected") + e.stat("cluster_manager.cds.update_rejected"); got != "" {
			t.Errorf("%s refused updates: %s", e.place.name, got)
		}
	}
}

// reconnects ends the client's stream, as a restart of the control service does.
func reconnects(t *testing.T, m *mesh) {
	// A weight that changed less than a second ago is held back, and would be sent now.
	until(t, "nothing is held back", func() bool { return m.pipeline.Held() == 0 })
	until(t, "the client's proxy has everything", func() bool { return m.clientServer.Proxies()[0].Synced })
	before := m.clientServer.Proxies()[0].Connected
	if n := m.clientServer.Disconnect(func(xds.Proxy) bool { return true }); n != 1 {
		t.Fatalf("%d streams", n)
	}
	sent := sentTo(t, m.clientServer)
	until(t, "the proxy is back and in sync", func() bool {
		list := m.clientServer.Proxies()
		return len(list) == 1 && list[0].Connected.After(before) && list[0].Synced && len(list[0].Types) == 4
	})
	if got := sentTo(t, m.clientServer); got != sent {
		t.Errorf("%v resources were sent again", got-sent)
	}
	if code, _, err := get(m.client.client(), "http://"+xdstest.VirtualIP+"/"); code != 200 {
		t.Errorf("%d %v", code, err)
	}
}

// sentTo is how many resources a server has sent.
func sentTo(t *testing.T, s *xdsserver.Server) float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(s)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == "isthmus_xds_resources_sent_total" {
			for _, c := range f.Metric {
				sum += c.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// cut drops all packets between the client and the gateway while a connection is up.
func cut(t *testing.T, m *mesh) {
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	m.change(t, func(s *federation.Snapshot) {
		s.Records[xdstest.Pay] = []*federation.Record{xdstest.Record("kube:west", xdstest.Endpoint(m.farLoad))}
	})
	conn, err := m.client.dial(xdstest.VirtualIP + ":83")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	_ = conn.SetDeadline(time.Now().Add(60 * time.Second))
	if line, err := in.ReadString('\n'); err != nil {
		t.Fatal(line, err)
	}
	run(t, "ip -n gw link set toclient down")
	start := time.Now()
	fmt.Fprint(conn, "anyone?")
	_, err = in.ReadString('\n')
	if took := time.Since(start); err == nil || took > 15*time.Second {
		t.Errorf("after %v: %v", took, err)
	} else {
		t.Logf("ended after %v", took)
	}
}
