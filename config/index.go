// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Index is the configuration in effect, ready to be asked. It is immutable: what it
// returns is shared, and stays the same pointer from one Index to the next while the
// objects behind it do. A nil Index is one without objects.
type Index struct {
	objects []*federation.Object // what it was made of
	primary map[federation.SourceID]bool

	decoded  map[*federation.Object]decoding
	status   map[*federation.Object]Status
	byKey    map[objectKey]*federation.Object
	findings []federation.Finding

	peers    peerAuthentications
	rules    destinationRules
	services virtualServices
	sidecars sidecars
	selected []string // label keys
}

// decoding is what Decode said of one object.
type decoding struct {
	object *Object
	err    error
}

// identity of an object among sources: its version does not matter.
type identity struct{ group, kind, namespace, name string }

type objectKey struct {
	identity
	source federation.SourceID
}

func identityOf(o *federation.Object) identity {
	group, _ := splitAPIVersion(o.APIVersion)
	return identity{group, o.Kind, o.Namespace, o.Name}
}

// New indexes a snapshot's configuration.
func New(s *federation.Snapshot) *Index { return NewFrom(nil, s) }

// NewFrom is New, decoding only what changed since an earlier index: objects that are the
// same pointer did not. It is the earlier index itself where nothing changed, so that who
// compares pointers need not ask again.
func NewFrom(prev *Index, s *federation.Snapshot) *Index {
	primary := map[federation.SourceID]bool{}
	for id, c := range s.Clusters {
		if c.Role == federation.Primary {
			primary[federation.KubeSource(id)] = true
		}
	}
	if prev != nil && slices.Equal(prev.objects, s.Objects) && maps.Equal(prev.primary, primary) {
		return prev
	}
	x := &Index{
		objects: s.Objects, primary: primary,
		decoded: make(map[*federation.Object]decoding, len(s.Objects)),
		status:  make(map[*federation.Object]Status, len(s.Objects)),
		byKey:   make(map[objectKey]*federation.Object, len(s.Objects)),
	}
	x.decode(prev)
	acting := x.elect()
	x.build(prev, acting)
	x.report()
	return x
}

// decode reads all objects, remembering those of an earlier index.
func (x *Index) decode(prev *Index) {
	for _, o := range x.objects {
		x.byKey[objectKey{identityOf(o), o.Source}] = o
		if prev != nil {
			if d, ok := prev.decoded[o]; ok {
				x.decoded[o] = d
				continue
			}
		}
		object, err := Decode(o)
		x.decoded[o] = decoding{object, err}
	}
}

// acts tells whether a source contributes configuration: primaries do, and what is not a
// cluster (objects applied to the mesh itself).
func (x *Index) acts(source federation.SourceID) bool {
	if _, kube := source.Cluster(); kube {
		return x.primary[source]
	}
	return true
}

// elect finds the objects in effect: of the same object in several sources the oldest
// that can be read, ties by source. Objects of equal content are one. The result is
// ordered by age, then namespace and name.
func (x *Index) elect() []*Object {
	same := map[identity][]*Object{}
	for _, o := range x.objects {
		d := x.decoded[o]
		switch {
		case !x.acts(o.Source):
			x.status[o] = Status{State: IgnoredOnRemote, Message: "its cluster is a remote: configuration comes from primaries; apply it to a primary, or join the cluster with --primary"}
		case errors.Is(d.err, ErrUnknownKind):
			x.status[o] = Status{State: UnknownKind, Message: d.err.Error()}
		case d.err != nil:
			x.status[o] = Status{State: Invalid, Message: d.err.Error()}
		default:
			key := identityOf(o)
			same[key] = append(same[key], d.object)
		}
	}
	var acting []*Object
	for _, list := range same {
		slices.SortFunc(list, compareAge)
		acting = append(acting, list[0])
		for _, o := range list {
			x.status[o.Object] = o.status()
			if o != list[0] && !sameContent(o, list[0]) {
				x.status[o.Object] = Status{State: Conflict, Message: fmt.Sprintf(
					"the same object in %s is older and applies everywhere; make both equal, or remove one", list[0].Source)}
			}
		}
	}
	slices.SortFunc(acting, func(a, b *Object) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
	return acting
}

func compareAge(a, b *Object) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Source, b.Source))
}

func sameContent(a, b *Object) bool {
	x, ok := a.Spec.(proto.Message)
	y, also := b.Spec.(proto.Message)
	if ok && also {
		return proto.Equal(x, y) && slices.Equal(a.Unknown, b.Unknown)
	}
	return sameJSON(a.Raw, b.Raw)
}

// status of an object that is in effect.
func (d *Object) status() Status {
	s := Status{State: Active}
	if d.table == nil {
		s.State = NotYetTranslated
	}
	for _, f := range d.untranslated {
		s.Notes = append(s.Notes, "NotYetTranslated: "+f)
	}
	for _, f := range d.Unknown {
		s.Notes = append(s.Notes, "UnknownField: "+f)
	}
	return s
}

// build sorts the acting objects into what answers questions.
func (x *Index) build(prev *Index, acting []*Object) {
	if prev == nil {
		prev = &Index{}
	}
	keys := map[string]bool{}
	for _, o := range acting {
		switch spec := o.Spec.(type) {
		case *security.PeerAuthentication:
			x.peers.add(o, spec, x)
			addKeys(keys, spec.Selector.GetMatchLabels())
		case *networking.DestinationRule:
			x.rules.add(o, spec)
			addKeys(keys, spec.WorkloadSelector.GetMatchLabels())
		case *networking.VirtualService:
			x.services.add(o, spec, x, prev)
			addSourceLabels(keys, spec)
		case *networking.Sidecar:
			x.sidecars.add(o, spec, x)
			addKeys(keys, spec.WorkloadSelector.GetLabels())
		}
	}
	x.rules.finish(&prev.rules)
	x.services.finish(x)
	x.selected = slices.Sorted(maps.Keys(keys))
}

func addKeys(keys map[string]bool, labels map[string]string) {
	for k := range labels {
		keys[k] = true
	}
}

func addSourceLabels(keys map[string]bool, v *networking.VirtualService) {
	for _, r := range v.Http {
		for _, m := range r.Match {
			addKeys(keys, m.SourceLabels)
		}
	}
}

// note adds a detail to an object's status.
func (x *Index) note(o *Object, format string, args ...any) {
	s := x.status[o.Object]
	s.Notes = append(slices.Clip(s.Notes), fmt.Sprintf(format, args...))
	x.status[o.Object] = s
}

// SelectorKeys are the label keys of workloads that some policy looks at, ordered. Two
// workloads of a namespace that agree on them get the same answers from every method.
func (x *Index) SelectorKeys() []string {
	if x == nil {
		return nil
	}
	return x.selected
}

// Status tells what became of an object; an object of the same name in the same source
// stands for it. False if the index knows of none.
func (x *Index) Status(o *federation.Object) (Status, bool) {
	if x == nil || o == nil {
		return Status{}, false
	}
	if s, ok := x.status[o]; ok {
		return s, true
	}
	known, ok := x.byKey[objectKey{identityOf(o), o.Source}]
	return x.status[known], ok
}

// Findings are what people should know about the configuration, ordered by code and
// object.
func (x *Index) Findings() []federation.Finding {
	if x == nil {
		return nil
	}
	return x.findings
}

// report makes the findings of the statuses.
func (x *Index) report() {
	for o, s := range x.status {
		if f, ok := finding(o, s); ok {
			x.findings = append(x.findings, f)
		}
	}
	slices.SortFunc(x.findings, func(a, b federation.Finding) int {
		return cmp.Or(cmp.Compare(a.Code, b.Code), cmp.Compare(a.Object, b.Object), cmp.Compare(a.Message, b.Message))
	})
}

func finding(o *federation.Object, s Status) (federation.Finding, bool) {
	f := federation.Finding{Object: ID(o), Message: s.Message, Severity: federation.SeverityWarning}
	switch s.State {
	case Active:
		if len(s.Notes) == 0 {
			return f, false
		}
		f.Code, f.Message = CodeNotTranslated, "in effect, except: "+strings.Join(s.Notes, "; ")
	case NotYetTranslated:
		f.Code, f.Severity, f.Message = CodeNotTranslated, federation.SeverityInfo, "kept, without effect: this kind is not translated yet"
	case IgnoredOnRemote:
		f.Code = CodeIgnored
	case Conflict:
		f.Code, f.Severity = CodeConflict, federation.SeverityError
	default:
		f.Code, f.Severity = CodeInvalid, federation.SeverityError
		f.Message = strings.TrimPrefix(s.Message, fmt.Sprintf("%v: %s: ", ErrInvalid, f.Object)) // it is named already
	}
	return f, true
}

func sameJSON(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	var x, y struct {
		Spec any `json:"spec"`
	}
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	return reflect.DeepEqual(x, y)
}
