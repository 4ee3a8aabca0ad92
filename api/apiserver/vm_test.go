// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

func webOne() *api.VM {
	return &api.VM{
		Metadata: &api.Metadata{Name: "web-1"},
		Spec: &api.VMSpec{
			Network: "n1", Namespace: "legacy", Service: "web", Ports: []*api.VMPort{{Number: 80, Target: 8080, Protocol: "http"}},
			HealthCheck: "http://:8080/ready",
		},
	}
}

func (w *world) phase(t *testing.T) *api.VMStatus {
	t.Helper()
	list, err := w.client.ListVMs(t.Context(), &api.ListVMsRequest{Name: "web-1"})
	if err != nil || len(list.GetItems()) != 1 {
		t.Fatalf("list %v, %v", list, err)
	}
	return list.GetItems()[0].GetStatus()
}

// awaitPhase waits until the machine is in a phase.
func (w *world) awaitPhase(t *testing.T, phase string) *api.VMStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), registrytest.Patience)
	defer cancel()
	for {
		seen := w.store.Health().Revision
		st := w.phase(t)
		if st.GetPhase() == phase {
			return st
		}
		if err := w.store.WaitFor(ctx, int64(seen)+1); err != nil {
			t.Fatalf("phase %s, want %s: %v, %v", st.GetPhase(), phase, st, err)
		}
	}
}

// A machine's life: token, certificate, reports, silence, return, end.
func TestTheLifeOfAVirtualMachine(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	out, err := w.client.OnboardVM(t.Context(), &api.OnboardVMRequest{Vm: webOne()})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.GetToken(), "isthmus-vm.") || strings.Contains(out.GetLine(), out.GetToken()) || !strings.Contains(out.GetLine(), "meshd.example:8443") {
		t.Errorf("token %q, line %q", out.GetToken(), out.GetLine())
	}
	if len(out.GetFindings()) != 1 || out.GetFindings()[0].GetCode() != string(api.NetworkNoGateway) {
		t.Errorf("findings %v", out.GetFindings())
	}
	w.awaitPhase(t, "Pending")

	// Again: a new token, and the old one is void.
	again, err := w.client.OnboardVM(t.Context(), &api.OnboardVMRequest{Vm: webOne()})
	if err != nil || again.GetOutcome() != "reissued" || again.GetToken() == out.GetToken() {
		t.Fatalf("outcome %q, %v", again.GetOutcome(), err)
	}

	cert := w.ca.Leaf(t, ca.Subject{Source: "vm:n1", Instance: "web-1", Namespace: "legacy", ServiceAccount: "web"})
	stream, err := api.NewWorkloadsClient(w.dial(t, w.mesh, cert)).Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tell := func(healthy bool, addresses ...string) *api.HealthAck {
		t.Helper()
		if err := stream.Send(&api.HealthReport{Healthy: healthy, Message: "m", Addresses: addresses, Version: "v0.1.0"}); err != nil {
			t.Fatal(err)
		}
		ack, err := stream.Recv()
		if err != nil || ack.GetIntervalSeconds() == 0 {
			t.Fatalf("ack %v, %v", ack, err)
		}
		return ack
	}
	if ack := tell(true, "127.0.0.1", "10.1.0.30", "fe80::1", "::1"); !ack.GetAccepted() {
		t.Fatalf("ack %v", ack)
	}
	if st := w.awaitPhase(t, "Healthy"); !slices.Equal(st.GetAddresses(), []string{"10.1.0.30"}) {
		t.Errorf("addresses %v", st.GetAddresses())
	}
	if ack := tell(false, "10.1.0.30"); !ack.GetAccepted() {
		t.Fatalf("ack %v", ack)
	}
	w.awaitPhase(t, "Unhealthy")
	for _, bad := range [][]string{nil, {"127.0.0.1"}, {"nonsense"}} {
		if ack := tell(true, bad...); ack.GetAccepted() || ack.GetMessage() == "" {
			t.Errorf("addresses %v: ack %v", bad, ack)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	w.awaitPhase(t, "Lost")

	// Out: its stream is closed and it is refused from then on.
	if stream, err = api.NewWorkloadsClient(w.dial(t, w.mesh, cert)).Report(t.Context()); err != nil {
		t.Fatal(err)
	}
	tell(true, "10.1.0.30")
	if _, err := w.client.OffboardVM(t.Context(), &api.OffboardVMRequest{Name: "web-1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the stream of a machine that is out: %v", err)
	}
	if _, err := w.client.OffboardVM(t.Context(), &api.OffboardVMRequest{Name: "web-1"}); api.ProblemOf(err).Code != api.UnknownName {
		t.Errorf("out twice: %v", err)
	}
}

func TestWhoMayNotReport(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if _, err := w.client.OnboardVM(t.Context(), &api.OnboardVMRequest{Vm: webOne()}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		who     string
		subject *ca.Subject
		status  codes.Code
		says    string
	}{
		{"nobody", nil, codes.Unauthenticated, ""},
		{"a pod", &ca.Subject{Source: "kube:1", Instance: "web-1", Namespace: "legacy", ServiceAccount: "web"}, codes.PermissionDenied, "no virtual machine"},
		{"a machine that is not registered", &ca.Subject{Source: "vm:n1", Instance: "web-2", Namespace: "legacy", ServiceAccount: "web"}, codes.OK, "not registered"},
		{"a machine with another account", &ca.Subject{Source: "vm:n1", Instance: "web-1", Namespace: "legacy", ServiceAccount: "db"}, codes.OK, "onboard it again"},
		{"a machine of another network", &ca.Subject{Source: "vm:n2", Instance: "web-1", Namespace: "legacy", ServiceAccount: "web"}, codes.OK, "not registered"},
	} {
		conn := w.dial(t, w.mesh)
		if c.subject != nil {
			conn = w.dial(t, w.mesh, w.ca.Leaf(t, *c.subject))
		}
		stream, err := api.NewWorkloadsClient(conn).Report(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		stream.Send(&api.HealthReport{Healthy: true, Addresses: []string{"10.1.0.30"}}) // the answer tells
		ack, err := stream.Recv()
		if status.Code(err) != c.status || ack.GetAccepted() || !strings.Contains(ack.GetMessage()+api.ProblemOf(err).Message, c.says) {
			t.Errorf("%s: ack %v, %v", c.who, ack, err)
		}
	}
	if st := w.phase(t); st.GetPhase() != "Pending" {
		t.Errorf("phase %s", st.GetPhase())
	}
}

func TestWhatNoMachineCanBe(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for says, change := range map[string]func(*api.OnboardVMRequest){
		`name "Web"`:             func(r *api.OnboardVMRequest) { r.Vm.Metadata.Name = "Web" },
		`network ""`:             func(r *api.OnboardVMRequest) { r.Vm.Spec.Network = "" },
		"ports are missing":      func(r *api.OnboardVMRequest) { r.Vm.Spec.Ports = nil },
		`protocol "smtp"`:        func(r *api.OnboardVMRequest) { r.Vm.Spec.Ports[0].Protocol = "smtp" },
		"port 0":                 func(r *api.OnboardVMRequest) { r.Vm.Spec.Ports[0].Number = 0 },
		"healthCheck":            func(r *api.OnboardVMRequest) { r.Vm.Spec.HealthCheck = "http://10.0.0.1:80/" },
		"tokenLifetime 48h0m0s,": func(r *api.OnboardVMRequest) { r.TokenLifetime = durationpb.New(48 * time.Hour) },
	} {
		r := &api.OnboardVMRequest{Vm: webOne()}
		change(r)
		_, err := w.client.OnboardVM(t.Context(), r)
		if p := api.ProblemOf(err); p.Status != codes.InvalidArgument || !strings.Contains(p.Message, says) {
			t.Errorf("want %q, got %v", says, err)
		}
	}
	if n := len(w.store.VMs()); n != 0 {
		t.Errorf("%d machines", n)
	}
}

// Paths are tried by whoever is where they begin.
func TestPathsAreTriedFromWhereTheyBegin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	east, west := w.join(t, "uid-e", "east", "n1"), w.join(t, "uid-w", "west", "n2")
	gateway := func(source federation.SourceID, network federation.Network, host string) registry.Level {
		return registry.Level{
			Gateways: map[string]*federation.Gateway{"g": {Source: source, Network: network, Name: "g", Ready: 1,
				Addresses: []federation.GatewayAddress{{Host: host, Port: 1}}}},
			Workloads: map[string]*federation.Workload{"pod-g": {Source: source, Namespace: "isthmus-system", Name: "gw", UID: "pod-g",
				Role: federation.GatewayRole, ServiceAccount: "gw", Network: network}},
		}
	}
	// Nobody listens on port 1 of loopback, so meshd's own trials fail at once.
	w.report(t, east, gateway(east, "n1", "127.0.0.1"))
	w.report(t, west, gateway(west, "n2", "127.0.0.2"))
	registrytest.Eventually(t, w.store, "gateways", func(s *federation.Snapshot) bool { return len(s.Gateways) == 2 && len(s.Workloads) == 2 })

	subject := ca.Subject{Source: ca.Source(east), Instance: "pod-g", Namespace: "isthmus-system", ServiceAccount: "gw"}
	agent, err := api.NewWorkloadsClient(w.dial(t, w.mesh, w.ca.Leaf(t, subject))).Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Send(&api.ProbeResult{}); err != nil {
		t.Fatal(err)
	}
	asked := make(chan *api.ProbeRequest, 8)
	go func() {
		for {
			r, err := agent.Recv()
			if err != nil {
				return
			}
			asked <- r
			agent.Send(&api.ProbeResult{Id: r.GetId() + 1000, Connected: true}) // nobody asked for this one
			agent.Send(&api.ProbeResult{Id: r.GetId(), Connected: true})
		}
	}()
	var got []string
	deadline := time.Now().Add(registrytest.Patience)
	for {
		report, err := w.client.ProbePaths(t.Context(), &api.ProbePathsRequest{Cluster: "west"})
		if err != nil {
			t.Fatal(err)
		}
		got = nil
		for _, p := range report.GetPaths() {
			got = append(got, p.GetFrom()+" "+p.GetTo()+" "+p.GetState())
		}
		want := []string{"east west reached", "meshd west failed", "west east unknown"}
		if slices.Equal(got, want) {
			break
		}
		if time.Now().After(deadline) { // the agent's stream takes a moment to be there
			t.Fatalf("paths %v, want %v", got, want)
		}
	}
	if r := <-asked; r.GetAddress() != "127.0.0.2:1" || r.GetSni() != "" {
		t.Errorf("the agent was asked %v", r)
	}
}

// spent are tokens that were all used.
type spent struct{ apiserver.Tokens }

func (spent) List(context.Context) ([]ca.JoinToken, error) { return nil, nil }

// Whether a token was used is known to every replica, not only to the one that made it;
// and a machine whose certificate ended while it was away is told apart from one that
// needs no token.
func TestWhatEndedWhileAMachineWasAway(t *testing.T) {
	t.Parallel()
	var ahead atomic.Int64
	clock := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	w := newWorld(t, func(c *apiserver.Config) { c.Clock = clock })
	if _, err := w.client.OnboardVM(t.Context(), &api.OnboardVMRequest{Vm: webOne()}); err != nil {
		t.Fatal(err)
	}
	w.awaitPhase(t, "Pending")
	two := newWorld(t, func(c *apiserver.Config) {
		c.Store, c.Authority, c.Clock, c.Tokens, c.Replica = w.store, w.ca.Authority, clock, spent{c.Tokens}, "meshd-1"
	})
	two.client = api.NewAdminClient(two.dial(t, two.address, w.ca.Admin(t)))
	elsewhere := func() *api.VMStatus {
		t.Helper()
		list, err := two.client.ListVMs(t.Context(), &api.ListVMsRequest{Name: "web-1"})
		if err != nil {
			t.Fatal(err)
		}
		return list.GetItems()[0].GetStatus()
	}
	if st := elsewhere(); st.GetPhase() != "Redeemed" {
		t.Errorf("a used token: %v", st)
	}
	ahead.Store(int64(time.Hour))
	if st := elsewhere(); st.GetPhase() != "Expired" || !strings.Contains(st.GetMessage(), "mesh vm onboard web-1") {
		t.Errorf("an hour later: %v", st)
	}
	ahead.Store(0)

	cert := w.ca.Leaf(t, ca.Subject{Source: "vm:n1", Instance: "web-1", Namespace: "legacy", ServiceAccount: "web"})
	stream, err := api.NewWorkloadsClient(w.dial(t, w.mesh, cert)).Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ends := time.Now().Add(20 * time.Hour)
	if err := stream.Send(&api.HealthReport{Healthy: true, Addresses: []string{"10.1.0.30"}, CertificateExpires: timestamppb.New(ends)}); err != nil {
		t.Fatal(err)
	}
	if st := w.awaitPhase(t, "Healthy"); !st.GetCertificateExpires().AsTime().Equal(ends.UTC()) {
		t.Errorf("certificate until %v, want %v", st.GetCertificateExpires().AsTime(), ends)
	}
	stream.CloseSend()
	if st := w.awaitPhase(t, "Lost"); !strings.Contains(st.GetMessage(), "needs no token") {
		t.Errorf("%v", st)
	}
	ahead.Store(int64(21 * time.Hour))
	if st := elsewhere(); st.GetPhase() != "Expired" || !strings.Contains(st.GetMessage(), "its certificate ended at") || !strings.Contains(st.GetMessage(), "mesh vm onboard web-1") {
		t.Errorf("after its certificate ended: %v", st)
	}
}
