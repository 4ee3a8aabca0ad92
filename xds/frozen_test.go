// SPDX-License-Identifier: Apache-2.0

//go:build race && linux

package xds_test

import (
	"runtime/debug"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"github.com/isthmus-mesh/isthmus/xds"
)

func TestNobodyWritesToAFragment(t *testing.T) {
	t.Parallel()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	for _, size := range []int{1, 5000, 100000} { // within a page, over its end, and of many
		r, err := xds.NewResource("a", &clusterv3.Cluster{Name: "a", AltStatName: strings.Repeat("x", size)})
		if err != nil {
			t.Fatal(err)
		}
		fragment := r.Fragment(xds.ClusterType)
		for what, b := range map[string][]byte{
			"the fragment": fragment, "its end": fragment[len(fragment)-1:], "the body": r.Body, "the Any": r.WholeFragment(xds.ClusterType),
		} {
			if !faults(func() { b[0]++ }) {
				t.Errorf("%d bytes: %s was written to", size, what)
			}
		}
		again, _ := xds.NewResource("a", &clusterv3.Cluster{Name: "a", AltStatName: strings.Repeat("x", size)})
		if &again.Fragment(xds.ClusterType)[0] != &fragment[0] {
			t.Errorf("%d bytes: equal fragments are kept twice", size)
		}
	}
}

// faults tells whether something touches memory that it must not.
func faults(do func()) (did bool) {
	defer func() { did = recover() != nil }()
	do()
	return false
}
