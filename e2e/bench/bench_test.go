// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
)

func TestQuantile(t *testing.T) {
	t.Parallel()
	values := []float64{5, 1, 4, 2, 3}
	for q, want := range map[float64]float64{0: 1, 0.5: 3, 0.99: 5, 1: 5} {
		if got := quantile(values, q); got != want {
			t.Errorf("quantile %v of %v: got %v, want %v", q, values, got, want)
		}
	}
	if values[0] != 5 {
		t.Error("the values were put in order where they are")
	}
	if got := quantile(nil, 0.5); got != 0 {
		t.Errorf("quantile of nothing: got %v", got)
	}
}

func TestRound(t *testing.T) {
	t.Parallel()
	for in, want := range map[float64]float64{12.3456: 12.3, 0.98765: 0.988, 123.456: 123, 3967: 3967, 0: 0, -2.54: -2.54} {
		if got := round(in); got != want {
			t.Errorf("round(%v): got %v, want %v", in, got, want)
		}
	}
}

func TestEveryFigureHasOneScene(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for _, s := range scenes() {
		for _, f := range s.figures {
			if seen[f.name] != "" {
				t.Errorf("%s is measured by %s and by %s", f.name, seen[f.name], s.name)
			}
			seen[f.name] = s.name
		}
	}
	b := &bench{wanted: []string{"propagation-p50-ms", "propagation-p5-ms"}}
	if got := b.unknown(); got != "propagation-p5-ms" {
		t.Errorf("unknown figure: got %q", got)
	}
}

func TestFleet(t *testing.T) {
	t.Parallel()
	f := fleet{prefix: "svc", services: 1000, endpoints: 10}
	addresses, uids := map[netip.Addr]bool{}, map[string]bool{}
	for i := range f.services {
		for e := range f.endpoints {
			addresses[f.address(i, e)], uids[string(f.uid(i, e))] = true, true
		}
	}
	if len(addresses) != 10000 || len(uids) != 10000 {
		t.Errorf("%d addresses and %d UIDs, want 10000 of each", len(addresses), len(uids))
	}
	value, err := stored(f.pod(3, 4))
	if err != nil {
		t.Fatal(err)
	}
	object, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(value), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if pod, ok := object.(*corev1.Pod); !ok || pod.Name != "svc-3-7d9f8c6b5-00004" || pod.Status.PodIP != f.address(3, 4).String() {
		t.Errorf("stored and read again: %v", object)
	}
}
