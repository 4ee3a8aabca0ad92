// SPDX-License-Identifier: Apache-2.0

package gateways

import (
	"slices"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// A door is an SNI, in lower case. It is open while there is an endpoint behind it that
// takes calls. A gateway must open a door before callers come, and keep it open until the
// last of them has been told to come no more, because callers take a gateway that turns
// them away for dead. When callers know is not known here: whoever does asks for what has
// turned, and says when a door that has closed may go (see xdsserver.Gatekeeper).
type doors struct {
	opened, closed []string            // since it was last asked
	kept           map[string]keptDoor // closed, and still in what is built
}

// keptDoor is what was last built for a door while it was open.
type keptDoor struct{ cluster, assignment xds.Resource }

// Doors are those that have opened and those that have closed since it was last asked. The
// first computation opens none: nobody can have waited for it. What has closed stays in
// what is built as it last was, until Close.
func (b *Builder) Doors() (opened, closed []string) {
	opened, closed = b.doors.opened, b.doors.closed
	b.doors.opened, b.doors.closed = nil, nil
	return opened, closed
}

// Close takes out doors that have closed, and have not opened again. It has effect with
// the next computation.
func (b *Builder) Close(names ...string) {
	for _, name := range names {
		delete(b.doors.kept, name)
	}
}

// turn notes what has opened and closed between two computations.
func (d *doors) turn(old *federation.View, oldParts map[*federation.Service]*part, view *federation.View, parts map[*federation.Service]*part) {
	if old == nil {
		return
	}
	present := 0
	for _, s := range view.Services {
		before, ok := old.Service(s.Name)
		if ok {
			present++
		}
		if fresh := parts[s]; oldParts[before] != fresh {
			d.compare(oldParts[before], fresh)
		}
	}
	if present == len(old.Services) {
		return
	}
	for _, s := range old.Services {
		if _, ok := view.Service(s.Name); !ok {
			d.compare(oldParts[s], nil)
		}
	}
}

// compare is turn for one service, of which there may be nothing before or after.
func (d *doors) compare(before, after *part) {
	if before == nil {
		before = &part{}
	}
	if after == nil {
		after = &part{}
	}
	for name := range after.doors {
		if !before.doors[name] {
			delete(d.kept, name)
			d.closed = slices.DeleteFunc(d.closed, func(n string) bool { return n == name })
			d.opened = append(d.opened, name)
		}
	}
	for name := range before.doors {
		if after.doors[name] {
			continue
		}
		cluster, built := before.resources[xds.ClusterType][name]
		assignment, alsoBuilt := before.resources[xds.EndpointType][name]
		if !built || !alsoBuilt {
			continue
		}
		if d.kept == nil {
			d.kept = map[string]keptDoor{}
		}
		d.kept[name] = keptDoor{cluster, assignment}
		d.opened = slices.DeleteFunc(d.opened, func(n string) bool { return n == name })
		d.closed = append(d.closed, name)
	}
}

// keep puts the doors that are kept into what was built.
func (d *doors) keep(all map[string]map[string]xds.Resource) {
	for name, k := range d.kept {
		for typeURL, r := range map[string]xds.Resource{xds.ClusterType: k.cluster, xds.EndpointType: k.assignment} {
			if all[typeURL] == nil {
				all[typeURL] = map[string]xds.Resource{}
			}
			all[typeURL][name] = r
		}
	}
}
