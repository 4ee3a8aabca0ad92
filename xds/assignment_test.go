// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"bytes"
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/federation"
)

// TestAssignmentsAreWhatProtobufWouldWrite compares the bytes that are written by hand with
// those of the message, and what is taken for sound with the rules of Envoy's API.
func TestAssignmentsAreWhatProtobufWouldWrite(t *testing.T) {
	t.Parallel()
	text := rapid.SampledFrom([]string{"", "a", "eu-central-1", "\xff"})
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom([]string{"outbound|80||pay.shop.svc.cluster.local", "a", "", "\xff"}).Draw(t, "name")
		perPod := rapid.Bool().Draw(t, "per pod")
		var groups []federation.Group
		for range rapid.IntRange(0, 4).Draw(t, "groups") {
			g := federation.Group{Priority: rapid.SampledFrom([]uint32{0, 0, 1, 128, 129}).Draw(t, "priority")}
			if rapid.Bool().Draw(t, "somewhere") {
				g.Locality = federation.Locality{Region: text.Draw(t, "region"), Zone: text.Draw(t, "zone"), Subzone: text.Draw(t, "subzone")}
			}
			for range rapid.IntRange(0, 5).Draw(t, "hops") {
				g.Hops = append(g.Hops, federation.Hop{
					Host:   rapid.SampledFrom([]string{"10.0.0.1", "10.0.0.2", "fd00::1", "fe80::1%\xff", "gateway.example"}).Draw(t, "host"),
					Port:   rapid.SampledFrom([]uint32{0, 1, 80, 15443, 65535, 65536}).Draw(t, "port"),
					Weight: rapid.SampledFrom([]uint32{0, 1, 2, 300, 1 << 31}).Draw(t, "weight"),
					Mesh:   rapid.Bool().Draw(t, "mesh"),
					Health: rapid.SampledFrom([]federation.Health{"", federation.Ready, federation.NotReady, federation.Terminating}).Draw(t, "health"),
				})
			}
			groups = append(groups, g)
		}
		places, _ := placed(groups)
		message := assignment(name, places, perPod)
		want, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
		if err == nil {
			err = message.ValidateAll()
		}
		if ok := sound(name, places); ok != (err == nil) {
			t.Fatalf("sound: %v, but %v", ok, err)
		}
		if got := appendAssignment(nil, name, places, perPod); err == nil && !bytes.Equal(got, want) {
			t.Fatalf("%v\nby hand  %x\nprotobuf %x", message, got, want)
		}
	})
}

// BenchmarkAssignment is what one endpoint's change costs an assignment.
func BenchmarkAssignment(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		g := federation.Group{}
		for i := range n {
			g.Hops = append(g.Hops, federation.Hop{Host: fmt.Sprintf("10.1.%d.%d", i/250, i%250), Port: 8080, Weight: 1, Mesh: true, Health: federation.Ready})
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				places, _ := placed([]federation.Group{g})
				newResource("outbound|80||pay.shop.svc.cluster.local", EndpointType, appendAssignment(nil, "outbound|80||pay.shop.svc.cluster.local", places, false))
			}
		})
	}
}
