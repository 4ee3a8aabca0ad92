// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	kjson "sigs.k8s.io/json"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Errors of Decode. All name the object.
var (
	// ErrUnknownKind: the object is of no API that the mesh understands.
	ErrUnknownKind = errors.New("unknown kind")
	// ErrInvalid: the object cannot be read, or what it says cannot be meant.
	ErrInvalid = errors.New("invalid object")
)

// maxObject is the size of an object that is looked at. Kubernetes takes less.
const maxObject = 3 << 20

// Object is a decoded one. It is shared and never changed.
type Object struct {
	*federation.Object

	// Spec is the typed value: for Istio's kinds the spec's message of istio.io/api (the
	// type is the same for all versions), for others a pointer to the whole object.
	Spec any

	// Unknown are the fields that the type does not have: a newer API, or a slip.
	Unknown []string

	// untranslated are the fields that have no effect yet.
	untranslated []string
	table        fields
}

// envelope is what every object has.
type envelope struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Spec       json.RawMessage `json:"spec"`
}

// Decode reads an object. Its error wraps ErrUnknownKind or ErrInvalid and names object,
// field, value, and what would be right. Fields that the type does not have are no error
// (see Object.Unknown).
func Decode(o *federation.Object) (*Object, error) {
	group, version := splitAPIVersion(o.APIVersion)
	k, ok := kinds[group+"/"+o.Kind]
	if !ok {
		return nil, fmt.Errorf("%w: %s: apiVersion %q, kind %q", ErrUnknownKind, ID(o), o.APIVersion, o.Kind)
	}
	if len(o.Raw) > maxObject {
		return nil, fmt.Errorf("%w: %s: %d bytes, at most %d are read", ErrInvalid, ID(o), len(o.Raw), maxObject)
	}
	d := &Object{Object: o, table: k.table}
	var problems []string
	var err error
	switch {
	case k.spec != nil && !slices.Contains(istioVersions, version):
		return nil, fmt.Errorf("%w: %s: version %q, want one of %s", ErrUnknownKind, ID(o), version, strings.Join(istioVersions, ", "))
	case k.spec != nil:
		problems, err = d.decodeSpec(k.spec())
	case k.object[version] == nil:
		return nil, fmt.Errorf("%w: %s: version %q", ErrUnknownKind, ID(o), version)
	default:
		err = d.decodeWhole(k.object[version]())
	}
	if err == nil && len(problems) == 0 {
		problems = validate(d)
	}
	if len(problems) > 0 {
		err = errors.New(strings.Join(problems, "; "))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, ID(o), err)
	}
	return d, nil
}

// decodeSpec reads one of Istio's kinds. The problems it returns have better words than
// the error would have.
func (d *Object) decodeSpec(spec proto.Message) (problems []string, err error) {
	var e envelope
	if err := kjson.UnmarshalCaseSensitivePreserveInts(d.Raw, &e); err != nil {
		return nil, err
	}
	if e.Kind != "" && e.Kind != d.Kind {
		return nil, fmt.Errorf("kind: %q in the object, %q outside", e.Kind, d.Kind)
	}
	if len(e.Spec) == 0 {
		e.Spec = []byte("{}")
	}
	seen, err := inspect(spec.ProtoReflect().Descriptor(), e.Spec)
	if err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	// Istio's own unmarshaler: it takes durations such as "1m", as users write them.
	if err := json.Unmarshal(e.Spec, spec); err != nil {
		if len(seen.bad) > 0 {
			return seen.bad, nil
		}
		return nil, fmt.Errorf("spec: %w", err)
	}
	d.Spec, d.Unknown = spec, seen.unknown
	if d.table != nil {
		d.untranslated = d.table.missing(spec)
	}
	return nil, nil
}

// decodeWhole reads an object whose Go type describes its JSON.
func (d *Object) decodeWhole(into any) error {
	strict, err := kjson.UnmarshalStrict(d.Raw, into, kjson.DisallowUnknownFields)
	if err != nil {
		return err
	}
	for _, e := range strict {
		d.Unknown = append(d.Unknown, strings.TrimSuffix(strings.TrimPrefix(e.Error(), `unknown field "`), `"`))
	}
	slices.Sort(d.Unknown)
	d.Spec = into
	return nil
}
