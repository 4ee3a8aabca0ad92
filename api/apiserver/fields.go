// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"net/url"
	"strconv"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

// setFields sets the fields of m that a query names by their JSON names.
func setFields(m proto.Message, query url.Values) error {
	for name, values := range query {
		if err := setField(m, name, values); err != nil {
			return err
		}
	}
	return nil
}

// setField sets a scalar field, a list of strings, or a duration ("30s").
func setField(m proto.Message, name string, values []string) error {
	r := m.ProtoReflect()
	f := r.Descriptor().Fields().ByJSONName(name)
	if f == nil {
		return invalid("%q is no parameter of this call", name)
	}
	for _, v := range values {
		if !utf8.ValidString(v) {
			return invalid("%q is %q, want UTF-8", name, v)
		}
	}
	if f.IsList() && f.Kind() == protoreflect.StringKind {
		list := r.Mutable(f).List()
		for _, v := range values {
			list.Append(protoreflect.ValueOfString(v))
		}
		return nil
	}
	if len(values) != 1 {
		return invalid("%q is given %d times, want once", name, len(values))
	}
	v, err := parseField(f, values[0])
	if err != nil {
		return err
	}
	r.Set(f, v)
	return nil
}

func parseField(f protoreflect.FieldDescriptor, text string) (protoreflect.Value, error) {
	switch {
	case f.IsList() || f.IsMap():
	case f.Kind() == protoreflect.StringKind:
		return protoreflect.ValueOfString(text), nil
	case f.Kind() == protoreflect.BoolKind:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return protoreflect.Value{}, invalid("%q is %q, want true or false", f.JSONName(), text)
		}
		return protoreflect.ValueOfBool(b), nil
	case f.Kind() == protoreflect.Int32Kind:
		n, err := strconv.ParseInt(text, 10, 32)
		if err != nil {
			return protoreflect.Value{}, invalid("%q is %q, want a number", f.JSONName(), text)
		}
		return protoreflect.ValueOfInt32(int32(n)), nil
	case f.Kind() == protoreflect.MessageKind && f.Message().FullName() == (*durationpb.Duration)(nil).ProtoReflect().Descriptor().FullName():
		d, err := time.ParseDuration(text)
		if err != nil {
			return protoreflect.Value{}, invalid("%q is %q, want a duration such as 30s", f.JSONName(), text)
		}
		return protoreflect.ValueOfMessage(durationpb.New(d).ProtoReflect()), nil
	}
	return protoreflect.Value{}, invalid("%q cannot be given in the address; send it in the body of a POST", f.JSONName())
}
