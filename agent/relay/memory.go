// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// keptTypes are the types of resources that are written to disk. Secrets are none of them: keys come from the agent
// itself, never from meshd.
var keptTypes = []string{
	listenerType,
	"type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
	"type.googleapis.com/envoy.config.cluster.v3.Cluster",
	"type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
	NameTableType,
}

// Of the configuration that changes all the time, something is saved this often; and once changes pause, soon.
const (
	saveAfter = 2 * time.Second
	saveEvery = 15 * time.Second
)

const (
	memorySchema = 1
	maxMemory    = 512 << 20 // bytes
)

// errMemory means that the file is not what Memory wrote, or is somebody else's.
var errMemory = errors.New("not usable")

// Memory is the configuration that Envoy accepted last, in a file of mode 0600, for an agent that starts while no
// meshd answers. It holds no private key. The zero value with a Path works; fields must not change once it is used.
type Memory struct {
	// Path is the file; its folder must exist.
	Path string
	// Node says whose configuration it is. That of another node is not used.
	Node string
	// Log gets what keeps the file from being used or written; nil discards.
	Log *slog.Logger

	mu    sync.Mutex
	kinds map[string]resources
	from  time.Time // when what was loaded had been saved; zero once there is newer
	dirty chan struct{}
}

// resources are encoded messages of type envoy.service.discovery.v3.Resource, by name.
type resources map[string][]byte

// memoryHead is the first line of the file.
type memoryHead struct {
	V      int       `json:"v"`
	Node   string    `json:"node"`
	Saved  time.Time `json:"saved"`
	Size   int       `json:"size"`
	SHA256 string    `json:"sha256"`
}

func (m *Memory) log() *slog.Logger {
	if m.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return m.Log
}

// Load reads the file. One that is damaged or another node's is as good as none, and the log says so.
func (m *Memory) Load() {
	head, kinds, err := readMemory(m.Path, m.Node)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return
	case err != nil:
		m.log().Warn("the configuration of the last run is not used", "file", m.Path, "error", err)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kinds, m.from = kinds, head.Saved
}

func readMemory(path, node string) (head memoryHead, kinds map[string]resources, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return head, nil, err
	}
	if info.Size() > maxMemory || !info.Mode().IsRegular() {
		return head, nil, fmt.Errorf("%w: %v of %d bytes", errMemory, info.Mode(), info.Size())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return head, nil, err
	}
	return decodeMemory(text, node)
}

// decodeMemory checks that the file is whole before it looks at what is in it.
func decodeMemory(text []byte, node string) (head memoryHead, kinds map[string]resources, err error) {
	line, body, ok := bytes.Cut(text, []byte("\n"))
	if !ok || json.Unmarshal(line, &head) != nil {
		return head, nil, fmt.Errorf("%w: it does not begin with a line that describes it", errMemory)
	}
	sum := sha256.Sum256(body)
	switch {
	case head.V != memorySchema:
		return head, nil, fmt.Errorf("%w: schema %d, this agent reads %d", errMemory, head.V, memorySchema)
	case head.Size != len(body) || head.SHA256 != hex.EncodeToString(sum[:]):
		return head, nil, fmt.Errorf("%w: it is damaged: %d bytes do not have the checksum of the %d that were written", errMemory, len(body), head.Size)
	case head.Node != node:
		return head, nil, fmt.Errorf("%w: it is that of %q, and this is %q", errMemory, head.Node, node)
	}
	kinds, err = decodeKinds(body)
	return head, kinds, err
}

// The body is a list of fields 1, one for each type: its URL (1), and its resources (2).
const (
	fieldKind     = 1
	fieldKindURL  = 1
	fieldKindItem = 2
)

func decodeKinds(body []byte) (map[string]resources, error) {
	kinds := map[string]resources{}
	err := each(body, fieldKind, func(kind []byte) error {
		url, err := text(kind, fieldKindURL)
		if err != nil {
			return err
		}
		if !slices.Contains(keptTypes, string(url)) {
			return fmt.Errorf("%w: resources of type %.80q", errMemory, url)
		}
		all := resources{}
		kinds[string(url)] = all
		return each(kind, fieldKindItem, func(item []byte) error { return all.put(item) })
	})
	return kinds, err
}

func encodeKinds(kinds map[string]resources) []byte {
	var body []byte
	for _, url := range slices.Sorted(maps.Keys(kinds)) {
		kind := protowire.AppendString(protowire.AppendTag(nil, fieldKindURL, protowire.BytesType), url)
		for _, name := range slices.Sorted(maps.Keys(kinds[url])) {
			kind = protowire.AppendBytes(protowire.AppendTag(kind, fieldKindItem, protowire.BytesType), kinds[url][name])
		}
		body = protowire.AppendBytes(protowire.AppendTag(body, fieldKind, protowire.BytesType), kind)
	}
	return body
}

// put adds one encoded resource under its name.
func (r resources) put(item []byte) error {
	name, err := text(item, fieldResourceName)
	if err != nil {
		return err
	}
	r[string(name)] = item
	return nil
}

// Run saves what changes until ctx ends, and then once more. A disk that takes nothing costs nothing but the file.
func (m *Memory) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-m.changed():
			m.pause(ctx, saveAfter)
			m.save()
			m.pause(ctx, saveEvery)
		}
	}
	select {
	case <-m.changed():
		m.save()
	default:
	}
	return nil
}

func (m *Memory) pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// changed has a token when something is not saved yet.
func (m *Memory) changed() chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changedLocked()
}

func (m *Memory) changedLocked() chan struct{} {
	if m.dirty == nil {
		m.dirty = make(chan struct{}, 1)
	}
	return m.dirty
}

func (m *Memory) save() {
	m.mu.Lock()
	body := encodeKinds(m.kinds)
	m.mu.Unlock()
	if err := m.write(body, time.Now()); err != nil {
		m.log().Warn("configuration not kept on disk: an agent that starts without meshd would have none", "file", m.Path, "error", err)
	}
}

// write replaces the file, unless there is something in the body that must not be on a disk.
func (m *Memory) write(body []byte, now time.Time) error {
	if bytes.Contains(body, []byte("PRIVATE KEY")) {
		return errors.Join(errors.New("there is a private key in the configuration, and keys are not written to disk with it"), os.RemoveAll(m.Path))
	}
	sum := sha256.Sum256(body)
	head, err := json.Marshal(memoryHead{V: memorySchema, Node: m.Node, Saved: now.UTC().Truncate(time.Second), Size: len(body), SHA256: hex.EncodeToString(sum[:])})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(m.Path), ".configuration-*") // mode 0600 by definition
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already after a successful rename
	_, err = f.Write(append(head, '\n'))
	if err == nil {
		_, err = f.Write(body)
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), m.Path)
}

// empty tells whether there is nothing that a proxy could work with.
func (m *Memory) empty() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.kinds[listenerType]) == 0
}

// saved is when what is there was saved; zero if it is of this run.
func (m *Memory) saved() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.from
}

// response is what meshd would answer to a subscription: all resources of a type, or those of the names.
func (m *Memory) response(kind, nonce string, wanted func(name string) bool, named []string) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []byte
	add := func(field protowire.Number, value []byte) {
		out = protowire.AppendBytes(protowire.AppendTag(out, field, protowire.BytesType), value)
	}
	for _, name := range slices.Sorted(maps.Keys(m.kinds[kind])) {
		if wanted(name) {
			add(fieldDeltaResponseResources, m.kinds[kind][name])
		}
	}
	add(fieldResponseType, []byte(kind))
	add(fieldDeltaResponseNonce, []byte(nonce))
	for _, name := range named {
		if _, there := m.kinds[kind][name]; !there {
			add(fieldDeltaResponseRemoved, []byte(name))
		}
	}
	return out
}

// lesson is what a stream teaches the memory. Requests and responses are seen by different callers.
type lesson struct {
	memory *Memory

	mu      sync.Mutex
	begun   map[string]bool // by type; true while nothing that Envoy had before counts any more
	pending map[string]step // by nonce
}

// step is one response that Envoy has not judged yet.
type step struct {
	kind    string
	fresh   resources
	removed []string
}

// learn begins to follow a stream; nil if there is no memory.
func (m *Memory) learn() *lesson {
	if m == nil {
		return nil
	}
	return &lesson{memory: m, begun: map[string]bool{}, pending: map[string]step{}}
}

// request looks at a subscription. Whoever begins with nothing has forgotten what it had.
func (l *lesson) request(kind string, data []byte) {
	if l == nil || !slices.Contains(keptTypes, kind) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, again := l.begun[kind]; !again {
		l.begun[kind] = !holds(data)
	}
	var gone []string
	if each(data, fieldDeltaRequestUnsubscribe, func(name []byte) error { gone = append(gone, string(name)); return nil }) == nil && len(gone) > 0 {
		l.memory.apply(step{kind: kind, removed: gone}, false)
	}
}

// response remembers what is on its way to Envoy.
func (l *lesson) response(kind string, data []byte) {
	if l == nil || !slices.Contains(keptTypes, kind) {
		return
	}
	s := step{kind: kind, fresh: resources{}}
	nonce, err := text(data, fieldDeltaResponseNonce)
	err = errors.Join(err,
		each(data, fieldDeltaResponseResources, s.fresh.put),
		each(data, fieldDeltaResponseRemoved, func(name []byte) error { s.removed = append(s.removed, string(name)); return nil }),
	)
	if err != nil {
		return // Envoy will refuse it, too
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending[string(nonce)] = s
}

// judged is Envoy's word about a response.
func (l *lesson) judged(nonce string, accepted bool) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.pending[nonce]
	delete(l.pending, nonce)
	if ok && accepted {
		l.memory.apply(s, l.begun[s.kind])
		l.begun[s.kind] = false
	}
}

// apply changes what is remembered; anew forgets what there was of the type.
func (m *Memory) apply(s step, anew bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kinds == nil {
		m.kinds = map[string]resources{}
	}
	if anew || m.kinds[s.kind] == nil {
		m.kinds[s.kind] = resources{}
	}
	maps.Copy(m.kinds[s.kind], s.fresh)
	for _, name := range s.removed {
		delete(m.kinds[s.kind], name)
	}
	m.from = time.Time{}
	select {
	case m.changedLocked() <- struct{}{}:
	default:
	}
}

// holds tells whether a request of the incremental variant says that something is there already.
func holds(data []byte) bool {
	found := false
	err := each(data, fieldDeltaRequestInitial, func([]byte) error { found = true; return nil })
	return err == nil && found
}
