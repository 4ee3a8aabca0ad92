// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"testing"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// BenchmarkChange is what one endpoint's change costs from the snapshot to the feed of the
// one proxy that is connected.
func BenchmarkChange(b *testing.B) {
	w := engineWorld{Services: engineServices, Proxies: 1, Classes: 1}
	w.build()
	sidecar := func(r xdsserver.Restraint) xdsserver.Generator { return &xds.Builder{Weigh: r.Weigh, Closed: r.Closed} }
	p := xdsserver.NewPipeline(xdsserver.PipelineConfig{
		Pace: 1, Generators: map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator{federation.Sidecar: sidecar},
	})
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	go func() { _ = p.Run(ctx) }()
	p.Update(w.snapshot)
	feed, err := p.Attach(b.Context(), (&ours{world: w}).peer(0))
	if err != nil {
		b.Fatal(err)
	}
	defer feed.Close()
	<-feed.Changed()
	b.ReportAllocs()
	for b.Loop() {
		p.Update(w.flap(engineService(0)))
		<-feed.Changed()
	}
}
