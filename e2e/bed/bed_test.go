// SPDX-License-Identifier: Apache-2.0

package bed_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

// newWorld makes a world that is closed, and must be gone, when the test ends.
func newWorld(t *testing.T) *bed.World {
	t.Helper()
	w, err := bed.NewWorld(bed.WorldConfig{Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		start := time.Now()
		if err := w.Close(); err != nil {
			t.Errorf("close world: %v", err)
		}
		t.Logf("world closed in %s", time.Since(start).Round(time.Millisecond))
	})
	return w
}

func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

// pod plugs a namespace with a small HTTP server into a network. It answers
// with its name on port 8080.
func pod(t *testing.T, network *bed.Network, name, address string) *bed.Namespace {
	t.Helper()
	n := must(network.Router().World().Namespace(name))(t)
	if err := network.Attach(n, netip.MustParseAddr(address)); err != nil {
		t.Fatal(err)
	}
	serve(t, n, name)
	return n
}

func serve(t *testing.T, n *bed.Namespace, answer string) {
	t.Helper()
	listener := must(n.Listen("tcp", "0.0.0.0:8080"))(t)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, answer) })}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
}

// reach connects and reports what answered.
func reach(t *testing.T, from *bed.Namespace, address string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, body, err := from.Get(ctx, "http://"+address+"/")
	return body, err
}

func TestNetworksAreApart(t *testing.T) {
	t.Parallel()
	start := time.Now()
	w := newWorld(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	n2 := must(w.Network("n2", bed.NetworkConfig{Pods: netip.MustParsePrefix("10.245.0.0/16")}))(t)
	caller := pod(t, n1, "caller", "10.244.1.2")
	pod(t, n1, "neighbour", "10.244.2.2")
	pod(t, n2, "stranger", "10.245.1.2")
	t.Logf("two networks and three pods in %s", time.Since(start).Round(time.Millisecond))

	if body, err := reach(t, caller, "10.244.2.2:8080"); err != nil || body != "neighbour" {
		t.Errorf("a pod on the same network: got %q, %v", body, err)
	}
	if body, err := reach(t, caller, "10.245.1.2:8080"); err == nil {
		t.Fatalf("a pod on another network answered %q without a route", body)
	}
	if err := n1.Route(n2); err != nil {
		t.Fatal(err)
	}
	if body, err := reach(t, caller, "10.245.1.2:8080"); err != nil || body != "stranger" {
		t.Errorf("a pod on another network, with a route: got %q, %v", body, err)
	}
	if err := n1.Unroute(n2); err != nil {
		t.Fatal(err)
	}
	if body, err := reach(t, caller, "10.245.1.2:8080"); err == nil {
		t.Errorf("a pod on another network answered %q after its route went", body)
	}
}

func TestSameRangesOnBothNetworks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	n2 := must(w.Network("n2", bed.NetworkConfig{}))(t)
	caller := pod(t, n1, "caller", "10.244.1.2")
	pod(t, n2, "twin", "10.244.1.2")
	pod(t, n1, "here", "10.244.1.3")
	pod(t, n2, "there", "10.244.1.3")
	if body, err := reach(t, caller, "10.244.1.3:8080"); err != nil || body != "here" {
		t.Errorf("got %q, %v; want the pod on the caller's own network", body, err)
	}
	if err := n1.Route(n2); err == nil {
		t.Error("a route between networks of the same range was accepted")
	}
}

func TestAddressMovesAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	caller := pod(t, n1, "caller", "10.244.1.2")
	for _, name := range []string{"db-0", "db-0", "other", "db-0"} {
		at := must(w.Namespace(name))(t)
		if err := n1.Attach(at, netip.MustParseAddr("10.244.1.3")); err != nil {
			t.Fatal(err)
		}
		serve(t, at, name)
		if body, err := reach(t, caller, "10.244.1.3:8080"); err != nil || body != name {
			t.Errorf("got %q, %v; want %s, the pod that has the address now", body, err, name)
		}
		if err := at.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRouterBalances(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	n2 := must(w.Network("n2", bed.NetworkConfig{}))(t)
	pod(t, n1, "a", "10.244.1.2")
	pod(t, n1, "b", "10.244.1.3")
	inside := pod(t, n1, "inside", "10.244.1.4")
	outside := pod(t, n2, "outside", "10.244.1.2")
	host := must(w.Host("host"))(t)
	vip := must(n1.NewFrontend())(t)
	front := bed.Frontend{Address: netip.AddrPortFrom(vip, 80), Protocol: "tcp"}
	backends := func(addresses ...string) []netip.AddrPort {
		var list []netip.AddrPort
		for _, a := range addresses {
			list = append(list, netip.MustParseAddrPort(a))
		}
		return list
	}
	answers := func(from *bed.Namespace) map[string]int {
		counts := make(map[string]int)
		for range 10 {
			body, err := reach(t, from, front.Address.String())
			if err != nil {
				body = "refused"
			}
			counts[body]++
		}
		return counts
	}

	if err := n1.Balance(front, backends("10.244.1.2:8080", "10.244.1.3:8080")); err != nil {
		t.Fatal(err)
	}
	for _, from := range []*bed.Namespace{host, outside, inside} {
		if got := answers(from); got["a"] != 5 || got["b"] != 5 {
			t.Errorf("from %s: got %v, want 5 answers of each", from.Name(), got)
		}
	}

	// A connection that exists stays where it is when its backend leaves.
	conn := must(host.Dial(t.Context(), "tcp", front.Address.String()))(t)
	defer conn.Close()
	if err := n1.Balance(front, backends("10.244.1.3:8080")); err != nil {
		t.Fatal(err)
	}
	if got := answers(host); got["b"] != 10 {
		t.Errorf("one backend: got %v, want b alone", got)
	}
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	if n, err := conn.Read(make([]byte, 100)); n == 0 {
		t.Errorf("the connection of before is dead: %v", err)
	}

	if err := n1.Balance(front, nil); err != nil {
		t.Fatal(err)
	}
	if got := answers(host); got["refused"] != 10 {
		t.Errorf("no backend: got %v, want refusals", got)
	}
	if err := n1.Unbalance(front); err != nil {
		t.Fatal(err)
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	caller := pod(t, n1, "caller", "10.244.1.2")
	pod(t, n1, "other", "10.244.1.3")
	meshd := must(w.Host("meshd"))(t)
	api := must(w.Host("api"))(t)
	serve(t, meshd, "meshd")
	serve(t, api, "api")
	to := func(n *bed.Namespace) string { return netip.AddrPortFrom(n.Addr(), 8080).String() }

	for _, story := range []struct {
		fault      bed.Fault
		caller     *bed.Namespace
		dead, fine string
	}{
		{bed.Fault{From: caller, To: meshd}, caller, to(meshd), to(api)},
		{bed.Fault{From: n1, To: meshd}, caller, to(meshd), to(api)},
		{bed.Fault{From: n1}, caller, to(meshd), "10.244.1.3:8080"},
		{bed.Fault{From: meshd, To: api}, meshd, to(api), ""},
		{bed.Fault{From: meshd, To: api, OneWay: true}, api, to(meshd), ""}, // answers do not come back
		{bed.Fault{From: meshd, To: api, Port: 8080}, meshd, to(api), ""},
		{bed.Fault{From: meshd, To: api, Port: 9090}, meshd, "", to(api)},
		{bed.Fault{From: api}, meshd, to(api), ""},
	} {
		if err := w.Cut(story.fault); err != nil {
			t.Fatal(err)
		}
		if story.dead != "" {
			if body, err := reach(t, story.caller, story.dead); err == nil {
				t.Errorf("%s: %s from %s answered %q", story.fault, story.dead, story.caller.Name(), body)
			}
		}
		if story.fine != "" {
			if _, err := reach(t, story.caller, story.fine); err != nil {
				t.Errorf("%s: %s from %s: %v", story.fault, story.fine, story.caller.Name(), err)
			}
		}
		if err := w.Heal(story.fault); err != nil {
			t.Fatal(err)
		}
		for _, address := range []string{story.dead, story.fine} {
			if address == "" {
				continue
			}
			if _, err := reach(t, story.caller, address); err != nil {
				t.Errorf("%s, healed: %s from %s: %v", story.fault, address, story.caller.Name(), err)
			}
		}
	}
}

func TestCaptureSeesWhatCrosses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	caller := pod(t, n1, "caller", "10.244.1.2")
	host := must(w.Host("host"))(t)
	serve(t, host, "a marker in plain sight")
	capture := must(w.CaptureTransit(t.Context(), "tcp port 8080"))(t)
	if _, err := reach(t, caller, netip.AddrPortFrom(host.Addr(), 8080).String()); err != nil {
		t.Fatal(err)
	}
	if err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	text := must(capture.Text(t.Context()))(t)
	if seen := must(capture.Contains([]byte("a marker in plain sight")))(t); !seen {
		t.Errorf("the capture does not hold what crossed:\n%s", text)
	}
	if want := n1.RouterAddress().String(); !strings.Contains(text, want) {
		t.Errorf("the caller's address is not translated to %s:\n%s", want, text)
	}
}

func TestForwardFromTheMachinesLoopback(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	host := must(w.Host("host"))(t)
	serve(t, host, "hello")
	f := must(host.Forward(0, netip.AddrPortFrom(host.Addr(), 8080).String()))(t)
	// This process is inside; its own loopback is not the machine's.
	if conn, err := net.DialTimeout("tcp", f.Addr(), time.Second); err == nil {
		conn.Close()
		t.Errorf("%s answers inside of the bed", f.Addr())
	}
	body, err := bed.OuterGet(f.Addr())
	if err != nil || body != "hello" {
		t.Errorf("from outside: got %q, %v", body, err)
	}
}
