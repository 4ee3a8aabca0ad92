// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"flag"
	"fmt"
	"net/netip"
	"testing"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdstest"
)

var update = flag.Bool("update", false, "write what encodings are compared with")

// TestGoldenEncodings holds the bytes of sidecars' resources to those of the last version.
func TestGoldenEncodings(t *testing.T) {
	t.Parallel()
	w := newWorld()
	every := []federation.Port{
		{Number: 80, Name: "http", Protocol: federation.HTTP}, {Number: 81, Name: "grpc", Protocol: federation.GRPC},
		{Number: 82, Protocol: federation.Unknown}, {Number: 83, Name: "tcp", Protocol: federation.TCP}, {Number: 443, Name: "tls", Protocol: federation.TLS},
	}
	w.add("east", "pay", every, "10.1.0.2", "10.1.0.3!", "10.1.0.4~")
	w.add("west", "pay", every, "10.2.0.2", "10.2.0.3")
	w.add("east", "cart", http80, "10.1.0.5")
	w.add("west", "far", http80, "10.2.0.6")
	w.add("east", "none", http80)
	for i, cluster := range []string{"east", "west"} {
		db := w.add(cluster, "db", []federation.Port{{Number: 5432, Protocol: federation.TCP}}, fmt.Sprintf("10.%d.0.9", i+1))
		db.Type, db.ClusterIPs, db.Endpoints[0].Hostname = federation.Headless, nil, "db-0"
	}
	w.object("DestinationRule", "cart", `{"host":"cart","trafficPolicy":{"loadBalancer":{"consistentHash":{"httpHeaderName":"x-user"}},
		"outlierDetection":{"consecutive5xxErrors":7}},"subsets":[{"name":"v1","labels":{"n":"0"}}]}`)
	w.object("VirtualService", "cart", `{"hosts":["cart"],"http":[
		{"match":[{"uri":{"prefix":"/beta"},"headers":{"x-b":{"regex":"1|2"},"x-a":{"exact":"1"}}}],"rewrite":{"uri":"/"},"route":[{"destination":{"host":"pay"}}],"timeout":"3s"},
		{"route":[{"destination":{"host":"cart","subset":"v1"},"weight":90},{"destination":{"host":"cart"},"weight":10}]}]}`)
	w.object("PeerAuthentication", "default", `{"mtls":{"mode":"STRICT"}}`)
	all := map[string]xds.Resources{}
	machine := client
	machine.Cluster, machine.Role = "", federation.VMRole
	both := client
	both.Addresses = []netip.Addr{netip.MustParseAddr("10.1.0.9"), netip.MustParseAddr("fd00::9")}
	for whose, p := range map[string]xds.Proxy{"a sidecar": client, "a machine": machine, "a sidecar with both families": both} {
		r, findings := w.build(t, p)
		if len(findings) > 0 {
			t.Errorf("%s: %v", whose, findings)
		}
		all[whose] = r
	}
	xdstest.Golden(t, "testdata/encodings.txt", *update, all)
}
