// SPDX-License-Identifier: Apache-2.0

package config_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
)

// many is n services' worth of configuration: routes and a rule for each.
func many(b *testing.B, n int) *federation.Snapshot {
	s := story(b, peer("istio-system", "default", "{mtls: {mode: STRICT}}"))
	for i := range n {
		for _, doc := range []string{
			routes("shop", fmt.Sprint("s", i), fmt.Sprintf("{hosts: [s%d], http: [{match: [{uri: {prefix: /a}}], route: [{destination: {host: s%d, subset: v1}, weight: 90}, {destination: {host: s%d, subset: v2}, weight: 10}]}]}", i, i, i)),
			rule("shop", fmt.Sprint("s", i), fmt.Sprintf("{host: s%d, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}", i)),
		} {
			o := object(b, doc)
			o.Created = time.Unix(int64(i), 0)
			s.Objects = append(s.Objects, o)
		}
	}
	return s
}

func BenchmarkNew(b *testing.B) {
	s := many(b, 500)
	b.ReportAllocs()
	for b.Loop() {
		New(s)
	}
}

// BenchmarkNewFrom is one object's change among 1,000.
func BenchmarkNewFrom(b *testing.B) {
	s := many(b, 500)
	x := New(s)
	next := *s
	next.Objects = slices.Clone(s.Objects)
	o := *s.Objects[700]
	next.Objects[700] = &o
	b.ReportAllocs()
	for b.Loop() {
		NewFrom(x, &next)
	}
}

func BenchmarkQuestions(b *testing.B) {
	x := New(many(b, 500))
	name := federation.ServiceName{Namespace: "shop", Name: "s250"}
	b.ReportAllocs()
	for b.Loop() {
		x.DestinationRule("web", nil, name)
		x.VirtualService("web", nil, name.Host())
		x.Imports("web", nil, name, 0)
		x.MutualTLS("web", nil, 8080)
	}
}
