// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
)

// AuditLog is this replica's audit log; *ca.AuditLog is one.
type AuditLog interface {
	ID() string
	Verify(marks []ca.AuditMark) (ca.AuditHead, error)
	Err() error
}

// Checkpoints keeps the heads of all replicas' audit logs; *ca.Checkpoints does.
type Checkpoints interface {
	List(ctx context.Context) ([]ca.AuditMarks, error)
	Err() error
}

// The states of an audit log.
const (
	logWhole  = "whole"
	logBroken = "broken"
	logUnseen = "unseen"
)

// verifyTimeout bounds how long the other replicas are waited for: they read
// their whole logs.
const verifyTimeout = 25 * time.Second

// GetAuthority implements api.AdminServer.
func (s *Server) GetAuthority(ctx context.Context, _ *api.GetAuthorityRequest) (*api.AuthorityReport, error) {
	bundle := s.cfg.Authority.Bundle()
	out := &api.AuthorityReport{
		ApiVersion: api.Version, Kind: "AuthorityReport", TrustDomain: bundle.TrustDomain.Name(), BundleSequence: bundle.Sequence,
		Roots: bundle.Fingerprints(), Confirmed: stamp(s.cfg.Authority.Confirmed()),
	}
	for _, i := range s.cfg.Authority.Issuers() {
		out.Issuers = append(out.Issuers, &api.Issuer{
			Name: s.scopeName(i.Scope), Scope: i.Scope, Id: i.ID, Phase: string(i.Phase), Epoch: i.Epoch,
			Since: stamp(i.Since), NotBefore: stamp(i.NotBefore), NotAfter: stamp(i.NotAfter),
		})
	}
	rank := func(i *api.Issuer) string {
		if i.GetScope() == ca.ScopeRoot {
			return ""
		}
		return i.GetName()
	}
	slices.SortFunc(out.Issuers, func(a, b *api.Issuer) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(b.GetEpoch(), a.GetEpoch()))
	})
	out.Rotations = s.rotations(ctx)
	return out, nil
}

// scopeName is what people call the scope of an issuer.
func (s *Server) scopeName(scope string) string {
	if network, ok := strings.CutPrefix(scope, "vm:"); ok {
		return "network/" + network
	}
	if id, ok := strings.CutPrefix(scope, "kube:"); ok {
		if m := s.cfg.Store.Members()[federation.ClusterID(id)]; m != nil {
			return m.Name
		}
	}
	return scope
}

// VerifyActivity implements api.AdminServer. Every replica reads its own log; the
// heads that were kept tell about logs that no replica has.
func (s *Server) VerifyActivity(ctx context.Context, _ *api.VerifyActivityRequest) (*api.ActivityReport, error) {
	out := &api.ActivityReport{ApiVersion: api.Version, Kind: "ActivityReport"}
	var kept []ca.AuditMarks
	if s.cfg.Checkpoints != nil {
		var err error
		if kept, err = s.cfg.Checkpoints.List(ctx); err != nil {
			out.Logs = append(out.Logs, &api.AuditLog{State: logBroken, Message: "kept heads: " + err.Error()})
		}
	}
	if s.cfg.AuditLog != nil {
		out.Logs = append(out.Logs, s.verifyOwn(kept))
	}
	if callerOf(ctx).peer() {
		return out, nil
	}
	if s.cfg.Peers != nil {
		out.Logs = append(out.Logs, s.cfg.Peers.Activity(ctx)...)
	}
	for _, k := range kept {
		if slices.ContainsFunc(out.Logs, func(l *api.AuditLog) bool { return l.GetReplica() == k.Replica && l.GetId() == k.Log }) {
			continue
		}
		out.Logs = append(out.Logs, &api.AuditLog{
			Replica: k.Replica, Id: k.Log, State: logUnseen, Marks: marksOut(k.Marks),
			Message: "no replica that answers has this log; verify a copy of it: mesh activity verify FILE",
		})
	}
	slices.SortStableFunc(out.Logs, func(a, b *api.AuditLog) int { return cmp.Compare(a.GetReplica(), b.GetReplica()) })
	return out, nil
}

// verifyOwn reads this replica's log.
func (s *Server) verifyOwn(kept []ca.AuditMarks) *api.AuditLog {
	out := &api.AuditLog{Replica: s.cfg.Replica, Id: s.cfg.AuditLog.ID(), State: logWhole}
	var marks []ca.AuditMark
	for _, k := range kept {
		if k.Replica == out.Replica && k.Log == out.Id {
			marks = k.Marks
		}
	}
	head, err := s.cfg.AuditLog.Verify(marks)
	out.Lines, out.Head, out.Marks = head.Sequence, head.Hash, marksOut(marks)
	if err == nil && s.cfg.Checkpoints != nil {
		err = s.cfg.Checkpoints.Err()
	}
	if err != nil {
		out.State, out.Message = logBroken, err.Error()
	}
	return out
}

func marksOut(marks []ca.AuditMark) []*api.AuditMark {
	var out []*api.AuditMark
	for _, m := range marks {
		out = append(out, &api.AuditMark{Time: stamp(m.Time), Line: m.Sequence, Hash: m.Hash, Size: m.Size})
	}
	return out
}

// checkAudit finds what keeps the audit log from being one.
func (c *checking) checkAudit() []*api.Finding {
	var out []*api.Finding
	subject := "meshd/" + c.cfg.Replica
	if c.cfg.AuditLog != nil && c.cfg.AuditLog.Err() != nil {
		out = append(out, &api.Finding{Code: string(api.AuditNotWritable), Severity: severityError, Subject: subject, Message: c.cfg.AuditLog.Err().Error()})
	}
	if c.cfg.Checkpoints != nil && c.cfg.Checkpoints.Err() != nil {
		out = append(out, &api.Finding{Code: string(api.AuditChanged), Severity: severityError, Subject: subject, Message: c.cfg.Checkpoints.Err().Error()})
	}
	if c.cfg.AuditLog != nil && len(out) == 0 {
		out = append(out, good("audit log of %s", c.cfg.Replica))
	}
	return out
}
