// SPDX-License-Identifier: Apache-2.0

package sds

import (
	"context"
	"fmt"
	"sync"

	statuspb "google.golang.org/genproto/googleapis/rpc/status"
)

// holders are the open streams, and which roots each has acknowledged.
type holders struct {
	mu      sync.Mutex
	streams map[*holder]bool
	changed chan struct{}
}

// holder is one stream.
type holder struct {
	wants   bool   // it has asked for the roots
	nonce   string // of the answer that has them and was not acknowledged yet
	flying  string // their version
	has     string // version that was acknowledged
	refused string // version that was refused, and why
	why     string
}

func (s *Server) join() *holder {
	h := &holder{}
	s.change(func() {
		if s.holders.streams == nil {
			s.holders.streams = map[*holder]bool{}
		}
		s.holders.streams[h] = true
	})
	return h
}

func (s *Server) leave(h *holder) { s.change(func() { delete(s.holders.streams, h) }) }

// sent notes that an answer has the roots.
func (s *Server) sent(h *holder, nonce, version string) {
	s.change(func() { h.nonce, h.flying = nonce, version })
}

// heard notes what Envoy says to an answer.
func (s *Server) heard(h *holder, nonce string, refusal *statuspb.Status) {
	s.change(func() {
		switch {
		case nonce == "" || nonce != h.nonce:
			return
		case refusal != nil:
			h.refused, h.why = h.flying, refusal.GetMessage()
		default:
			h.has = h.flying
		}
		h.nonce = ""
	})
}

// wants notes whether the stream asks for the roots, and the version that it came with.
func (s *Server) wants(h *holder, wants bool, has string) {
	s.change(func() {
		if wants && !h.wants && h.nonce == "" {
			h.has = has
		}
		h.wants = wants
	})
}

func (s *Server) change(f func()) {
	s.holders.mu.Lock()
	defer s.holders.mu.Unlock()
	f()
	if s.holders.changed != nil {
		close(s.holders.changed)
		s.holders.changed = nil
	}
}

// Acknowledged waits until every stream that asks for the roots has acknowledged
// the present ones: Envoy verifies new connections with them from then on. It
// returns an error if one refuses them. Without any stream nobody verifies yet.
func (s *Server) Acknowledged(ctx context.Context) error {
	for {
		renewed := s.Source.Changed()
		found, err := s.secrets()
		if err != nil {
			return err
		}
		missing, changed, err := s.lacking(found[RootsName].version)
		if !missing || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-renewed:
		}
	}
}

// lacking tells whether a stream has not acknowledged a version, and gives a channel
// that is closed when that may have changed.
func (s *Server) lacking(version string) (bool, <-chan struct{}, error) {
	s.holders.mu.Lock()
	defer s.holders.mu.Unlock()
	if s.holders.changed == nil {
		s.holders.changed = make(chan struct{})
	}
	missing := false
	for h := range s.holders.streams {
		if !h.wants || h.has == version {
			continue
		}
		if h.refused == version {
			return true, nil, fmt.Errorf("envoy refused the roots: %s", h.why)
		}
		missing = true
	}
	return missing, s.holders.changed, nil
}
