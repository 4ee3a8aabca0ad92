// SPDX-License-Identifier: Apache-2.0

package gateways_test

import (
	"flag"
	"testing"

	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/gateways"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdstest"
)

var update = flag.Bool("update", false, "write what encodings are compared with")

// TestGoldenEncodings holds the bytes of gateways' resources to those of the last version.
func TestGoldenEncodings(t *testing.T) {
	t.Parallel()
	s := snapshot(
		recordIn("east", "shop", "pay", endpointAt("10.1.0.2", "n1")),
		recordIn("west", "shop", "pay", endpointAt("10.2.0.2", "n2"), endpointAt("10.2.0.3", "n2")),
		recordIn("west", "shop", "cart", endpointAt("10.2.0.4", "n2")),
	)
	r, findings := gateways.Build(s.View(gateway.Scope()), config.New(s), gateway)
	if len(findings) > 0 {
		t.Errorf("%v", findings)
	}
	xdstest.Golden(t, "testdata/encodings.txt", *update, map[string]xds.Resources{"a gateway": r})
}
