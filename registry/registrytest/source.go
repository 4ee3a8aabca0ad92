// SPDX-License-Identifier: Apache-2.0

package registrytest

import (
	"context"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/registry"
)

// Source is a registry.Source that reports what a test says. The zero value reports
// nothing.
type Source struct {
	mu      sync.Mutex
	level   *registry.Level
	status  *registry.Status
	fail    error
	runs    int
	running registry.Sink
	broken  chan struct{}
	reading time.Duration
}

var _ registry.Source = (*Source)(nil)

// Set makes level what the source reports, now and after every start.
func (s *Source) Set(level registry.Level) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.level = &level
	if s.running != nil {
		s.running.Offer(level)
	}
}

// Reading makes every start take that long until the source reports.
func (s *Source) Reading(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reading = d
}

// Observe makes status what is known about the source.
func (s *Source) Observe(status registry.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = &status
	if s.running != nil {
		s.running.Observe(status)
	}
}

// Fail ends the present run with an error.
func (s *Source) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
	if s.broken != nil {
		close(s.broken)
		s.broken = nil
	}
}

// Runs is how often the source was started, and whether it runs now.
func (s *Source) Runs() (runs int, running bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.runs, s.running != nil
}

// Run implements registry.Source.
func (s *Source) Run(ctx context.Context, sink registry.Sink) error {
	s.mu.Lock()
	s.runs++
	reading := s.reading
	s.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(reading):
	}
	s.mu.Lock()
	s.running = sink
	s.broken = make(chan struct{})
	broken := s.broken
	if s.level != nil {
		sink.Offer(*s.level)
	}
	if s.status != nil {
		sink.Observe(*s.status)
	}
	s.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-broken:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = nil
	if ctx.Err() != nil {
		return nil
	}
	return s.fail
}
