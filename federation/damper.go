// SPDX-License-Identifier: Apache-2.0

package federation

import "time"

// Damper holds back small and quick changes of remote weights, so that a busy cluster
// elsewhere does not rewrite everybody's endpoints: a weight changes at most once an
// Interval and by at least Share of its value, except from and to zero.
//
// The zero Damper is ready to use. It is not safe for concurrent use, and keeps no time:
// callers say when it is.
type Damper struct {
	// Interval between two changes of one weight; zero means 1 s.
	Interval time.Duration

	// Share of the weight below which a change is none, in percent; zero means 5.
	Share uint32

	held    map[WeightKey]heldWeight
	waiting map[WeightKey]bool // those of held that are due some time
}

type heldWeight struct {
	weight uint32
	since  time.Time
	due    time.Time // when a change that was held back may go; zero if none is
}

// Weigh is the function for Query.Weigh at one moment.
func (d *Damper) Weigh(now time.Time) func(WeightKey, uint32) uint32 {
	return func(key WeightKey, ready uint32) uint32 { return d.Weight(now, key, ready) }
}

// Weight is what to send for a key whose exact weight is ready.
func (d *Damper) Weight(now time.Time, key WeightKey, ready uint32) uint32 {
	h, ok := d.held[key]
	switch {
	case ready == 0:
		delete(d.held, key)
		delete(d.waiting, key)
		return 0
	case !ok:
	case d.small(h.weight, ready):
		h.due = time.Time{}
		d.held[key] = h
		delete(d.waiting, key)
		return h.weight
	case now.Sub(h.since) < d.interval():
		h.due = h.since.Add(d.interval())
		d.held[key] = h
		d.waiting[key] = true
		return h.weight
	}
	if d.held == nil {
		d.held, d.waiting = map[WeightKey]heldWeight{}, map[WeightKey]bool{}
	}
	d.held[key] = heldWeight{weight: ready, since: now}
	delete(d.waiting, key)
	return ready
}

// Due are the keys with a change that was held back and may go by now: their services are
// to be split again.
func (d *Damper) Due(now time.Time) []WeightKey {
	var out []WeightKey
	for key := range d.waiting {
		if !d.held[key].due.After(now) {
			out = append(out, key)
		}
	}
	return out
}

// Next is when Due has something for the first time; false if nothing is held back.
func (d *Damper) Next() (time.Time, bool) {
	var next time.Time
	for key := range d.waiting {
		if due := d.held[key].due; next.IsZero() || due.Before(next) {
			next = due
		}
	}
	return next, !next.IsZero()
}

// Forget drops what is held for keys that are no longer wanted.
func (d *Damper) Forget(wanted func(WeightKey) bool) {
	for key := range d.held {
		if !wanted(key) {
			delete(d.held, key)
			delete(d.waiting, key)
		}
	}
}

func (d *Damper) interval() time.Duration {
	if d.Interval == 0 {
		return time.Second
	}
	return d.Interval
}

// small tells whether a change is less than the share of the old weight.
func (d *Damper) small(old, ready uint32) bool {
	share := uint64(d.Share)
	if share == 0 {
		share = 5
	}
	diff := uint64(max(old, ready) - min(old, ready))
	return diff*100 < share*uint64(old)
}
