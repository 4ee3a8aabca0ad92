// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/federation"
)

func TestStalePolicy(t *testing.T) {
	t.Parallel()
	source := KubeSource("west")
	tests := []struct {
		story string
		f     Freshness
		want  Standing
		next  time.Duration // 0: never
	}{
		{"a beacon is late", Freshness{Age: time.Minute}, Fresh, 4 * time.Minute},
		{"the API server is away", Freshness{Age: 5 * time.Minute}, Demoted, 0},
		{"for a week: its workloads may be well", Freshness{Age: 7 * 24 * time.Hour}, Demoted, 0},
		{"the gateways too", Freshness{Age: 5 * time.Minute, GatewaysDown: true}, Demoted, 10 * time.Minute},
		{"for long", Freshness{Age: 15 * time.Minute, GatewaysDown: true}, Drained, 0},
		{"only the gateways: their clients judge them", Freshness{GatewaysDown: true}, Fresh, 5 * time.Minute},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			sources := map[SourceID]Freshness{source: tt.f}
			if got := (StalePolicy{}).Judge(sources)[source]; got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
			if got, ok := (StalePolicy{}).Next(sources); got != tt.next || ok != (tt.next > 0) {
				t.Errorf("next in %s, %t, want %s", got, ok, tt.next)
			}
		})
	}
}
