// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
)

// RotateAuthority implements api.AdminServer.
func (s *Server) RotateAuthority(ctx context.Context, req *api.RotateAuthorityRequest) (*api.RotateAuthorityResponse, error) {
	standing := s.Standing(ctx)
	scope, err := s.scopeOf(req, standing)
	if err != nil {
		return nil, err
	}
	if req.GetAction() != "plan" {
		what := s.scopeName(scope) + ": " + req.GetAction()
		if err := s.record(ctx, "rotate-authority", what, ca.Source(scope)); err != nil {
			return nil, err
		}
	}
	if err := s.rotate(ctx, scope, req, standing); err != nil {
		return nil, rotationProblem(err)
	}
	report, err := s.GetAuthority(ctx, nil)
	return &api.RotateAuthorityResponse{Report: report, DrainSeconds: int64(s.cfg.Authority.DrainTime(scope) / time.Second)}, err
}

func (s *Server) rotate(ctx context.Context, scope string, req *api.RotateAuthorityRequest, standing ca.Standing) error {
	a, by := s.cfg.Authority, callerOf(ctx).id.Instance
	switch req.GetAction() {
	case "plan":
		return nil
	case "start":
		return a.Rotate(ctx, scope, by)
	case "pause":
		return a.PauseRotation(ctx, scope, by)
	case "resume":
		return a.ResumeRotation(ctx, scope, by)
	case "rollback":
		return a.RollBack(ctx, scope, by, standing)
	case "proceed":
		return a.Proceed(ctx, scope, by, req.GetStragglers(), standing)
	}
	return api.Problem{
		Status:  codes.InvalidArgument,
		Message: fmt.Sprintf("action %q: want plan, start, pause, resume, rollback or proceed", req.GetAction()),
	}
}

// rotationProblem words what an authority refuses.
func rotationProblem(err error) error {
	p := api.Problem{Status: codes.FailedPrecondition, Message: err.Error()}
	switch {
	case errors.Is(err, ca.ErrOthersWait), errors.Is(err, ca.ErrNoRotation), errors.Is(err, ca.ErrRotating):
		p.Try = "mesh ca status"
	case errors.Is(err, ca.ErrUnavailable):
		p.Status = codes.Unavailable
	case !errors.Is(err, ca.ErrNotRotatable):
		return err
	}
	return p
}

// scopeOf finds the authority that a request is about.
func (s *Server) scopeOf(req *api.RotateAuthorityRequest, standing ca.Standing) (string, error) {
	name := req.GetName()
	if name == "" {
		going := s.cfg.Authority.Rotations(standing)
		if len(going) == 1 {
			return going[0].Scope, nil
		}
		var names []string
		for _, r := range going {
			names = append(names, s.scopeName(r.Scope))
		}
		why := "no rotation is going on"
		if len(names) > 0 {
			why = "several rotations are going on, name one: " + strings.Join(names, ", ")
		}
		return "", api.Problem{Status: codes.FailedPrecondition, Message: why, Try: "mesh ca status"}
	}
	var names []string
	for _, i := range s.cfg.Authority.Issuers() {
		known := s.scopeName(i.Scope)
		if known == name {
			return i.Scope, nil
		}
		names = append(names, known)
	}
	return "", unknown("authority", name, names, "mesh ca status")
}

// stepOf is the step that is being taken, as people know it.
func stepOf(r ca.Rotation) string {
	switch {
	case r.ToPhase == ca.PhaseGenerated:
		return "prepare"
	case r.ToPhase == ca.PhasePublished:
		return "distribute"
	case r.ToPhase == ca.PhaseDistributed:
		return "sign-new"
	case r.FromPhase == ca.PhaseRetiring:
		return "drain-old"
	}
	return "remove"
}

// waitingFor says what keeps a rotation from its next step.
func waitingFor(w ca.Wait) string {
	switch {
	case w.Paused:
		return "a person: it is paused"
	case w.Unknown != "":
		return w.Unknown
	case !w.Until.IsZero():
		return "the end of the last certificate that the old authority may have signed"
	case len(w.Stragglers) == 1:
		return "1 workload to acknowledge the roots"
	case len(w.Stragglers) > 0:
		return fmt.Sprintf("%d workloads to acknowledge the roots", len(w.Stragglers))
	}
	return ""
}

// rotations describes those that go on.
func (s *Server) rotations(ctx context.Context) []*api.Rotation {
	if len(s.cfg.Authority.Rotations(ca.Standing{})) == 0 {
		return nil
	}
	standing := s.Standing(ctx)
	below := map[string]string{}
	for _, i := range s.cfg.Authority.Issuers() {
		below[i.ID] = i.Under
	}
	var out []*api.Rotation
	for _, r := range s.cfg.Authority.Rotations(standing) {
		one := &api.Rotation{
			Name: s.scopeName(r.Scope), Scope: r.Scope, Phase: stepOf(r), From: r.From, To: r.To,
			FromPhase: string(r.FromPhase), ToPhase: string(r.ToPhase), Started: stamp(r.Started), Paused: r.Paused, Back: r.Back,
			Drains: stamp(r.Drains), Waiting: waitingFor(r.Wait), Left: r.Left,
		}
		for _, d := range r.Decisions {
			one.Decisions = append(one.Decisions, &api.RotationDecision{Time: stamp(d.At), Actor: d.By, What: d.What})
		}
		one.Progress = s.progress(r, standing, below)
		out = append(out, one)
	}
	return out
}

// progress is how far the workloads are, by source.
func (s *Server) progress(r ca.Rotation, standing ca.Standing, below map[string]string) []*api.RotationProgress {
	found := map[ca.Source]*api.RotationProgress{}
	for _, h := range standing.Holders {
		if r.Scope != ca.ScopeRoot && string(h.Source) != r.Scope {
			continue
		}
		p := found[h.Source]
		if p == nil {
			p = &api.RotationProgress{Name: s.scopeName(string(h.Source))}
			found[h.Source] = p
		}
		p.Proxies++
		if h.SignedBy == r.To || below[h.SignedBy] == r.To {
			p.Signed++
		}
		// An intermediate is not in the bundle: who trusts its root trusts it.
		if h.Holds || r.Scope != ca.ScopeRoot {
			p.Trusting++
		} else {
			p.Stragglers = append(p.Stragglers, &api.Straggler{Name: h.Name, Reason: h.Why, Since: stamp(h.Since)})
		}
	}
	var out []*api.RotationProgress
	for _, p := range found {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *api.RotationProgress) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return out
}
