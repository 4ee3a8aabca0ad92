// SPDX-License-Identifier: Apache-2.0

package xdsserver

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// Gatekeeper is a Generator of gateways. Its doors are the SNIs, in lower case, that lead
// to endpoints which take calls.
type Gatekeeper interface {
	Generator
	// Doors are those that have opened and those that have closed since it was last asked.
	// What has closed stays in what BuildClass makes, as it last was, until Close.
	Doors() (opened, closed []string)
	Close(names ...string)
}

// Holdings is what a proxy has acknowledged.
type Holdings interface {
	// Settled tells that it runs, and has answered all it was sent.
	Settled() bool
	// Held is the version of a resource that it has accepted; false if it has none, or has
	// not answered the newest one it was sent.
	Held(typeURL, name string) (version string, ok bool)
}

// How long doors wait.
const (
	// doorPatience is how long a proxy that does not answer is waited for: a gateway that
	// is stuck, or a caller that reads slowly. Who was waited for in vain is not waited
	// for again until it has answered.
	doorPatience = 2 * time.Second

	// doorGrace is for proxies that other replicas serve. These learn of a change at about
	// the same time as this one; what they have acknowledged is not known here.
	doorGrace = 100 * time.Millisecond
)

// doors see to it that no caller comes to a gateway that does not lead to the service yet,
// or does so no more: it would turn the caller away, and callers take such a gateway for
// dead. A door is one SNI of one network.
//
// When a door opens, the gateways of its network are told at once, and callers only when
// those gateways have acknowledged. When it closes, callers are told at once, and the
// gateways when the callers have acknowledged. Only who is connected to this replica can
// be waited for; for a ready gateway that is not, and for callers elsewhere, there is a
// short grace. All waiting is bounded.
//
// A door that was not seen to open is open: after a restart nobody loses what he had.
type doors struct {
	now   func() time.Time
	moved func() // called when something is waited for no more

	waiting atomic.Int32 // how many doors somebody is waited for at; acknowledgements look no further if none

	mu       sync.Mutex
	openings map[door]*opening
	closings []*closing
	arrivals map[arrival]time.Time
	waits    []time.Duration // of doors that opened, to be counted
	overdue  int             // doors that opened or closed without an answer, to be counted
}

type door struct {
	network federation.Network
	sni     string
}

// opening is a door that callers must not hear of yet.
type opening struct {
	gateways map[*feed]struct{} // that have not acknowledged
	versions map[string]bool    // of the assignment, that lead to somebody
	services map[federation.ServiceName]bool
	since    time.Time
	earliest time.Time
}

// closing is doors that gateways must keep, all closed by one change.
type closing struct {
	doors   map[door]bool
	callers map[*feed]struct{} // that have not acknowledged
	since   time.Time
}

// arrival is a service that has its first ready endpoints in a network of which no gateway
// is connected here, so that its doors are not known.
type arrival struct {
	service federation.ServiceName
	network federation.Network
}

func newDoors(now func() time.Time, moved func()) *doors {
	return &doors{
		now: now, moved: moved,
		openings: map[door]*opening{}, arrivals: map[arrival]time.Time{},
	}
}

// count is called under mu, after a change.
func (d *doors) count() { d.waiting.Store(int32(len(d.openings) + len(d.closings))) }

// held is how many doors somebody is not told of.
func (d *doors) held() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.openings) + len(d.arrivals)
	for _, c := range d.closings {
		n += len(c.doors)
	}
	return n
}

// open waits at a door for gateways; elsewhere tells that its network has others.
func (d *doors) open(at door, version string, gateways []*feed, elsewhere bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.count()
	for _, c := range d.closings {
		delete(c.doors, at)
	}
	if len(gateways) == 0 && !elsewhere {
		return
	}
	now := d.now()
	o := &opening{
		gateways: map[*feed]struct{}{}, versions: map[string]bool{version: true},
		services: map[federation.ServiceName]bool{}, since: now, earliest: now,
	}
	for _, f := range gateways {
		o.gateways[f] = struct{}{}
	}
	if elsewhere {
		o.earliest = now.Add(doorGrace)
	}
	d.openings[at] = o
}

// close waits at doors for those callers that have not acknowledged everything.
func (d *doors) close(at []door, callers []*feed) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := &closing{doors: map[door]bool{}, callers: map[*feed]struct{}{}, since: d.now()}
	for _, one := range at {
		delete(d.openings, one)
		c.doors[one] = true
	}
	d.closings = append(d.closings, c)
	d.count() // before looking: who acknowledges from now on finds the doors
	for _, f := range callers {
		if !f.current() {
			c.callers[f] = struct{}{}
		}
	}
}

// renew notes the assignments of a network's doors that are waited at: they may have
// changed meanwhile, and any of them will do.
func (d *doors) renew(network federation.Network, resources xds.Resources) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for at, o := range d.openings {
		if at.network != network {
			continue
		}
		if r, ok := resources.Get(xds.EndpointType, at.sni); ok {
			o.versions[r.Version] = true
		}
	}
}

// arrive holds callers back from a service whose doors are not known here.
func (d *doors) arrive(a arrival) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.arrivals[a]; !ok {
		d.arrivals[a] = d.now().Add(doorGrace)
	}
}

// closed tells whether callers must not hear of a network's endpoints yet, and remembers
// who asked.
func (d *doors) closed(key federation.WeightKey) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if at, ok := d.arrivals[arrival{key.Service, key.Network}]; ok && d.now().Before(at) {
		return true
	}
	if len(d.openings) == 0 {
		return false
	}
	o := d.openings[door{key.Network, key.SNI()}]
	if o != nil {
		o.services[key.Service] = true
	}
	return o != nil
}

// heard takes in what a proxy has acknowledged by now.
func (d *doors) heard(f *feed, holds Holdings) {
	if d.waiting.Load() == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for at, o := range d.openings {
		if _, ok := o.gateways[f]; ok && o.held(at.sni, holds) {
			d.strike(o, f)
		}
	}
	for _, c := range d.closings {
		if f.current() {
			delete(c.callers, f)
		}
	}
}

func (o *opening) held(sni string, holds Holdings) bool {
	if _, ok := holds.Held(xds.ClusterType, sni); !ok {
		return false
	}
	version, ok := holds.Held(xds.EndpointType, sni)
	return ok && o.versions[version]
}

// leave is for a proxy that has gone.
func (d *doors) leave(f *feed) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.openings {
		d.strike(o, f)
	}
	for _, c := range d.closings {
		delete(c.callers, f)
	}
}

// strike takes a gateway off those that are waited for. Callers want to know at once if it
// was the last; of a door that closes it is enough to learn at the next look.
func (d *doors) strike(o *opening, f *feed) {
	if _, ok := o.gateways[f]; !ok {
		return
	}
	if delete(o.gateways, f); len(o.gateways) == 0 && !d.now().Before(o.earliest) {
		d.moved()
	}
}

// settle ends what has waited long enough: services that callers are to be told of now,
// and doors that gateways may drop.
func (d *doors) settle() (opened []federation.ServiceName, dropped []door) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.count()
	now := d.now()
	for at, o := range d.openings {
		if now.Before(o.due()) {
			continue
		}
		for name := range o.services {
			opened = append(opened, name)
		}
		d.giveUp(o.gateways, 1)
		d.waits = append(d.waits, now.Sub(o.since))
		delete(d.openings, at)
	}
	d.closings = slices.DeleteFunc(d.closings, func(c *closing) bool {
		if len(c.doors) > 0 && now.Before(c.due()) {
			return false
		}
		dropped = slices.AppendSeq(dropped, maps.Keys(c.doors))
		d.giveUp(c.callers, len(c.doors))
		return true
	})
	for a, at := range d.arrivals {
		if !now.Before(at) {
			opened = append(opened, a.service)
			delete(d.arrivals, a)
		}
	}
	return opened, dropped
}

// giveUp notes those that were waited for in vain at some doors.
func (d *doors) giveUp(waits map[*feed]struct{}, doors int) {
	if len(waits) > 0 {
		d.overdue += doors
	}
	for f := range waits {
		f.tardy.Store(true)
	}
}

// due is when a door need not be waited at any more.
func (o *opening) due() time.Time {
	if len(o.gateways) == 0 {
		return o.earliest
	}
	return o.since.Add(doorPatience)
}

func (c *closing) due() time.Time {
	if len(c.callers) == 0 {
		return c.since.Add(doorGrace)
	}
	return c.since.Add(doorPatience)
}

// next is when to look again at the latest; false if nothing is waited for.
func (d *doors) next() (at time.Time, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	earliest := func(t time.Time) {
		if !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	for _, o := range d.openings {
		earliest(o.due())
		if o.earliest.After(now) {
			earliest(o.earliest)
		}
	}
	for _, c := range d.closings {
		earliest(c.due())
		if len(c.callers) > 0 {
			earliest(now.Add(doorGrace))
		}
	}
	for _, t := range d.arrivals {
		earliest(t)
	}
	return at, ok
}

// tally is what is to be counted since the last time.
func (d *doors) tally() (waits []time.Duration, overdue int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	waits, overdue = d.waits, d.overdue
	d.waits, d.overdue = nil, 0
	return waits, overdue
}
