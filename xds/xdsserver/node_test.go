// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/xds"
)

// A proxy says what it is when it opens the stream, and its agent says when it has renewed
// the certificate; that asks for nothing, and nothing is answered.
func TestAProxySaysWhatItIs(t *testing.T) {
	t.Parallel()
	b := newBench(t, "L a=1")
	c := b.delta()
	metadata := func(fields map[string]any) *structpb.Struct {
		s, err := structpb.NewStruct(fields)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	c.first = false
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, Node: &corev3.Node{
		Id: "n", Metadata: metadata(map[string]any{"ISTHMUS_VERSION": "v1.2.3", "LABELS": map[string]any{"app": "x"}}),
		UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{UserAgentBuildVersion: &corev3.BuildVersion{
			Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: 40, Patch: 2},
		}},
	}})
	c.wantAcked("L a=1")
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, Node: &corev3.Node{
		Metadata: metadata(map[string]any{"ISTHMUS_CERTIFICATE_EXPIRES": "2026-01-02T03:04:05Z"}),
	}})
	c.silent()
	list := b.server.Proxies()
	if len(list) != 1 {
		t.Fatalf("%d proxies", len(list))
	}
	p := list[0]
	if p.Node != "n" || p.AgentVersion != "v1.2.3" || p.EnvoyVersion != "1.40.2" || !p.CertificateExpires.Equal(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)) {
		t.Errorf("%q: agent %q, envoy %q, certificate until %v", p.Node, p.AgentVersion, p.EnvoyVersion, p.CertificateExpires)
	}
}

func TestIstiosAgentSaysItsVersion(t *testing.T) {
	t.Parallel()
	b := newBench(t, "L a=1")
	c := b.delta()
	c.first = false
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, Node: &corev3.Node{Id: "n", Metadata: &structpb.Struct{
		Fields: map[string]*structpb.Value{"ISTIO_VERSION": structpb.NewStringValue("1.31.0")},
	}}})
	c.wantAcked("L a=1")
	if p := b.server.Proxies()[0]; p.AgentVersion != "istio 1.31.0" || p.EnvoyVersion != "" || !p.CertificateExpires.IsZero() {
		t.Errorf("%+v", p)
	}
}
