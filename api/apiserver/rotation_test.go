// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// trusting is an agent that acknowledges every bundle.
func trusting(t *testing.T, w *world, source federation.SourceID, pod string) {
	t.Helper()
	stream, err := api.NewWorkloadsClient(w.dial(t, w.mesh, w.ca.Leaf(t, catest.Subject(ca.Source(source), pod, "shop")))).Trust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			b, err := stream.Recv()
			if err != nil || stream.Send(&api.TrustState{Digest: b.GetDigest()}) != nil {
				return
			}
		}
	}()
}

// until asks for the authority until it is as wanted.
func (w *world) until(t *testing.T, what string, ok func(*api.AuthorityReport) bool) *api.AuthorityReport {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		report, err := w.client.GetAuthority(t.Context(), &api.GetAuthorityRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if ok(report) {
			return report
		}
		if time.Now().After(end) {
			t.Fatalf("not %s: %v", what, report)
		}
		time.Sleep(time.Millisecond)
	}
}

// stands is one rotation in words.
func stands(report *api.AuthorityReport) string {
	var out []string
	for _, r := range report.GetRotations() {
		one := fmt.Sprintf("%s %s", r.GetName(), r.GetPhase())
		for _, p := range r.GetProgress() {
			one += fmt.Sprintf("; %s %d of %d", p.GetName(), p.GetTrusting(), p.GetProxies())
			for _, s := range p.GetStragglers() {
				one += ", not " + s.GetName() + " (" + s.GetReason() + ")"
			}
		}
		out = append(out, one)
	}
	return strings.Join(out, "\n")
}

// A root is given to all agents, and waits for those that do not say that they use it; a person goes on without.
func TestARootWaitsForEveryAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	east := w.join(t, "uid-e", "east", "n1")
	pod := func(name string) *federation.Workload {
		return &federation.Workload{Source: east, Namespace: "shop", Name: name, UID: name, Role: federation.Sidecar, ServiceAccount: "default", Network: "n1"}
	}
	w.report(t, east, registry.Level{Workloads: map[string]*federation.Workload{"web": pod("web"), "late": pod("late")}})
	registrytest.Eventually(t, w.store, "the pods", func(s *federation.Snapshot) bool { return len(s.Workloads) == 2 })
	trusting(t, w, east, "web")
	rotator := &ca.Rotator{Authority: w.ca.Authority, Standing: w.Standing, Replica: "meshd-0", Every: 5 * time.Millisecond, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { rotator.Run(ctx); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })

	rotate := func(action string, stragglers ...string) error {
		t.Helper()
		_, err := w.client.RotateAuthority(ctx, &api.RotateAuthorityRequest{Name: "root", Action: action, Stragglers: stragglers})
		return err
	}
	plan, err := w.client.RotateAuthority(ctx, &api.RotateAuthorityRequest{Name: "root", Action: "plan"})
	if err != nil || time.Duration(plan.GetDrainSeconds())*time.Second != ca.DefaultLifetime+ca.DefaultOfflineBudget+ca.DefaultClockSkew || len(plan.GetReport().GetRotations()) != 0 {
		t.Fatalf("plan %v, %v", plan, err)
	}
	for action, want := range map[string]codes.Code{"pause": codes.FailedPrecondition, "turn": codes.InvalidArgument} {
		if err := rotate(action); status.Code(err) != want {
			t.Errorf("%s before there is one: %v, want %v", action, err, want)
		}
	}
	if _, err := w.client.RotateAuthority(ctx, &api.RotateAuthorityRequest{Name: "eats", Action: "start"}); status.Code(err) != codes.NotFound {
		t.Errorf("a cluster that is not there: %v", err)
	}
	if err := rotate("start"); err != nil {
		t.Fatal(err)
	}
	const waiting = "root distribute; east 1 of 2, not east/shop/late (not connected, or its agent does not tell)"
	report := w.until(t, "waiting", func(r *api.AuthorityReport) bool { return stands(r) == waiting })
	if got := report.GetRotations()[0].GetWaiting(); got != "1 workload to acknowledge the roots" || len(report.GetRoots()) != 2 {
		t.Errorf("waits for %q with %d roots", got, len(report.GetRoots()))
	}
	if err := rotate("proceed", "east/shop/web"); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "east/shop/late") {
		t.Errorf("proceed without naming who waits: %v", err)
	}
	if err := rotate("proceed", "east/shop/late"); err != nil {
		t.Fatal(err)
	}
	report = w.until(t, "draining", func(r *api.AuthorityReport) bool { return strings.HasPrefix(stands(r), "root drain-old") })
	if r := report.GetRotations()[0]; !slices.Equal(r.GetLeft(), []string{"east/shop/late"}) || r.GetDrains() == nil || r.GetDecisions()[0].GetActor() == "" {
		t.Errorf("%v", r)
	}
	// Who has come since has it with the first certificate.
	w.report(t, east, registry.Level{Workloads: map[string]*federation.Workload{"web": pod("web"), "late": pod("late"), "new": pod("new")}})
	registrytest.Eventually(t, w.store, "the new pod", func(s *federation.Snapshot) bool { return len(s.Workloads) == 3 })
	trusting(t, w, east, "late")
	w.until(t, "trusted by all", func(r *api.AuthorityReport) bool { return stands(r) == "root drain-old; east 2 of 2" })
	// Nothing is named where only one goes on.
	if _, err := w.client.RotateAuthority(ctx, &api.RotateAuthorityRequest{Action: "rollback"}); err != nil {
		t.Fatal(err)
	}
	if r := w.until(t, "rolled back", func(r *api.AuthorityReport) bool { return r.GetRotations()[0].GetBack() }); r.GetIssuers()[0].GetId() != plan.GetReport().GetIssuers()[0].GetId() {
		t.Errorf("another root than the first signs: %v", r.GetIssuers())
	}
	w.sawInActivity(t, "rotate-authority", "root: start")
}

// sawInActivity finds a change in the audit log.
func (w *world) sawInActivity(t *testing.T, method, reason string) {
	t.Helper()
	for _, e := range w.ca.AuditEntries(t) {
		if e.Method == method && e.Reason == reason && e.SPIFFEID != "" {
			return
		}
	}
	t.Errorf("the audit log has no %s of %s", method, reason)
}
