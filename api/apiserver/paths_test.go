// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// gatewayLevel is a source with one gateway of ours at an address.
func gatewayLevel(source federation.SourceID, network federation.Network, address string) registry.Level {
	host, port, _ := net.SplitHostPort(address)
	n, _ := strconv.ParseUint(port, 10, 16)
	return registry.Level{
		Gateways: map[string]*federation.Gateway{"g": {Source: source, Network: network, Name: "g", Ready: 1,
			Addresses: []federation.GatewayAddress{{Host: host, Port: uint32(n)}}}},
		Workloads: map[string]*federation.Workload{"pod-g": {Source: source, Namespace: "isthmus-system", Name: "gw", UID: "pod-g",
			Role: federation.GatewayRole, ServiceAccount: "gw", Network: network, Labels: map[string]string{"isthmus-mesh.io/proxy": "gateway"}}},
	}
}

func gatewaySubject(source federation.SourceID) ca.Subject {
	return ca.Subject{Source: ca.Source(source), Instance: "pod-g", Namespace: "isthmus-system", ServiceAccount: "gw"}
}

// answering plays a gateway with the agent behind it. say is what it answers for the
// SPIFFE ID it saw.
func (w *world) answering(t *testing.T, subject ca.Subject, say func(seen string) string) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{w.ca.Leaf(t, subject)}, NextProtos: []string{"istio"},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: w.ca.Pool(),
	})
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
			secure := conn.(*tls.Conn)
			if secure.Handshake() == nil && secure.ConnectionState().ServerName == api.ProbeName {
				io.WriteString(secure, say(secure.ConnectionState().PeerCertificates[0].URIs[0].String()))
			}
			secure.Close()
		}
	}()
	return l.Addr().String()
}

func truly(seen string) string { return seen + "\n" }

// A path is proven before any workload stands behind the gateway, and only by the agent
// of the very gateway that the path leads to.
func TestAPathIsProvenByMutualTLS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	west, east := w.join(t, "uid-w", "west", "n2"), w.join(t, "uid-e", "east", "n1")
	other := gatewaySubject(west)
	other.ServiceAccount = "somebody"
	for _, c := range []struct {
		why, state, says string
		subject          ca.Subject
		say              func(string) string
	}{
		{"its own agent", "verified", "", gatewaySubject(west), truly},
		{"the gateway of another cluster", "failed", "the address leads to another gateway", gatewaySubject(east), truly},
		{"another identity", "failed", "sa/somebody", other, truly},
		{"one that saw somebody else", "failed", "want spiffe://cluster.local/ns/isthmus-system/sa/meshd", gatewaySubject(west), func(string) string { return "spiffe://cluster.local/ns/x/sa/y\n" }},
		{"one that says nothing", "failed", "does not say whom it saw", gatewaySubject(west), func(string) string { return "" }},
		{"one that does not end", "failed", "does not say whom it saw", gatewaySubject(west), func(string) string { return strings.Repeat("x", 4096) }},
	} {
		address := w.answering(t, c.subject, c.say)
		w.report(t, west, gatewayLevel(west, "n2", address))
		registrytest.Eventually(t, w.store, "the gateway at "+address, func(s *federation.Snapshot) bool {
			return len(s.Gateways["n2"]) == 1 && s.Gateways["n2"][0].Addresses[0].Port == gatewayLevel(west, "n2", address).Gateways["g"].Addresses[0].Port
		})
		report, err := w.client.ProbePaths(t.Context(), &api.ProbePathsRequest{Cluster: "west"})
		if err != nil || len(report.GetPaths()) != 1 {
			t.Fatalf("%s: %v, %v", c.why, report, err)
		}
		p := report.GetPaths()[0]
		if p.GetFrom() != "meshd" || p.GetState() != c.state || !strings.Contains(p.GetMessage(), c.says) {
			t.Errorf("%s: %v", c.why, p)
		}
		if c.state == "verified" && (p.GetElapsed().AsDuration() <= 0 || !strings.HasSuffix(p.GetPeer(), "/sa/gw") || p.GetService() != "") {
			t.Errorf("%s: %v", c.why, p)
		}
	}
}

// A gateway's agent holds its stream to one replica; every replica can try the path from
// there, by asking that one.
func TestAnyReplicaTriesAPath(t *testing.T) {
	t.Parallel()
	one := newWorld(t)
	west, east := one.join(t, "uid-w", "west", "n2"), one.join(t, "uid-e", "east", "n1")
	one.report(t, west, gatewayLevel(west, "n2", one.answering(t, gatewaySubject(west), truly)))
	one.report(t, east, gatewayLevel(east, "n1", one.answering(t, gatewaySubject(east), truly)))
	registrytest.Eventually(t, one.store, "gateways", func(s *federation.Snapshot) bool { return len(s.Gateways) == 2 && len(s.Workloads) == 2 })
	one.lend(t, gatewaySubject(east))

	serving := one.ca.Serving(t, "127.0.0.1")
	peers := apiserver.NewPeerGroup(apiserver.PeerConfig{
		Addresses: func() []string { return []string{one.address} },
		Authority: one.ca.Authority, Certificate: func() *tls.Certificate { return &serving }, Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() { peers.Close() })
	two := newWorld(t, func(c *apiserver.Config) {
		c.Store, c.Authority, c.Peers, c.Replica = one.store, one.ca.Authority, peers, "meshd-1"
		c.Certificate = func() *tls.Certificate { return &serving }
	})
	two.client = api.NewAdminClient(two.dial(t, two.address, one.ca.Admin(t)))

	deadline := time.Now().Add(registrytest.Patience)
	for {
		report, err := two.client.ProbePaths(t.Context(), &api.ProbePathsRequest{Cluster: "west"})
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, p := range report.GetPaths() {
			got += p.GetFrom() + " " + p.GetTo() + " " + p.GetState() + "; "
		}
		const want = "east west verified; meshd west verified; west east unknown; "
		if got == want {
			return
		}
		if time.Now().After(deadline) { // the agent's stream takes a moment to be there
			t.Fatalf("paths %s, want %s", got, want)
		}
	}
}

// lend plays the agent of a gateway, which does for meshd what it is asked.
func (w *world) lend(t *testing.T, subject ca.Subject) {
	t.Helper()
	leaf := w.ca.Leaf(t, subject)
	agent, err := api.NewWorkloadsClient(w.dial(t, w.mesh, leaf)).Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Send(&api.ProbeResult{}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			r, err := agent.Recv()
			if err != nil {
				return
			}
			result := &api.ProbeResult{Id: r.GetId()}
			config := w.ca.ClientTLS(leaf)
			config.InsecureSkipVerify, config.ServerName, config.NextProtos = true, r.GetSni(), r.GetAlpn()
			conn, err := tls.Dial("tcp", r.GetAddress(), config)
			if err == nil {
				seen, _ := io.ReadAll(conn)
				result.Connected, result.Verified = true, r.GetAnswered() && string(seen) == leaf.Leaf.URIs[0].String()+"\n"
				for _, c := range conn.ConnectionState().PeerCertificates {
					result.Chain = append(result.Chain, c.Raw)
				}
				conn.Close()
			}
			agent.Send(result)
		}
	}()
}

// Packets that vanish use up all the time that an agent has: it is heard all the same.
func TestAnAgentThatTriesInVainIsHeard(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	west, east := w.join(t, "uid-w", "west", "n2"), w.join(t, "uid-e", "east", "n1")
	w.report(t, west, gatewayLevel(west, "n2", "127.0.0.1:1"))
	w.report(t, east, gatewayLevel(east, "n1", "127.0.0.1:1"))
	registrytest.Eventually(t, w.store, "gateways", func(s *federation.Snapshot) bool { return len(s.Gateways) == 2 && len(s.Workloads) == 2 })
	agent, err := api.NewWorkloadsClient(w.dial(t, w.mesh, w.ca.Leaf(t, gatewaySubject(east)))).Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Send(&api.ProbeResult{}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			r, err := agent.Recv()
			if err != nil {
				return
			}
			time.AfterFunc(r.GetTimeout().AsDuration(), func() { agent.Send(&api.ProbeResult{Id: r.GetId(), Message: "i/o timeout"}) })
		}
	}()
	deadline := time.Now().Add(registrytest.Patience)
	for {
		report, err := w.client.ProbePaths(t.Context(), &api.ProbePathsRequest{Cluster: "west"})
		if err != nil {
			t.Fatal(err)
		}
		p := report.GetPaths()[0]
		if p.GetFrom() == "east" && p.GetState() == "failed" && p.GetMessage() == "i/o timeout" {
			return
		}
		if time.Now().After(deadline) { // the agent's stream takes a moment to be there
			t.Fatalf("path %v", p)
		}
	}
}
