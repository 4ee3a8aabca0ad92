// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// A field that is misspelt in a table would be reported as missing for ever.
func TestTablesNameFieldsThatExist(t *testing.T) {
	t.Parallel()
	for name, k := range kinds {
		for _, path := range k.table {
			m := k.spec().ProtoReflect().Descriptor()
			for _, part := range strings.Split(path, ".") {
				var f protoreflect.FieldDescriptor
				if m != nil {
					f = m.Fields().ByJSONName(part)
				}
				if f == nil {
					t.Errorf("%s: %s: there is no %s", name, path, part)
					break
				}
				m = f.Message()
			}
		}
	}
}
