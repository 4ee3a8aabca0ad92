// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// schema is the version of every value that this program writes.
const schema = 1

// errNewer: the value was written by a newer version of meshd.
var errNewer = errors.New("value of a newer schema")

// version is what all values begin with.
type version struct {
	V int `json:"v"`
}

func (s version) check() error {
	switch {
	case s.V > schema:
		return fmt.Errorf("%w: %d, this meshd knows up to %d", errNewer, s.V, schema)
	case s.V < 1:
		return fmt.Errorf("schema version %d: want at least 1", s.V)
	}
	return nil
}

// encode writes a value. Objects of users keep their bytes (no HTML escapes).
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimRight(b.Bytes(), "\n"), nil
}

// decode reads a value whose struct embeds a version. A newer schema is read as far as it
// is understood, and reported as errNewer.
func decode(data []byte, into any, v *version) error {
	if err := json.Unmarshal(data, into); err != nil {
		var vv version
		if json.Unmarshal(data, &vv) == nil && vv.V > schema {
			return vv.check()
		}
		return err
	}
	return v.check()
}

// headValue is a record without its endpoints.
type headValue struct {
	version
	Generation int64 `json:"generation"`
	federation.Record
}

// gatewayValue and objectValue are the nouns as they are.
type (
	gatewayValue struct {
		version
		federation.Gateway
	}
	objectValue struct {
		version
		federation.Object
		Raw json.RawMessage `json:"raw"` // readable, where Object's would be base64
	}
)

// sliceValue is some endpoints of a record. What endpoints have in common stands in
// tables; an endpoint names the row, and row 0 goes without saying.
type sliceValue struct {
	version
	Generation int64               `json:"g"`
	Networks   []string            `json:"n"`
	Accounts   []string            `json:"s"`
	Localities [][3]string         `json:"z"`
	Ports      []map[uint32]uint32 `json:"p"`
	Pairs      []string            `json:"k"` // "key=value"
	Labels     [][]int             `json:"l"` // rows of Pairs
	Endpoints  []sliceEndpoint     `json:"e"`
}

type sliceEndpoint struct {
	Workload  string `json:"w,omitempty"`
	UID       string `json:"u,omitempty"`
	Addresses string `json:"a,omitempty"` // separated by spaces
	Health    string `json:"h,omitempty"` // empty means Ready
	Network   int    `json:"n,omitempty"`
	Locality  int    `json:"z,omitempty"`
	Hostname  string `json:"o,omitempty"`
	Account   int    `json:"s,omitempty"`
	Ports     int    `json:"p,omitempty"`
	Labels    int    `json:"l,omitempty"`
	Mesh      bool   `json:"m,omitempty"`
}

// encodeSlice writes endpoints of one generation.
func encodeSlice(generation int64, endpoints []federation.Endpoint) ([]byte, error) {
	v := sliceValue{version: version{schema}, Generation: generation}
	networks, accounts := map[string]int{}, map[string]int{}
	localities, pairs := map[[3]string]int{}, map[string]int{}
	for i := range endpoints {
		e := &endpoints[i]
		row := sliceEndpoint{
			Workload: e.Workload, UID: e.UID, Hostname: e.Hostname, Mesh: e.Mesh,
			Network:  intern(networks, &v.Networks, string(e.Network)),
			Account:  intern(accounts, &v.Accounts, e.ServiceAccount),
			Locality: intern(localities, &v.Localities, [3]string{e.Locality.Region, e.Locality.Zone, e.Locality.Subzone}),
			Ports:    rowOf(&v.Ports, e.TargetPorts, func(a, b map[uint32]uint32) bool { return maps.Equal(a, b) }),

			Addresses: encodeAddresses(e.Addresses),
			Labels:    internLabels(pairs, &v.Pairs, &v.Labels, e.Labels),
		}
		if e.Health != federation.Ready {
			row.Health = string(e.Health)
		}
		v.Endpoints = append(v.Endpoints, row)
	}
	return encode(&v)
}

func intern[T comparable](index map[T]int, table *[]T, value T) int {
	i, ok := index[value]
	if !ok {
		i = len(*table)
		index[value] = i
		*table = append(*table, value)
	}
	return i
}

func rowOf[T any](table *[]T, value T, equal func(a, b T) bool) int {
	for i, row := range *table {
		if equal(row, value) {
			return i
		}
	}
	*table = append(*table, value)
	return len(*table) - 1
}

// internLabels is the row of a label set.
func internLabels(index map[string]int, pairs *[]string, rows *[][]int, labels map[string]string) int {
	set := make([]int, 0, len(labels))
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		set = append(set, intern(index, pairs, k+"="+labels[k]))
	}
	return rowOf(rows, set, func(a, b []int) bool { return slices.Equal(a, b) })
}

// decodeLabels is the label sets of all rows.
func decodeLabels(pairs []string, rows [][]int, names *registry.Interner) ([]map[string]string, error) {
	labels := make([]map[string]string, len(rows))
	for i, row := range rows {
		set := make(map[string]string, len(row))
		for _, p := range row {
			pair, err := at(pairs, p, "label pair")
			if err != nil {
				return nil, err
			}
			k, value, _ := strings.Cut(pair, "=")
			set[k] = value
		}
		labels[i] = names.Labels(set)
	}
	return labels, nil
}

// decodeSlice is the inverse of encodeSlice. Names that many endpoints have are shared.
func decodeSlice(data []byte, names *registry.Interner) (generation int64, endpoints []federation.Endpoint, err error) {
	var v sliceValue
	if err := decode(data, &v, &v.version); err != nil {
		return 0, nil, err
	}
	labels, err := decodeLabels(v.Pairs, v.Labels, names)
	if err != nil {
		return 0, nil, err
	}
	endpoints = make([]federation.Endpoint, len(v.Endpoints))
	for i := range v.Endpoints {
		if endpoints[i], err = v.endpoint(&v.Endpoints[i], labels, names); err != nil {
			return 0, nil, fmt.Errorf("endpoint %d: %w", i, err)
		}
	}
	return v.Generation, endpoints, nil
}

func (v *sliceValue) endpoint(row *sliceEndpoint, labels []map[string]string, names *registry.Interner) (federation.Endpoint, error) {
	e := federation.Endpoint{Workload: row.Workload, UID: row.UID, Hostname: row.Hostname, Mesh: row.Mesh}
	network, err1 := at(v.Networks, row.Network, "network")
	account, err2 := at(v.Accounts, row.Account, "account")
	locality, err3 := at(v.Localities, row.Locality, "locality")
	ports, err4 := at(v.Ports, row.Ports, "ports")
	set, err5 := at(labels, row.Labels, "labels")
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return e, err
	}
	e.Network, e.ServiceAccount, e.Labels = federation.Network(names.String(network)), names.String(account), set
	e.Locality = internLocality(names, locality)
	if len(ports) > 0 {
		e.TargetPorts = ports
	}
	switch h := federation.Health(row.Health); h {
	case "":
		e.Health = federation.Ready
	case federation.Terminating, federation.NotReady:
		e.Health = federation.Health(names.String(string(h)))
	default:
		return e, fmt.Errorf("health %q: want %q or %q", h, federation.Terminating, federation.NotReady)
	}
	e.Addresses, err5 = decodeAddresses(row.Addresses)
	return e, err5
}

func at[T any](table []T, i int, what string) (T, error) {
	if i < 0 || i >= len(table) {
		var zero T
		return zero, fmt.Errorf("%s %d: the table has %d rows", what, i, len(table))
	}
	return table[i], nil
}

func equalEndpoint(a, b *federation.Endpoint) bool {
	return a.Workload == b.Workload && a.UID == b.UID && a.Health == b.Health && a.Network == b.Network &&
		a.Locality == b.Locality && a.Hostname == b.Hostname && a.ServiceAccount == b.ServiceAccount &&
		a.Mesh == b.Mesh && slices.Equal(a.Addresses, b.Addresses) &&
		maps.Equal(a.TargetPorts, b.TargetPorts) && maps.Equal(a.Labels, b.Labels)
}

func equalEndpoints(a, b []federation.Endpoint) bool {
	return slices.EqualFunc(a, b, func(x, y federation.Endpoint) bool { return equalEndpoint(&x, &y) })
}

// overlay encodes a value so that fields of the stored one that its type does not know
// survive: a newer meshd may have written them.
func overlay(stored []byte, value any) ([]byte, error) {
	fresh, err := encode(value)
	if err != nil || len(stored) == 0 {
		return fresh, err
	}
	merged, err := overlayRaw(stored, fresh, reflect.TypeOf(value))
	if err != nil {
		return nil, err
	}
	return encode(merged)
}

func overlayRaw(stored, fresh json.RawMessage, t reflect.Type) (json.RawMessage, error) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	var old, out map[string]json.RawMessage
	if t.Kind() != reflect.Struct || json.Unmarshal(stored, &old) != nil || json.Unmarshal(fresh, &out) != nil {
		return fresh, nil
	}
	known := jsonFields(t)
	changed := false
	for name, was := range old {
		ft, ok := known[name]
		now, present := out[name]
		switch {
		case !ok:
			out[name], changed = was, true
		case present:
			merged, err := overlayRaw(was, now, ft)
			if err != nil {
				return nil, err
			}
			out[name], changed = merged, true
		}
	}
	if !changed {
		return fresh, nil
	}
	return encode(out)
}

// jsonFields are the fields of a struct by the names JSON gives them.
func jsonFields(t reflect.Type) map[string]reflect.Type {
	out := map[string]reflect.Type{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		ft := f.Type
		for ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		switch {
		case f.Anonymous && name == "" && ft.Kind() == reflect.Struct:
			maps.Copy(out, jsonFields(ft))
		case name != "" && name != "-":
			out[name] = f.Type
		}
	}
	return out
}
