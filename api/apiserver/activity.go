// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
)

const (
	defaultActivity  = time.Hour
	activityLimit    = 1000
	followEvery      = 500 * time.Millisecond
	maxAuditLineSize = 64 << 10
)

// TailActivity implements api.AdminServer: it reads the audit log of this
// replica.
func (s *Server) TailActivity(req *api.TailActivityRequest, stream grpc.ServerStreamingServer[api.Activity]) error {
	if s.cfg.AuditPath == "" {
		return api.Problem{Status: codes.Unimplemented, Message: "this meshd keeps its audit log elsewhere"}
	}
	since := defaultActivity
	if req.GetSince() != nil {
		since = req.GetSince().AsDuration()
	}
	limit := activityLimit
	if req.GetLimit() > 0 {
		limit = int(req.GetLimit())
	}
	file, err := os.Open(s.cfg.AuditPath)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	defer file.Close()
	reader := bufio.NewReaderSize(file, maxAuditLineSize)
	tail := &auditTail{reader: reader}
	var recent []*api.Activity
	oldest := s.cfg.Clock().Add(-since)
	for entry := range tail.entries {
		if entry.Time.Before(oldest) {
			continue
		}
		if recent = append(recent, activityOut(entry)); len(recent) > limit {
			recent = recent[1:]
		}
	}
	for _, a := range recent {
		if err := stream.Send(a); err != nil {
			return err
		}
	}
	for req.GetFollow() {
		if err := wait(stream.Context(), followEvery); err != nil {
			return err
		}
		for entry := range tail.entries {
			if err := stream.Send(activityOut(entry)); err != nil {
				return err
			}
		}
		if tail.err != nil {
			return tail.err
		}
	}
	return tail.err
}

// auditTail reads the lines of an audit log that are complete. The chain of
// hashes is not verified here: that is what ca.VerifyAudit is for.
type auditTail struct {
	reader *bufio.Reader
	part   []byte // of a line that is still being written
	err    error
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

// activityOut words an audit line.
func activityOut(e ca.AuditEntry) *api.Activity {
	out := &api.Activity{
		Time: stamp(e.Time), Actor: e.SPIFFEID, Verb: e.Event, Result: "ok", Message: e.Reason, Replica: e.Replica,
		Object: string(e.Source),
	}
	if e.Instance != "" {
		out.Object += "/" + e.Instance
	}
	switch e.Event {
	case auditAdmin:
		out.Verb, out.Object, out.Message = e.Method, e.Reason, ""
	case ca.AuditIssued:
		out.Message = fmt.Sprintf("serial %s by %s", e.Serial, e.Method)
	case ca.AuditRefused:
		out.Result = "refused"
	case ca.AuditBegan, ca.AuditAuthority:
		out.Actor = "meshd"
	}
	out.Actor = cmp.Or(out.Actor, "unknown")
	return out
}
