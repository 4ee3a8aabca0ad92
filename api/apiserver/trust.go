// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
)

// trustHub is what the connected agents say their workloads trust.
type trustHub struct {
	mu    sync.Mutex
	since map[*trustAgent]time.Time // when each last said something new
	state map[*trustAgent]*api.TrustState

	known    map[federation.WorkloadKey]bool // the workloads there were when this bundle was first seen
	sequence uint64
}

// trustAgent is the open stream of one agent.
type trustAgent struct{ workload federation.WorkloadKey }

func newTrustHub() *trustHub {
	return &trustHub{since: map[*trustAgent]time.Time{}, state: map[*trustAgent]*api.TrustState{}}
}

// say keeps what an agent says, with since when it says so.
func (h *trustHub) say(a *trustAgent, s *api.TrustState, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if last, ok := h.state[a]; !ok || !proto.Equal(last, s) {
		h.since[a] = now
	}
	h.state[a] = s
}

func (h *trustHub) leave(a *trustAgent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.state, a)
	delete(h.since, a)
}

// list is what is known now. A workload may have two streams for a moment.
func (h *trustHub) list() []*api.TrustHolder {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]*api.TrustHolder, 0, len(h.state))
	for a, s := range h.state {
		out = append(out, &api.TrustHolder{Source: string(a.workload.Source), Uid: a.workload.UID, State: s, Since: stamp(h.since[a])})
	}
	return out
}

// waitedFor are the workloads that have to have a bundle.
func (h *trustHub) waitedFor(sequence uint64, snapshot *federation.Snapshot) map[federation.WorkloadKey]bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.known == nil || h.sequence != sequence {
		h.known, h.sequence = make(map[federation.WorkloadKey]bool, len(snapshot.Workloads)), sequence
		for key := range snapshot.Workloads {
			h.known[key] = true
		}
	}
	return h.known
}

// Trust implements api.WorkloadsServer.
func (w *workloads) Trust(stream grpc.BidiStreamingServer[api.TrustState, api.TrustBundle]) error {
	ctx := stream.Context()
	id, err := w.authenticate(ctx)
	if err != nil {
		return err
	}
	agent := &trustAgent{federation.WorkloadKey{Source: federation.SourceID(id.Source), UID: id.Instance}}
	defer w.server.trust.leave(agent)
	messages := receive(ctx, stream.Recv)
	var sent uint64
	for {
		changed := w.server.cfg.Authority.Changed()
		if err := w.refused(id); err != nil {
			return err
		}
		if b := w.server.cfg.Authority.Bundle(); b.Sequence != sent {
			sent = b.Sequence
			if err := stream.Send(&api.TrustBundle{Sequence: b.Sequence, Roots: b.PEM(), Digest: b.Digest()}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case r := <-messages:
			if errors.Is(r.err, io.EOF) {
				return nil
			}
			if r.err != nil {
				return r.err
			}
			w.server.trust.say(agent, trustIn(r.message), w.server.cfg.Clock())
		}
	}
}

// trustIn bounds what an agent can have kept.
func trustIn(s *api.TrustState) *api.TrustState {
	return &api.TrustState{Digest: cut(s.GetDigest()), Problem: cut(s.GetProblem()), Authority: cut(s.GetAuthority())}
}

// ListTrust implements api.AdminServer.
func (s *Server) ListTrust(context.Context, *api.ListTrustRequest) (*api.TrustList, error) {
	return &api.TrustList{ApiVersion: api.Version, Kind: "TrustList", Replica: s.cfg.Replica, Time: stamp(s.cfg.Clock()), Items: s.trust.list()}, nil
}

// Standing tells how far the workloads of all clusters and networks are with the present bundle. Each that was
// known when the bundle was made counts, connected or not; who has come since has it with the first certificate,
// and counts once connected. Otherwise there would always be one that is just starting.
func (s *Server) Standing(ctx context.Context) ca.Standing {
	bundle := s.cfg.Authority.Bundle()
	now := s.cfg.Clock()
	out := ca.Standing{Sequence: bundle.Sequence, Earliest: now, Latest: now}
	held := map[federation.WorkloadKey]*api.TrustHolder{}
	hear := func(list []*api.TrustHolder) {
		for _, h := range list {
			key := federation.WorkloadKey{Source: federation.SourceID(h.GetSource()), UID: h.GetUid()}
			if last := held[key]; last == nil || last.GetSince().AsTime().Before(h.GetSince().AsTime()) {
				held[key] = h
			}
		}
	}
	hear(s.trust.list())
	if s.cfg.Peers != nil {
		lists, missing := s.cfg.Peers.Trust(ctx)
		out.Missing = missing
		for _, l := range lists {
			hear(l.GetItems())
			if at := l.GetTime().AsTime(); at.Before(out.Earliest) {
				out.Earliest = at
			} else if at.After(out.Latest) {
				out.Latest = at
			}
		}
	}
	snapshot, _ := s.cfg.Store.Snapshot()
	known := s.trust.waitedFor(bundle.Sequence, snapshot)
	for key, w := range snapshot.Workloads {
		if held[key] == nil && !known[key] {
			continue
		}
		out.Holders = append(out.Holders, holderOf(snapshot, key, w, held[key], bundle.Digest()))
	}
	slices.SortFunc(out.Holders, func(a, b ca.Holder) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// holderOf is how far one workload is.
func holderOf(snapshot *federation.Snapshot, key federation.WorkloadKey, w *federation.Workload, said *api.TrustHolder, digest string) ca.Holder {
	h := ca.Holder{
		Source: ca.Source(key.Source), Instance: key.UID, Name: snapshot.SourceName(key.Source) + "/" + w.Namespace + "/" + w.Name,
		Since: said.GetSince().AsTime(), SignedBy: said.GetState().GetAuthority(),
	}
	switch state := said.GetState(); {
	case said == nil:
		h.Since, h.Why = time.Time{}, "not connected, or its agent does not tell"
	case state.GetProblem() != "":
		h.Why = state.GetProblem()
	case state.GetDigest() == "":
		h.Why = "its Envoy has acknowledged no bundle yet"
	case state.GetDigest() != digest:
		h.Why = "its Envoy has an older bundle"
	default:
		h.Holds = true
	}
	return h
}
