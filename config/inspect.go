// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// inspection compares JSON with the message it should become, to name fields as users
// wrote them: unmarshalers stop at the first error and know no path.
type inspection struct {
	unknown []string // fields that the message does not have
	bad     []string // "field: value …, want …"
}

func inspect(message protoreflect.MessageDescriptor, raw []byte) (*inspection, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	in := &inspection{}
	in.message(message, v, "spec")
	return in, nil
}

func (in *inspection) refuse(path string, v any, want string) {
	shown, _ := json.Marshal(v)
	if len(shown) > 40 {
		shown = append(shown[:40], "…"...)
	}
	in.bad = append(in.bad, fmt.Sprintf("%s: %s, want %s", path, shown, want))
}

func (in *inspection) message(m protoreflect.MessageDescriptor, v any, path string) {
	if v == nil || in.wellKnown(m, v, path) {
		return
	}
	object, ok := v.(map[string]any)
	if !ok {
		in.refuse(path, v, "an object")
		return
	}
	for _, key := range slices.Sorted(maps.Keys(object)) {
		field := m.Fields().ByJSONName(key)
		if field == nil {
			field = m.Fields().ByTextName(key)
		}
		if field == nil {
			in.unknown = append(in.unknown, path+"."+key)
			continue
		}
		in.field(field, object[key], path+"."+key)
	}
}

func (in *inspection) field(f protoreflect.FieldDescriptor, v any, path string) {
	switch {
	case v == nil:
	case f.IsMap():
		object, ok := v.(map[string]any)
		if !ok {
			in.refuse(path, v, "an object")
			return
		}
		for _, key := range slices.Sorted(maps.Keys(object)) {
			in.value(f.MapValue(), object[key], path+"["+key+"]")
		}
	case f.IsList():
		list, ok := v.([]any)
		if !ok {
			in.refuse(path, v, "a list")
			return
		}
		for i, item := range list {
			in.value(f, item, fmt.Sprintf("%s[%d]", path, i))
		}
	default:
		in.value(f, v, path)
	}
}

func (in *inspection) value(f protoreflect.FieldDescriptor, v any, path string) {
	switch f.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		in.message(f.Message(), v, path)
	case protoreflect.EnumKind:
		in.enum(f.Enum(), v, path)
	default:
		in.scalar(f.Kind(), v, path)
	}
}

func (in *inspection) enum(e protoreflect.EnumDescriptor, v any, path string) {
	name, ok := v.(string)
	if _, number := v.(json.Number); number || ok && e.Values().ByName(protoreflect.Name(name)) != nil {
		return
	}
	var names []string
	for i := range e.Values().Len() {
		names = append(names, string(e.Values().Get(i).Name()))
	}
	in.refuse(path, v, "one of "+strings.Join(names, ", "))
}

func (in *inspection) scalar(k protoreflect.Kind, v any, path string) {
	want := ""
	switch k {
	case protoreflect.BoolKind:
		if _, ok := v.(bool); !ok {
			want = "true or false"
		}
	case protoreflect.StringKind, protoreflect.BytesKind:
		if _, ok := v.(string); !ok {
			want = "a string"
		}
	default:
		text, quoted := v.(string)
		number, ok := v.(json.Number)
		if quoted {
			number, ok = json.Number(text), true
		}
		if !ok || !fits(k, number) {
			want = "a number (" + k.String() + ")"
		}
	}
	if want != "" {
		in.refuse(path, v, want)
	}
}

func fits(k protoreflect.Kind, n json.Number) bool {
	var err error
	switch k {
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		var x int32
		err = json.Unmarshal([]byte(n), &x)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		var x uint32
		err = json.Unmarshal([]byte(n), &x)
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		var x int64
		err = json.Unmarshal([]byte(n), &x)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		var x uint64
		err = json.Unmarshal([]byte(n), &x)
	default:
		_, err = n.Float64()
	}
	return err == nil
}

// wellKnown judges the messages whose JSON is not an object of their fields.
func (in *inspection) wellKnown(m protoreflect.MessageDescriptor, v any, path string) bool {
	name, ok := strings.CutPrefix(string(m.FullName()), "google.protobuf.")
	if !ok {
		return false
	}
	switch name {
	case "Duration":
		text, _ := v.(string)
		if _, err := time.ParseDuration(text); err != nil {
			in.refuse(path, v, `a duration such as "1.5s"`)
		}
	case "DoubleValue", "FloatValue", "Int64Value", "UInt64Value", "Int32Value", "UInt32Value", "BoolValue", "StringValue", "BytesValue":
		in.value(m.Fields().ByName("value"), v, path)
	}
	return true
}
