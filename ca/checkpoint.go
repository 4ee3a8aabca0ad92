// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"strings"
	"sync"
	"time"
)

// AuditMark is the head of an audit log at one moment.
type AuditMark struct {
	Time time.Time `json:"time"`
	AuditHead
}

// AuditMarks are the marks of one log, oldest first.
type AuditMarks struct {
	Replica string      `json:"-"`
	Log     string      `json:"log"` // see AuditLog.ID
	Marks   []AuditMark `json:"marks"`
}

// Limits of what is kept of one replica.
const (
	markEvery  = time.Minute
	markWithin = 5 * time.Second // a stop waits no longer for the last one
	keptLogs   = 8               // a replica whose disk was lost begins a new one
)

// ErrAuditChanged: the audit log is not the one whose head was kept.
var ErrAuditChanged = errors.New("audit log was changed behind meshd's back")

// Checkpoints keeps the head of a replica's audit log where the other replicas keep theirs, so that whoever can
// write to the log's disk cannot shorten or rewrite it unnoticed. There is one key for each replica, sealed:
// whoever can write to the state and has no sealing key cannot keep the wrong heads.
type Checkpoints struct {
	// State takes one key for each replica. It should not be that of the authorities, which would be woken.
	State State
	// Sealer seals the heads.
	Sealer Sealer
	// Replica names this one, and Audit is its log.
	Replica string
	Audit   *AuditLog
	// Clock tells the time; time.Now if nil.
	Clock func() time.Time
	// Log takes failures; slog.Default() if nil.
	Log *slog.Logger

	mu     sync.Mutex
	broken error
}

type storedMarks struct {
	Logs []AuditMarks `json:"logs"` // the present one last
}

// Run keeps the head every minute if it moved, and once more when ctx ends. If the log turns out not to be the one whose head
// was kept before, it keeps nothing any more: what is kept is the evidence.
func (c *Checkpoints) Run(ctx context.Context) error {
	log := c.Log
	if log == nil {
		log = slog.Default()
	}
	ticker := time.NewTicker(markEvery)
	defer ticker.Stop()
	failing := false
	for {
		err := c.Mark(context.WithoutCancel(ctx))
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrAuditChanged):
			log.Error("the audit log was changed: move it away and look at it with mesh activity verify", "error", err)
			<-ctx.Done()
			return nil
		case err != nil && !failing:
			log.Warn("the head of the audit log is not kept elsewhere", "error", err)
		}
		failing = err != nil
		select {
		case <-ctx.Done(): // once more, then
		case <-ticker.C:
		}
	}
}

// Err is why heads are not kept any more: ErrAuditChanged, or nil.
func (c *Checkpoints) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// Mark keeps the present head, unless it has been kept. It is ErrAuditChanged if the log does not contain the
// head that was kept last.
func (c *Checkpoints) Mark(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, markWithin)
	defer cancel()
	head := c.Audit.Head() // before the state is read: what is kept by then is at most that
	stored, version, err := c.fetch(ctx, c.Replica)
	if err != nil {
		return err
	}
	own := stored.of(c.Audit.ID())
	if n := len(own.Marks); n > 0 {
		last := own.Marks[n-1]
		if err := c.contains(last, head); err != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.broken = err
			return err
		}
		if last.AuditHead == head {
			return nil
		}
	}
	own.Marks = thin(append(own.Marks, AuditMark{Time: c.now().UTC(), AuditHead: head}))
	value, err := encodeSealed(c.Replica, stored, c.Sealer)
	if err != nil {
		return err
	}
	if version == 0 {
		_, err = c.State.Create(ctx, c.Replica, value)
	} else {
		_, err = c.State.Replace(ctx, c.Replica, value, version)
	}
	return err
}

// contains tells whether the log has the line that was kept.
func (c *Checkpoints) contains(mark AuditMark, head AuditHead) error {
	if head.Size < mark.Size {
		return fmt.Errorf("%w: it has %d bytes, and had %d at %s", ErrAuditChanged, head.Size, mark.Size, mark.Time.UTC().Format(time.RFC3339))
	}
	at, err := c.Audit.lineEndingAt(mark.Size)
	if err != nil || at != mark.AuditHead {
		return fmt.Errorf("%w: line %d is not the one that was kept at %s", ErrAuditChanged, mark.Sequence, mark.Time.UTC().Format(time.RFC3339))
	}
	return nil
}

// fetch reads what is kept of a replica; nothing is version 0.
func (c *Checkpoints) fetch(ctx context.Context, replica string) (*storedMarks, Version, error) {
	out := new(storedMarks)
	e, err := c.State.Fetch(ctx, replica)
	if errors.Is(err, ErrNotFound) {
		return out, 0, nil
	}
	if err == nil {
		err = decodeSealed(replica, e.Value, c.Sealer, out)
	}
	return out, e.Version, err
}

// List is what is kept of every replica's logs. A value that does not open is an error that names its key.
func (c *Checkpoints) List(ctx context.Context) ([]AuditMarks, error) {
	entries, err := c.State.List(ctx, "")
	if err != nil {
		return nil, err
	}
	var out []AuditMarks
	var errs []error
	for _, e := range entries {
		var stored storedMarks
		if err := decodeSealed(e.Key, e.Value, c.Sealer, &stored); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, log := range stored.Logs {
			log.Replica = strings.Clone(e.Key)
			out = append(out, log)
		}
	}
	return out, errors.Join(errs...)
}

func (c *Checkpoints) now() time.Time {
	if c.Clock != nil {
		return c.Clock()
	}
	return time.Now()
}

// of is the entry of a log, made if there is none. Of logs before it the last mark stays.
func (s *storedMarks) of(id string) *AuditMarks {
	if n := len(s.Logs); n > 0 && s.Logs[n-1].Log == id {
		return &s.Logs[n-1]
	}
	for i := range s.Logs {
		if n := len(s.Logs[i].Marks); n > 1 {
			s.Logs[i].Marks = s.Logs[i].Marks[n-1:]
		}
	}
	s.Logs = append(s.Logs, AuditMarks{Log: id})
	if len(s.Logs) > keptLogs {
		s.Logs = s.Logs[len(s.Logs)-keptLogs:]
	}
	return &s.Logs[len(s.Logs)-1]
}

// thin keeps the newest mark, and of the others the oldest that is one, two to three, four to seven, … minutes
// older: about twenty for a year.
func thin(marks []AuditMark) []AuditMark {
	var out []AuditMark
	newest := marks[len(marks)-1]
	seen := -1
	for _, m := range marks[:len(marks)-1] {
		age := bits.Len64(uint64(max(newest.Time.Sub(m.Time)/markEvery, 0)))
		if age != seen {
			out, seen = append(out, m), age
		}
	}
	return append(out, newest)
}
