// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
)

const (
	defaultActivity  = time.Hour
	activityLimit    = 1000
	followEvery      = 500 * time.Millisecond
	maxAuditLineSize = 64 << 10
)

// TailActivity implements api.AdminServer: it reads the audit log of this replica, and
// asks the others for theirs.
func (s *Server) TailActivity(req *api.TailActivityRequest, stream grpc.ServerStreamingServer[api.Activity]) error {
	if s.cfg.AuditPath == "" {
		return api.Problem{Status: codes.Unimplemented, Message: "this meshd keeps its audit log elsewhere"}
	}
	file, err := os.Open(s.cfg.AuditPath)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	defer file.Close()
	limit := activityLimit
	if req.GetLimit() > 0 {
		limit = int(req.GetLimit())
	}
	tail := &auditTail{reader: bufio.NewReaderSize(file, maxAuditLineSize), names: map[ca.Source]string{}}
	recent := s.history(tail, req, limit)
	asksOthers := s.cfg.Peers != nil && !callerOf(stream.Context()).peer()
	begun := s.cfg.Clock()
	if asksOthers {
		history := &api.TailActivityRequest{Since: req.GetSince(), Limit: int32(limit)}
		s.cfg.Peers.TailActivity(stream.Context(), history, func(a *api.Activity) { recent = append(recent, a) })
		slices.SortStableFunc(recent, func(a, b *api.Activity) int { return a.GetTime().AsTime().Compare(b.GetTime().AsTime()) })
		recent = recent[max(0, len(recent)-limit):]
	}
	for _, a := range recent {
		if err := stream.Send(a); err != nil {
			return err
		}
	}
	if !req.GetFollow() || tail.err != nil {
		return tail.err
	}
	theirs := make(chan *api.Activity)
	if asksOthers {
		defer s.followOthers(stream.Context(), recent, begun, theirs)()
	}
	return s.follow(tail, stream, theirs)
}

// history is what this replica's log has, oldest first.
func (s *Server) history(tail *auditTail, req *api.TailActivityRequest, limit int) []*api.Activity {
	since := defaultActivity
	if req.GetSince() != nil {
		since = req.GetSince().AsDuration()
	}
	oldest := s.cfg.Clock().Add(-since)
	var recent []*api.Activity
	for entry := range tail.entries {
		tail.learn(entry)
		if entry.Time.Before(oldest) {
			continue
		}
		if recent = append(recent, s.activityOut(tail, entry)); len(recent) > limit {
			recent = recent[1:]
		}
	}
	return recent
}

// follow sends what is written from now on, here and elsewhere.
func (s *Server) follow(tail *auditTail, stream grpc.ServerStreamingServer[api.Activity], theirs <-chan *api.Activity) error {
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case a := <-theirs:
			if err := stream.Send(a); err != nil {
				return err
			}
			continue
		case <-ticker.C:
		}
		for entry := range tail.entries {
			tail.learn(entry)
			if err := stream.Send(s.activityOut(tail, entry)); err != nil {
				return err
			}
		}
		if tail.err != nil {
			return tail.err
		}
	}
}

// followOthers hands on what the other replicas write from now on, without what was sent
// already. The returned function ends it.
func (s *Server) followOthers(ctx context.Context, sent []*api.Activity, since time.Time, out chan<- *api.Activity) (stop func()) {
	known := map[string]bool{}
	for _, a := range sent {
		known[activityKey(a)] = true
	}
	ctx, cancel := context.WithCancel(ctx)
	var following sync.WaitGroup
	following.Go(func() {
		// Their clocks may be some seconds off.
		req := &api.TailActivityRequest{Follow: true, Since: durationpb.New(s.cfg.Clock().Sub(since) + time.Minute)}
		s.cfg.Peers.TailActivity(ctx, req, func(a *api.Activity) {
			if key := activityKey(a); known[key] {
				delete(known, key)
				return
			}
			if a.GetTime().AsTime().Before(since.Add(-time.Minute)) {
				return
			}
			select {
			case out <- a:
			case <-ctx.Done():
			}
		})
	})
	return func() { cancel(); following.Wait() }
}

func activityKey(a *api.Activity) string {
	return strings.Join([]string{a.GetReplica(), a.GetTime().AsTime().String(), a.GetVerb(), a.GetSource(), a.GetInstance(), a.GetMessage()}, "\x00")
}

// auditTail reads the lines of an audit log that are complete. The chain of
// hashes is not verified here: that is what ca.VerifyAudit is for.
type auditTail struct {
	reader *bufio.Reader
	part   []byte // of a line that is still being written
	err    error
	names  map[ca.Source]string // of clusters, as joins name them
}

// entries yields what has been written since it was last called.
func (t *auditTail) entries(yield func(ca.AuditEntry) bool) {
	for t.err == nil {
		line, err := t.reader.ReadBytes('\n')
		t.part = append(t.part, line...)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.err = fmt.Errorf("audit log: %w", err)
			return
		}
		var entry ca.AuditEntry
		bad := json.Unmarshal(bytes.TrimSpace(t.part), &entry) != nil
		t.part = t.part[:0]
		if !bad && !yield(entry) {
			return
		}
	}
}

// learn remembers the name of a cluster, which may have left since.
func (t *auditTail) learn(e ca.AuditEntry) {
	if name, _, _ := strings.Cut(e.Reason, " "); e.Event == auditAdmin && strings.HasSuffix(e.Method, "-cluster") && e.Source != "" {
		t.names[e.Source] = name
	}
}

// activityOut words an audit line, with the names that people know.
func (s *Server) activityOut(t *auditTail, e ca.AuditEntry) *api.Activity {
	out := &api.Activity{
		Time: stamp(e.Time), Actor: e.SPIFFEID, Verb: e.Event, Result: "ok", Message: e.Reason, Replica: e.Replica,
		Source: string(e.Source), Instance: e.Instance, Object: s.objectOf(t, e),
	}
	switch e.Event {
	case auditAdmin:
		out.Verb, out.Object, out.Message, out.Instance = e.Method, e.Reason, "", "" // the instance is the caller's
	case ca.AuditIssued:
		out.Message = fmt.Sprintf("certificate %s, by %s", e.Serial, e.Method)
	case ca.AuditJWTIssued:
		out.Message = fmt.Sprintf("JWT-SVID %s for %s, by %s", e.Serial, strings.Join(e.Audience, ", "), e.Method)
	case ca.AuditRefused, ca.AuditJWTRefused:
		out.Result = "refused"
	case ca.AuditBegan, ca.AuditAuthority:
		out.Actor = "meshd"
	}
	if e.Event == ca.AuditAuthority {
		scope, why, _ := strings.Cut(e.Reason, ": ")
		out.Object, out.Message = "authority of "+cmp.Or(s.sourceOf(t, ca.Source(scope)), scope), why
	}
	out.Actor = cmp.Or(out.Actor, "unknown")
	return out
}

// objectOf is for example "pod shop/cart-7d9f in east", "machine web-1 on n1", "cluster
// east".
func (s *Server) objectOf(t *auditTail, e ca.AuditEntry) string {
	where := s.sourceOf(t, e.Source)
	network, machines := e.Source.Network()
	switch {
	case e.Source == "":
		return ""
	case e.Instance == "":
		return where
	case e.Source == ca.SourceMeshd:
		return "meshd " + e.Instance
	case machines:
		return "machine " + e.Instance + " on " + network
	}
	snapshot, _ := s.cfg.Store.Snapshot()
	key := federation.WorkloadKey{Source: federation.SourceID(e.Source), UID: e.Instance}
	if w := snapshot.Workloads[key]; w != nil {
		return "pod " + w.Namespace + "/" + w.Name + " in " + strings.TrimPrefix(where, "cluster ")
	}
	return "a former pod in " + strings.TrimPrefix(where, "cluster ")
}

// sourceOf names a source: "cluster east", "machines on n1".
func (s *Server) sourceOf(t *auditTail, source ca.Source) string {
	if network, ok := source.Network(); ok {
		return "machines on " + network
	}
	if !strings.HasPrefix(string(source), "kube:") {
		return string(source)
	}
	snapshot, _ := s.cfg.Store.Snapshot()
	if name := snapshot.SourceName(federation.SourceID(source)); name != string(source) {
		return "cluster " + name
	}
	if name := t.names[source]; name != "" {
		return "cluster " + name + " (left)"
	}
	return "cluster " + strings.TrimPrefix(string(source), "kube:") + " (left)"
}
