// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"net/netip"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/net/http2"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/isthmus-mesh/isthmus/federation"
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

func TestEnvelope(t *testing.T) {
	t.Parallel()
	message, err := proto.Marshal(&discoveryv3.DeltaDiscoveryResponse{
		TypeUrl: "a type", Nonce: "7", RemovedResources: []string{"x"}, Resources: []*discoveryv3.Resource{{Name: "r", Version: "1"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if typeURL, nonce, err := envelope(message); string(typeURL) != "a type" || string(nonce) != "7" || err != nil {
		t.Errorf("%q %q %v", typeURL, nonce, err)
	}
	if _, _, err := envelope([]byte{0xff}); err == nil {
		t.Error("no error for what is no message")
	}
}

func TestDataFrames(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 1, 16379, 16380, 40000} {
		raw := dataFrame(make([]byte, size))
		f, got := http2.NewFramer(nil, bytes.NewReader(raw)), 0
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				break
			}
			got += len(frame.(*http2.DataFrame).Data())
		}
		if got != size+5 {
			t.Errorf("%d bytes became %d with their prefix", size, got)
		}
	}
}

func TestEngineWorldFlaps(t *testing.T) {
	t.Parallel()
	w := engineWorld{Services: 3, Proxies: 2, Classes: 1}
	w.build()
	before := w.snapshot
	after := w.flap(engineService(0))
	if got := before.Records[engineService(0)][0].Endpoints[0].Health; got != federation.Ready {
		t.Errorf("the snapshot before was changed: %s", got)
	}
	if got := after.Records[engineService(0)][0].Endpoints[0].Health; got != federation.NotReady {
		t.Errorf("after the flap: %s", got)
	}
	if len(after.Workloads) != 3 || w.proxy(2).Namespace != lone {
		t.Errorf("%d workloads, the last in %s", len(after.Workloads), w.proxy(2).Namespace)
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
