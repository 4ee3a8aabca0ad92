// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/api/apiserver"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// auditOption gives a replica a log of its own whose head is kept in a state that it shares.
func auditOption(t *testing.T, state ca.State, seal ca.Sealer, replica, path string) (func(*apiserver.Config), *ca.Checkpoints) {
	t.Helper()
	log, err := ca.OpenAudit(path, replica, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	heads := &ca.Checkpoints{State: state, Sealer: seal, Replica: replica, Audit: log}
	return func(c *apiserver.Config) {
		c.Audit, c.AuditPath, c.AuditLog, c.Checkpoints, c.Replica = log, path, log, heads, replica
	}, heads
}

func states(report *api.ActivityReport) string {
	var out []string
	for _, l := range report.GetLogs() {
		out = append(out, l.GetReplica()+" "+l.GetState())
	}
	return strings.Join(out, ", ")
}

// Any replica tells about the logs of all, of those that are away, and of one that somebody changed.
func TestAuditLogsOfAllReplicasAreVerified(t *testing.T) {
	t.Parallel()
	state, seal, path := new(ca.Memory), auditSealer(t), filepath.Join(t.TempDir(), "audit.jsonl")
	first, firstHeads := auditOption(t, state, seal, "meshd-0", path)
	one := newWorld(t, first)
	serving := one.ca.Serving(t, "127.0.0.1")
	peers := apiserver.NewPeerGroup(apiserver.PeerConfig{
		Addresses: func() []string { return []string{one.address} },
		Authority: one.ca.Authority, Certificate: func() *tls.Certificate { return &serving }, Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() { peers.Close() })
	second, secondHeads := auditOption(t, state, seal, "meshd-1", filepath.Join(t.TempDir(), "audit.jsonl"))
	two := newWorld(t, second, func(c *apiserver.Config) { c.Store, c.Authority, c.Peers = one.store, one.ca.Authority, peers })
	two.client = api.NewAdminClient(two.dial(t, two.address, one.ca.Admin(t)))
	_, thirdHeads := auditOption(t, state, seal, "meshd-2", filepath.Join(t.TempDir(), "audit.jsonl")) // a replica that is away
	for _, heads := range []*ca.Checkpoints{firstHeads, secondHeads, thirdHeads} {
		if err := heads.Mark(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	one.join(t, "uid-e", "east", "n1")

	report, err := two.client.VerifyActivity(t.Context(), &api.VerifyActivityRequest{})
	if err != nil || states(report) != "meshd-0 whole, meshd-1 whole, meshd-2 unseen" {
		t.Fatalf("VerifyActivity = %s, %v", states(report), err)
	}
	if l := report.GetLogs()[0]; l.GetLines() < 2 || l.GetId() != firstHeads.Audit.ID() || len(l.GetMarks()) != 1 || l.GetHead() != firstHeads.Audit.Head().Hash {
		t.Errorf("log of meshd-0: %v", l)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), "register-cluster", "nothing-happened", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	report, err = two.client.VerifyActivity(t.Context(), &api.VerifyActivityRequest{})
	if err != nil || states(report) != "meshd-0 broken, meshd-1 whole, meshd-2 unseen" || !strings.Contains(report.GetLogs()[0].GetMessage(), "audit line 2") {
		t.Errorf("after an edit: %s, %v", states(report), err)
	}
}

// brokenLog is an audit log that cannot be written.
type brokenLog struct{ *ca.AuditLog }

func (brokenLog) Err() error { return errors.New("no space left on device") }

func TestCheckFindsAnAuditLogThatIsNone(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *apiserver.Config) { c.AuditLog = brokenLog{c.Audit.(*ca.AuditLog)} })
	report, err := w.client.Check(t.Context(), &api.CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, group := range report.GetGroups() {
		for _, f := range group.GetFindings() {
			if f.GetCode() == string(api.AuditNotWritable) && f.GetSeverity() == "error" && strings.Contains(f.GetMessage(), "no space left") {
				return
			}
		}
	}
	t.Errorf("not found in %v", report)
}

func TestAuthorityIsDescribed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(t, "uid-e", "east", "n1")
	w.ca.Leaf(t, catest.Subject("kube:uid-e", "p", "shop"))
	w.ca.Leaf(t, catest.Subject("vm:n7", "web-1", "shop"))
	report, err := w.client.GetAuthority(t.Context(), &api.GetAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range report.GetIssuers() {
		names = append(names, i.GetName()+" "+i.GetPhase())
	}
	if got := strings.Join(names, ", "); got != "root active, east active, meshd active, network/n7 active" {
		t.Errorf("issuers %s", got)
	}
	if len(report.GetRoots()) != 1 || report.GetBundleSequence() == 0 || report.GetTrustDomain() != "cluster.local" || report.GetConfirmed() == nil {
		t.Errorf("report %v", report)
	}
}

func auditSealer(t *testing.T) ca.Sealer {
	t.Helper()
	s, err := ca.NewFileSealer(filepath.Join(t.TempDir(), "sealing.key"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}
