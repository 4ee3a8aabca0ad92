// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

func TestAClusterJoinsOnceAndAgainUnchanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	east := request(t, "uid-e", "east", "n1")
	dry := proto.CloneOf(east)
	dry.DryRun, dry.Reader, dry.Writer = true, nil, nil
	for _, step := range []struct {
		what, outcome string
		request       *api.RegisterClusterRequest
		newNetwork    bool
	}{
		{"foretold", "created", dry, true},
		{"joined", "created", east, true},
		{"joined again", "unchanged", east, false},
		{"foretold again", "unchanged", dry, false},
	} {
		answer, err := w.client.RegisterCluster(t.Context(), step.request)
		if err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		if answer.GetOutcome() != step.outcome || answer.GetNewNetwork() != step.newNetwork {
			t.Errorf("%s: outcome %q, new network %v", step.what, answer.GetOutcome(), answer.GetNewNetwork())
		}
		if !strings.Contains(string(answer.GetRoot()), "BEGIN CERTIFICATE") || answer.GetTrustDomain() != "cluster.local" || len(answer.GetAdvertised()) != 1 {
			t.Errorf("%s: answer %v", step.what, answer)
		}
		registrytest.Eventually(t, w.store, "the member", func(s *federation.Snapshot) bool {
			return len(s.Clusters) == 1 || step.what == "foretold"
		})
	}
	credentials, err := w.store.Credentials(t.Context(), "uid-e")
	if err != nil || credentials.Reader.Token != "reader" || credentials.Writer.Token != "writer" {
		t.Errorf("credentials %+v, %v", credentials, err)
	}
	// A change keeps the credential that meshd has by now.
	east.Reader, east.Writer = nil, nil
	east.Cluster.Spec.Network = "n2"
	if answer, err := w.client.RegisterCluster(t.Context(), east); err != nil || answer.GetOutcome() != "updated" {
		t.Errorf("outcome %q, %v", answer.GetOutcome(), err)
	}
	if credentials, err = w.store.Credentials(t.Context(), "uid-e"); err != nil || credentials.Reader.Token != "reader" {
		t.Errorf("credentials %+v, %v", credentials, err)
	}
}

func TestWhoMayNotJoin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(t, "uid-e", "east", "n1")
	east, err := w.client.GetCluster(t.Context(), &api.GetClusterRequest{Name: "east"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		why    string
		change func(*api.RegisterClusterRequest)
		status codes.Code
		code   api.Code
		says   string
	}{
		{"the cluster is a member under another name", func(r *api.RegisterClusterRequest) { r.Cluster.Metadata.Uid = "uid-e" },
			codes.AlreadyExists, api.DuplicateCluster, `as "east"`},
		{"the name is taken", func(r *api.RegisterClusterRequest) { r.Cluster.Metadata.Name = "east" },
			codes.AlreadyExists, api.DuplicateName, "uid-e"},
		{"the signing key is taken", func(r *api.RegisterClusterRequest) { r.Cluster.Spec.IssuerKeys = east.Spec.IssuerKeys },
			codes.AlreadyExists, api.DuplicateKey, `cluster "east"`},
		{"no key", func(r *api.RegisterClusterRequest) { r.Cluster.Spec.IssuerKeys = nil },
			codes.InvalidArgument, api.InvalidInput, "issuerKeys"},
		{"garbage for a key", func(r *api.RegisterClusterRequest) { r.Cluster.Spec.IssuerKeys = []byte("{") },
			codes.InvalidArgument, api.InvalidInput, "issuerKeys"},
		{"no UID", func(r *api.RegisterClusterRequest) { r.Cluster.Metadata.Uid = "" },
			codes.InvalidArgument, api.InvalidInput, "uid"},
		{"a UID that is a path", func(r *api.RegisterClusterRequest) { r.Cluster.Metadata.Uid = "../x" },
			codes.InvalidArgument, api.InvalidInput, "uid"},
		{"a name with a slash", func(r *api.RegisterClusterRequest) { r.Cluster.Metadata.Name = "a/b" },
			codes.InvalidArgument, api.InvalidInput, `"a/b"`},
		{"no network", func(r *api.RegisterClusterRequest) { r.Cluster.Spec.Network = "" },
			codes.InvalidArgument, api.InvalidInput, "network"},
		{"a strange role", func(r *api.RegisterClusterRequest) { r.Cluster.Spec.Role = "king" },
			codes.InvalidArgument, api.InvalidInput, `role "king"`},
		{"plain HTTP", func(r *api.RegisterClusterRequest) { r.Cluster.Spec.ApiServer = "http://192.0.2.1" },
			codes.InvalidArgument, api.InvalidInput, "apiServer"},
		{"a grant with a star in the middle", func(r *api.RegisterClusterRequest) {
			r.Cluster.Spec.Grant = &api.Grant{Namespaces: []string{"a*b"}}
		}, codes.InvalidArgument, api.InvalidInput, "a*b"},
		{"no credential", func(r *api.RegisterClusterRequest) { r.Reader = nil },
			codes.InvalidArgument, api.InvalidInput, "reader"},
		{"an expired token", func(r *api.RegisterClusterRequest) {
			r.Reader.Expires = timestamppb.New(time.Now().Add(-time.Minute))
		}, codes.InvalidArgument, api.CredentialRefused, "expired"},
	} {
		r := request(t, "uid-w", "west", "n2")
		c.change(r)
		_, err := w.client.RegisterCluster(t.Context(), r)
		p := api.ProblemOf(err)
		if p.Status != c.status || p.Code != c.code || !strings.Contains(p.Message, c.says) {
			t.Errorf("%s: %v %s %q, want %v %s %q", c.why, p.Status, p.Code, p.Message, c.status, c.code, c.says)
		}
	}
	if n := len(w.store.Members()); n != 1 {
		t.Errorf("%d members", n)
	}
}

func TestARebuiltClusterTakesItsPlace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(t, "uid-old", "east", "n1")
	rebuilt := request(t, "uid-new", "east", "n1")
	rebuilt.Replace = true
	answer, err := w.client.RegisterCluster(t.Context(), rebuilt)
	if err != nil || answer.GetOutcome() != "replaced" {
		t.Fatalf("outcome %q, %v", answer.GetOutcome(), err)
	}
	registrytest.Eventually(t, w.store, "only the new cluster", func(s *federation.Snapshot) bool {
		return len(s.Clusters) == 1 && s.Clusters["uid-new"] != nil
	})
	if err := w.ca.Authority.Revoked("kube:uid-old", "some-pod"); !errors.Is(err, ca.ErrRevoked) {
		t.Errorf("the cluster that was replaced still gets certificates (%v)", err)
	}
	if err := w.ca.Authority.Revoked("kube:uid-new", "some-pod"); err != nil {
		t.Error(err)
	}
}

func TestAJoinHearsAtOnceWhatIsOdd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := request(t, "uid-e", "east", "n1")
	r.Cluster.Spec.ApiServer = "https://127.0.0.1:6443"
	r.DryRun = true
	answer, err := w.client.RegisterCluster(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range answer.GetFindings() {
		found = append(found, f.GetCode())
	}
	if want := []string{string(api.LoopbackAPIServer), string(api.StaticCredential)}; !slices.Equal(found, want) {
		t.Errorf("findings %v, want %v", found, want)
	}
}

func TestClustersTellHowTheyAre(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	east := w.join(t, "uid-e", "east", "n1")
	w.join(t, "uid-w", "west", "n2")
	w.report(t, east, registry.Level{
		Records: registrytest.Records(registrytest.Record(east, "shop", "cart", 3), registrytest.Record(east, "shop", "pay", 2)),
		Gateways: map[string]*federation.Gateway{"isthmus-system/gw": {
			Source: east, Network: "n1", Name: "isthmus-system/gw", Pending: "the load balancer has no address yet",
		}},
	})
	now := time.Now()
	good := federation.Condition{Type: federation.Synced, Status: true, Since: now.Add(-time.Hour)}
	for _, c := range []struct {
		what   string
		state  registry.SourceState
		phase  string
		atMost time.Duration
		min    time.Duration
	}{
		{"all is well", registry.SourceState{Source: east, Holding: true, Status: registry.Status{
			Conditions: []federation.Condition{good, {Type: federation.Reachable, Status: true}},
			Beacon:     now, Lag: 30 * time.Millisecond, Version: "v1.36.3", CredentialsExpire: now.Add(20 * time.Hour),
		}}, "Ready", time.Second, 0},
		{"its API server is away", registry.SourceState{Source: east, Holding: true, Status: registry.Status{
			Conditions: []federation.Condition{good, {Type: federation.Reachable, Status: false, Reason: "Refused", Since: now.Add(-42 * time.Second)}},
			Beacon:     now.Add(-42 * time.Second), Lag: 30 * time.Millisecond,
		}}, "Degraded", time.Minute, 42 * time.Second},
		{"it says nothing of one kind", registry.SourceState{Source: east, Holding: true, Status: registry.Status{
			Conditions: []federation.Condition{{Type: federation.Synced, Reason: "Silent"}, {Type: federation.Reachable, Status: true}},
			Beacon:     now, Lag: 30 * time.Millisecond, Unheard: now.Add(-20 * time.Second),
		}}, "Degraded", time.Minute, 20 * time.Second},
		{"another cluster answers", registry.SourceState{Source: east, Holding: true, Status: registry.Status{
			Conditions: []federation.Condition{good, {Type: federation.SameCluster, Status: false}},
		}}, "Refused", time.Minute, 0},
		{"it has not synced", registry.SourceState{Source: east, Holding: true}, "Joining", time.Minute, 0},
	} {
		w.sources.set(c.state)
		got, err := w.client.GetCluster(t.Context(), &api.GetClusterRequest{Name: "east"})
		if err != nil {
			t.Fatal(err)
		}
		st := got.GetStatus()
		if st.GetPhase() != c.phase || st.GetServices() != 2 || st.GetEndpoints() != 5 || st.GetSyncedBy() != "meshd-0" {
			t.Errorf("%s: status %v", c.what, st)
		}
		if lag := st.GetLag().AsDuration(); lag > c.atMost || lag < c.min {
			t.Errorf("%s: lag %v", c.what, lag)
		}
		if len(st.GetGateways()) != 1 || st.GetGateways()[0].GetReady() || st.GetGateways()[0].GetMessage() != "the load balancer has no address yet" {
			t.Errorf("%s: gateways %v", c.what, st.GetGateways())
		}
	}
}

// A meshd that restarts while a cluster is away has heard nothing of it, and still tells
// since when it is away.
func TestTheAgeOfAnOutageOutlivesARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	east := w.join(t, "uid-e", "east", "n1")
	session, err := w.store.Begin(t.Context(), east)
	if err != nil {
		t.Fatal(err)
	}
	away := federation.Condition{Type: federation.Reachable, Reason: "Refused", Since: time.Now().Add(-10 * time.Minute)}
	if _, err := session.SetConditions(t.Context(), []federation.Condition{away}); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, w.store, "the condition", func(*federation.Snapshot) bool {
		return len(w.store.Members()["uid-e"].Conditions) == 1
	})
	away.Since = time.Now()
	w.sources.set(registry.SourceState{Source: east, Holding: true, Status: registry.Status{Conditions: []federation.Condition{away}}})
	got, err := w.client.GetCluster(t.Context(), &api.GetClusterRequest{Name: "east"})
	if err != nil {
		t.Fatal(err)
	}
	if age := got.GetStatus().GetLag().AsDuration(); age < 10*time.Minute || got.GetStatus().GetPhase() != "Degraded" {
		t.Errorf("%s since %v, want Degraded since 10m", got.GetStatus().GetPhase(), age)
	}
}

// A cluster leaves: its endpoints first, then its records, its identities and
// its streams; and it may come back.
func TestAClusterLeaves(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	east := w.join(t, "uid-e", "east", "n1")
	west := w.join(t, "uid-w", "west", "n2")
	w.report(t, east, registry.Level{Records: registrytest.Records(registrytest.Record(east, "shop", "cart", 1))})
	w.report(t, west, registry.Level{Records: registrytest.Records(registrytest.Record(west, "shop", "cart", 1), registrytest.Record(west, "shop", "img", 1))})
	w.proxies.set(
		xdsserver.ProxyStatus{Proxy: xds.Proxy{Workload: federation.WorkloadKey{Source: east, UID: "1"}}, Synced: true},
		xdsserver.ProxyStatus{Proxy: xds.Proxy{Workload: federation.WorkloadKey{Source: west, UID: "2"}}, Synced: true},
	)
	departure, err := w.client.DescribeDeparture(t.Context(), &api.DescribeDepartureRequest{Name: "west"})
	if err != nil || !slices.Equal(departure.GetOnlyHere(), []string{"shop/img"}) || departure.GetCallers() != 1 {
		t.Fatalf("departure %v, %v", departure, err)
	}
	stream, err := w.client.RemoveCluster(t.Context(), &api.RemoveClusterRequest{Name: "west", DrainTimeout: durationpb.New(5 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	var steps []string
	for {
		p, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if p.GetStep() == "drain" && p.GetState() == "running" && !w.store.Members()["uid-w"].Draining {
			t.Error("connections end before the endpoints are withdrawn")
		}
		if p.GetState() != "running" {
			steps = append(steps, p.GetStep()+" "+p.GetState())
		}
	}
	if want := []string{"withdraw done", "drain done", "remove done", "revoke done"}; !slices.Equal(steps, want) {
		t.Errorf("steps %v, want %v", steps, want)
	}
	registrytest.Eventually(t, w.store, "west is gone", func(s *federation.Snapshot) bool { return s.Clusters["uid-w"] == nil })
	if err := w.ca.Revoked(ca.Source(west), "any"); !errors.Is(err, ca.ErrRevoked) {
		t.Errorf("identities of west: %v", err)
	}
	if rest := w.proxies.Proxies(); len(rest) != 1 || rest[0].Proxy.Workload.Source != east {
		t.Errorf("streams %v", rest)
	}
	w.join(t, "uid-w", "west", "n2")
	if err := w.ca.Revoked(ca.Source(west), "any"); err != nil {
		t.Errorf("west is back, but: %v", err)
	}
}

// A proxy that does not confirm holds nothing up for ever, and is counted.
func TestADrainGivesUpWaiting(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	east := w.join(t, "uid-e", "east", "n1")
	w.join(t, "uid-w", "west", "n2")
	w.proxies.set(xdsserver.ProxyStatus{Proxy: xds.Proxy{Workload: federation.WorkloadKey{Source: east, UID: "1"}}})
	stream, err := w.client.RemoveCluster(t.Context(), &api.RemoveClusterRequest{Name: "west", DrainTimeout: durationpb.New(10 * time.Millisecond)})
	if err != nil {
		t.Fatal(err)
	}
	warned := false
	for {
		p, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		warned = warned || p.GetState() == "warning" && strings.Contains(p.GetMessage(), "1 of 1 proxy of other clusters not confirmed")
	}
	if !warned {
		t.Error("nobody was told about the proxy that did not confirm")
	}
}
