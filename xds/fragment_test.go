// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"bytes"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/xds"
)

func TestFragmentsAreWhatProtobufWouldWrite(t *testing.T) {
	t.Parallel()
	deterministic := proto.MarshalOptions{Deterministic: true}
	for _, name := range []string{"a", "outbound|80||pay.shop.svc.cluster.local"} {
		made, err := xds.NewResource(name, &clusterv3.Cluster{Name: name, AltStatName: "x"})
		if err != nil {
			t.Fatal(err)
		}
		byHand := xds.Resource{Name: made.Name, Version: made.Version, Body: bytes.Clone(made.Body)}
		body := &anypb.Any{TypeUrl: xds.ClusterType, Value: made.Body}
		delta, _ := deterministic.Marshal(&discoveryv3.DeltaDiscoveryResponse{Resources: []*discoveryv3.Resource{{Name: name, Version: made.Version, Resource: body}}})
		whole, _ := deterministic.Marshal(&discoveryv3.DiscoveryResponse{Resources: []*anypb.Any{body}})
		for what, r := range map[string]xds.Resource{"made": made, "by hand": byHand} {
			// Protobuf writes fields by number: version, resource, name.
			if got := r.Fragment(xds.ClusterType); !bytes.Equal(got, delta) {
				t.Errorf("%s, %s: fragment\n%x, want\n%x", name, what, got, delta)
			}
			if got := r.WholeFragment(xds.ClusterType); !bytes.Equal(got, whole) {
				t.Errorf("%s, %s: whole fragment\n%x, want\n%x", name, what, got, whole)
			}
		}
		var c clusterv3.Cluster
		if err := proto.Unmarshal(made.Body, &c); err != nil || c.Name != name {
			t.Errorf("body: %v %v", &c, err)
		}
	}
}
