// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Why a change of a rotation is refused.
var (
	// ErrNoRotation: no rotation is going on in that scope, or it is past what was asked for.
	ErrNoRotation = errors.New("no such rotation")
	// ErrRotating: a rotation is going on that must end first.
	ErrRotating = errors.New("a rotation is going on")
	// ErrNotRotatable: the authority cannot be rotated by the mesh itself.
	ErrNotRotatable = errors.New("authority cannot be rotated")
	// ErrOthersWait: there are stragglers besides those that were named.
	ErrOthersWait = errors.New("others wait too")
)

// Holder is a consumer of the bundle: a workload's proxy. What is said of it is about the bundle that its
// Standing names.
type Holder struct {
	Source   Source
	Instance string
	Name     string // as people know it, "cluster/namespace/name"
	// Holds tells that it has acknowledged the bundle: for a proxy, that its Envoy has.
	Holds bool
	// Why it does not, and since when, as far as is known.
	Why   string
	Since time.Time
	// SignedBy is the ID of the issuer of its present certificate, as it says itself; for display.
	SignedBy string
}

// Standing is how far the consumers are, as far as the replicas that answer know.
type Standing struct {
	// Sequence of the bundle that the holders were compared with.
	Sequence uint64
	Holders  []Holder
	// Earliest and Latest are the clocks of the replicas that answered. A moment is noted by the latest and
	// waited for by the earliest, so that a clock that is wrong costs time and nothing else.
	Earliest, Latest time.Time
	// Missing are the replicas that live and do not answer: neither their proxies nor their clock are known.
	Missing []string
}

// stragglers are those that do not hold the bundle, by name.
func (s Standing) stragglers() []Holder {
	var out []Holder
	for _, h := range s.Holders {
		if !h.Holds {
			out = append(out, h)
		}
	}
	slices.SortFunc(out, func(a, b Holder) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func (s Standing) missing() Wait {
	return Wait{Unknown: "no answer from " + strings.Join(s.Missing, ", ")}
}

// rotation is the journal of one change of issuers. It stands in the record of its scope, so that a step and
// what it changes are one transaction. How far it is, is in the phases of the two issuers:
//
//	To     generated → published → distributed → active
//	From   active . . . . . . . . . . . . . . .  retiring → drained → removed
type rotation struct {
	From    string    `json:"from"` // IDs
	To      string    `json:"to"`
	Started time.Time `json:"started"`
	Paused  bool      `json:"paused"`
	// Back tells that it was turned around after To had become active: From is what was to replace To.
	Back bool `json:"back"`
	// Left are the names of the stragglers that a person has decided to leave behind.
	Left      []string   `json:"left"`
	Decisions []Decision `json:"decisions"`

	raw json.RawMessage
}

// MarshalJSON keeps fields that a newer release wrote.
func (r rotation) MarshalJSON() ([]byte, error) {
	type known rotation
	return overlay(r.raw, known(r))
}

// UnmarshalJSON remembers fields that a newer release wrote.
func (r *rotation) UnmarshalJSON(b []byte) error {
	type known rotation
	if err := json.Unmarshal(b, (*known)(r)); err != nil {
		return err
	}
	r.raw = append(json.RawMessage(nil), b...)
	return nil
}

// Decision is what a person had a rotation do.
type Decision struct {
	At   time.Time `json:"at"`
	By   string    `json:"by"`
	What string    `json:"what"`
}

// maxLeft bounds the stragglers that a person may leave behind: each is a name in the record.
const maxLeft = 1000

// move is one step: an issuer enters a phase.
type move struct {
	id string
	to Phase
}

// Wait is what keeps a rotation from its next step. At most one of its fields says something.
type Wait struct {
	Paused bool
	// Until is when time alone will have done it.
	Until time.Time
	// Stragglers have to acknowledge first, or be left behind by a person.
	Stragglers []Holder
	// Unknown says why nobody can tell how far the consumers are.
	Unknown string
}

// limits are the numbers by which an issuer is drained.
type limits struct {
	longest time.Duration // lifetime of what the issuer, or one below it, has signed
	budget  time.Duration // for which a replica may go on signing without having heard
	skew    time.Duration // between clocks, and between deciding and signing
}

// drainedAt is when nothing is alive that an issuer signed which retired at that time.
func (l limits) drainedAt(retired time.Time) time.Time {
	return retired.Add(l.budget + l.longest + l.skew)
}

// find gives the index of an issuer, or -1.
func (r record) find(id string) int {
	return slices.IndexFunc(r.Issuers, func(i issuerRecord) bool { return i.ID == id })
}

// ends gives both issuers of the rotation.
func (r record) ends() (from, to issuerRecord, ok bool) {
	if r.Rotation == nil {
		return from, to, false
	}
	f, t := r.find(r.Rotation.From), r.find(r.Rotation.To)
	if f < 0 || t < 0 {
		return from, to, false
	}
	return r.Issuers[f], r.Issuers[t], true
}

// due tells the next step of a rotation, or what it waits for. It depends on its arguments alone.
func (r record) due(s Standing, l limits) (move, Wait) {
	from, to, ok := r.ends()
	switch {
	case !ok:
		return move{}, Wait{}
	case r.Rotation.Paused:
		return move{}, Wait{Paused: true}
	}
	switch {
	case to.Phase == PhaseGenerated:
		return move{to.ID, PhasePublished}, Wait{}
	case to.Phase == PhasePublished:
		return r.once(move{to.ID, PhaseDistributed}, s)
	case to.Phase == PhaseDistributed:
		return r.once(move{to.ID, PhaseActive}, s)
	case from.Phase == PhaseRetiring:
		if len(s.Missing) > 0 {
			return move{}, s.missing()
		}
		if at := l.drainedAt(from.Since); s.Earliest.Before(at) {
			return move{}, Wait{Until: at}
		}
		return move{from.ID, PhaseDrained}, Wait{}
	case from.Phase == PhaseDrained:
		return r.once(move{from.ID, PhaseRemoved}, s)
	}
	return move{}, Wait{}
}

// once makes the step wait for every consumer to hold the bundle. An intermediate is in no bundle: it travels
// with every certificate that it signed.
func (r record) once(m move, s Standing) (move, Wait) {
	switch {
	case len(s.Missing) > 0:
		return move{}, s.missing()
	case r.Scope != ScopeRoot:
		return m, Wait{}
	case s.Sequence != r.Sequence:
		return move{}, Wait{Unknown: "the newest bundle is being sent"}
	}
	late := slices.DeleteFunc(s.stragglers(), func(h Holder) bool { return slices.Contains(r.Rotation.Left, h.Name) })
	if len(late) > 0 {
		return move{}, Wait{Stragglers: late}
	}
	return m, Wait{}
}

// after is the record once the step is done.
func (r record) after(m move, now time.Time) record {
	r = r.next()
	switch m.to {
	case PhasePublished:
		r.Sequence = r.raised()
	case PhaseActive:
		r.enter(r.Rotation.From, PhaseRetiring, now)
		r.Issuers[r.find(m.id)].Epoch = r.Epoch
	case PhaseRemoved:
		r.Sequence = r.raised()
		r.Issuers[r.find(r.Rotation.To)].Bridge = nil
		r.Rotation = nil
	}
	r.enter(m.id, m.to, now)
	return r.pruned()
}

// raised is the next sequence of the bundle; only the root's record has one.
func (r record) raised() uint64 {
	if r.Scope != ScopeRoot {
		return 0
	}
	return r.Sequence + 1
}

// enter puts an issuer into a phase, in a record that is a copy. A key goes with its last use.
func (r record) enter(id string, p Phase, now time.Time) {
	i := &r.Issuers[r.find(id)]
	i.Phase, i.Since = p, now.UTC()
	if p == PhaseRemoved || p == PhaseRevoked {
		i.Key, i.Bridge = []byte{}, nil
	}
}

// keptRemoved is how many issuers that are out of use stay in a record, for people to see.
const keptRemoved = 3

func (r record) pruned() record {
	removed := 0
	for _, i := range r.Issuers {
		if i.Phase == PhaseRemoved {
			removed++
		}
	}
	r.Issuers = slices.DeleteFunc(r.Issuers, func(i issuerRecord) bool {
		if i.Phase != PhaseRemoved || removed <= keptRemoved {
			return false
		}
		removed--
		return true
	})
	return r
}

// begin puts a new issuer beside the active one and starts the journal.
func (r record) begin(fresh issuerRecord, by string, now time.Time) (record, error) {
	if r.Rotation != nil {
		return r, fmt.Errorf("%w: of %s, since %s", ErrRotating, r.Scope, r.Rotation.Started.Format(time.RFC3339))
	}
	at := r.active()
	if at < 0 {
		return r, fmt.Errorf("%w: %s has no active issuer", ErrNotRotatable, r.Scope)
	}
	r = r.next()
	fresh.Phase, fresh.Since = PhaseGenerated, now.UTC()
	r.Issuers = append(r.Issuers, fresh)
	r.Rotation = &rotation{From: r.Issuers[at].ID, To: fresh.ID, Started: now.UTC()}
	r.decide(by, "rotate", now)
	return r, nil
}

// decide notes a person's decision, in a journal that is a copy.
func (r record) decide(by, what string, now time.Time) {
	r.Rotation.Decisions = append(slices.Clone(r.Rotation.Decisions), Decision{At: now.UTC(), By: by, What: what})
}

// changed is a copy with a journal to change.
func (r record) changed() (record, error) {
	if _, _, ok := r.ends(); !ok {
		return r, fmt.Errorf("%w: of %s", ErrNoRotation, r.Scope)
	}
	r = r.next()
	journal := *r.Rotation
	r.Rotation = &journal
	return r, nil
}

// paused stops a rotation where it is, or lets it go on.
func (r record) paused(on bool, by string, now time.Time) (record, error) {
	r, err := r.changed()
	if err != nil {
		return r, err
	}
	r.Rotation.Paused = on
	r.decide(by, map[bool]string{true: "pause", false: "resume"}[on], now)
	return r, nil
}

// rolledBack takes a rotation back. What was not active yet is given up; what was is itself rotated out, by the
// same steps. Once From is removed there is no way back.
func (r record) rolledBack(by string, now time.Time) (record, error) {
	r, err := r.changed()
	if err != nil {
		return r, err
	}
	from, to, _ := r.ends()
	if to.Phase != PhaseActive {
		if to.Phase.trusted() {
			r.Sequence = r.raised()
		}
		r.enter(to.ID, PhaseRemoved, now)
		r.Rotation = nil
		return r.pruned(), nil
	}
	if len(from.Key) == 0 {
		return r, fmt.Errorf("%w: the key of %s is gone", ErrNoRotation, from.ID)
	}
	r.enter(to.ID, PhaseRetiring, now)
	r.enter(from.ID, PhaseActive, now)
	r.Issuers[r.find(from.ID)].Epoch = r.Epoch
	r.Rotation.From, r.Rotation.To = to.ID, from.ID
	r.Rotation.Back, r.Rotation.Paused = !r.Rotation.Back, false
	r.decide(by, "rollback", now)
	return r, nil
}

// proceeding leaves the named stragglers behind. It is refused while there are others: a person decides about
// those that he was shown.
func (r record) proceeding(by string, named []string, s Standing, l limits, now time.Time) (record, error) {
	_, wait := r.due(s, l)
	switch {
	case wait.Paused:
		return r, fmt.Errorf("%w that waits for stragglers: that of %s is paused; resume it first", ErrNoRotation, r.Scope)
	case len(wait.Stragglers) == 0:
		return r, fmt.Errorf("%w that waits for stragglers in %s", ErrNoRotation, r.Scope)
	case len(named)+len(r.Rotation.Left) > maxLeft:
		return r, fmt.Errorf("%w: %d stragglers are too many to be left behind, at most %d", ErrOthersWait, len(named), maxLeft)
	}
	var others []string
	for _, h := range wait.Stragglers {
		if !slices.Contains(named, h.Name) {
			others = append(others, h.Name)
		}
	}
	if len(others) > 0 {
		return r, fmt.Errorf("%w: %s", ErrOthersWait, strings.Join(others, ", "))
	}
	r, err := r.changed()
	if err != nil {
		return r, err
	}
	for _, h := range wait.Stragglers {
		r.Rotation.Left = append(slices.Clone(r.Rotation.Left), h.Name)
	}
	r.decide(by, "proceed without "+strings.Join(named, ", "), now)
	return r, nil
}

// checkRotation reports a journal that no release writes.
func (r record) checkRotation() error {
	for _, i := range r.Issuers {
		if (i.Phase == PhaseRemoved || i.Phase == PhaseRevoked) && len(i.Key) > 0 {
			return fmt.Errorf("%s: %w: issuer %s is %s and has a key", recordKey(r.Scope), ErrCorrupt, i.ID, i.Phase)
		}
	}
	if r.Rotation == nil {
		return nil
	}
	from, to, ok := r.ends()
	if !ok {
		return fmt.Errorf("%s: %w: a rotation from %q to %q, which are not there", recordKey(r.Scope), ErrCorrupt, r.Rotation.From, r.Rotation.To)
	}
	switch to.Phase {
	case PhaseGenerated, PhasePublished, PhaseDistributed:
		ok = from.Phase == PhaseActive
	case PhaseActive:
		ok = from.Phase == PhaseRetiring || from.Phase == PhaseDrained
	default:
		ok = false
	}
	if !ok {
		return fmt.Errorf("%s: %w: a rotation from an issuer that is %s to one that is %s", recordKey(r.Scope), ErrCorrupt, from.Phase, to.Phase)
	}
	return nil
}
