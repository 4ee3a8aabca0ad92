// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Version identifies one value of one key. It rises with every change.
type Version int64

// Entry is a value as it was read.
type Entry struct {
	Key     string
	Value   []byte
	Version Version
}

// State is where authorities and revocations are kept, so that replicas agree. Keys are slash-separated paths
// without a leading slash. Values are owned by the caller once returned. Errors other than the sentinels
// below mean that the state is away.
type State interface {
	// Fetch reads one key. ErrNotFound if there is none.
	Fetch(ctx context.Context, key string) (Entry, error)
	// List reads every key that begins with prefix, in order of keys, as of one moment.
	List(ctx context.Context, prefix string) ([]Entry, error)
	// Create writes a key that must not exist yet. ErrExists if it does.
	Create(ctx context.Context, key string, value []byte) (Version, error)
	// Replace writes a key that must still have that version. ErrChanged if it has not.
	Replace(ctx context.Context, key string, value []byte, version Version) (Version, error)
	// Lead waits until nobody leads under that name, and leads until ctx ends, the term is resigned, or the state
	// has not heard of this replica for some seconds. Who leads is called who, for people to see.
	Lead(ctx context.Context, name, who string) (Term, error)
	// ReplaceAs is Replace in a transaction that holds only if the term lasts. ErrFenced if it does not.
	ReplaceAs(ctx context.Context, term Term, key string, value []byte, version Version) (Version, error)
	// Changes gives a channel that holds a token whenever something below prefix may have changed since the
	// last token was taken. It is closed when ctx ends. A reader lists again; it is not told what changed.
	Changes(ctx context.Context, prefix string) <-chan struct{}
}

// Term is the time in which one replica leads.
type Term struct {
	Key      string  // of the state, as long as the term lasts
	Revision Version // at which the key was made
	Done     <-chan struct{}
	// Resign ends the term, so that nobody has to wait for the state to notice.
	Resign func()
}

// leadPrefix is above the keys of leaders.
const leadPrefix = "lead/"

// Memory is a State in this process, for tests and for trying things out. The zero value is ready to use.
type Memory struct {
	mu      sync.Mutex
	entries map[string]Entry
	last    Version
	watches map[chan struct{}]string
}

var _ State = (*Memory)(nil)

// Fetch implements State.
func (m *Memory) Fetch(ctx context.Context, key string) (Entry, error) {
	if err := ctx.Err(); err != nil {
		return Entry{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[key]
	if !ok {
		return Entry{}, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	e.Value = bytes.Clone(e.Value)
	return e, nil
}

// List implements State.
func (m *Memory) List(ctx context.Context, prefix string) ([]Entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Entry
	for key, e := range m.entries {
		if strings.HasPrefix(key, prefix) {
			e.Value = bytes.Clone(e.Value)
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

// Create implements State.
func (m *Memory) Create(ctx context.Context, key string, value []byte) (Version, error) {
	return m.put(ctx, key, value, 0)
}

// Replace implements State.
func (m *Memory) Replace(ctx context.Context, key string, value []byte, version Version) (Version, error) {
	return m.put(ctx, key, value, version)
}

// ReplaceAs implements State.
func (m *Memory) ReplaceAs(ctx context.Context, term Term, key string, value []byte, version Version) (Version, error) {
	m.mu.Lock()
	fenced := m.entries[term.Key].Version != term.Revision
	m.mu.Unlock()
	if fenced {
		return 0, fmt.Errorf("%s: %w", key, ErrFenced)
	}
	return m.put(ctx, key, value, version)
}

// Lead implements State.
func (m *Memory) Lead(ctx context.Context, name, who string) (Term, error) {
	key := leadPrefix + name
	wakes := m.Changes(ctx, key)
	for {
		revision, err := m.Create(ctx, key, []byte(who))
		if err == nil {
			return m.term(ctx, key, revision), nil
		}
		if !errors.Is(err, ErrExists) {
			return Term{}, err
		}
		select {
		case <-ctx.Done():
			return Term{}, ctx.Err()
		case <-wakes:
		}
	}
}

func (m *Memory) term(ctx context.Context, key string, revision Version) Term {
	done := make(chan struct{})
	end := sync.OnceFunc(func() {
		m.Depose(key, revision)
		close(done)
	})
	context.AfterFunc(ctx, end)
	return Term{Key: key, Revision: revision, Done: done, Resign: end}
}

// Depose ends a term without the knowledge of who leads, as when its lease runs out.
func (m *Memory) Depose(key string, revision Version) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries[key].Version != revision {
		return
	}
	delete(m.entries, key)
	for ch, prefix := range m.watches {
		if strings.HasPrefix(key, prefix) {
			wake(ch)
		}
	}
}

func (m *Memory) put(ctx context.Context, key string, value []byte, want Version) (Version, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch have := m.entries[key].Version; {
	case have == want:
	case want == 0:
		return 0, fmt.Errorf("%s: %w", key, ErrExists)
	default:
		return 0, fmt.Errorf("%s: %w", key, ErrChanged)
	}
	m.last++
	if m.entries == nil {
		m.entries = make(map[string]Entry)
	}
	m.entries[key] = Entry{Key: key, Value: bytes.Clone(value), Version: m.last}
	for ch, prefix := range m.watches {
		if strings.HasPrefix(key, prefix) {
			wake(ch)
		}
	}
	return m.last, nil
}

// Changes implements State.
func (m *Memory) Changes(ctx context.Context, prefix string) <-chan struct{} {
	ch := make(chan struct{}, 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.watches == nil {
		m.watches = make(map[chan struct{}]string)
	}
	m.watches[ch] = prefix
	context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.watches, ch)
		close(ch)
	})
	return ch
}

// wake puts a token into ch unless it holds one already.
func wake(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
