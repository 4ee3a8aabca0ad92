// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
)

// errNoAgent means that no agent of a gateway of that source is connected here. Another
// replica may have one.
var errNoAgent = errors.New("no agent of a gateway there is connected to this replica of meshd")

// probeHub lends the connected agents of gateways to whoever wants to try a path
// from where they are.
type probeHub struct {
	mu     sync.Mutex
	agents map[*probeAgent]bool
	last   uint64 // request ID
}

// probeAgent is the open stream of one agent.
type probeAgent struct {
	workload federation.WorkloadKey
	network  federation.Network
	requests chan *api.ProbeRequest
	gone     chan struct{}

	mu      sync.Mutex
	waiting map[uint64]chan *api.ProbeResult
}

func newProbeHub() *probeHub { return &probeHub{agents: map[*probeAgent]bool{}} }

func (h *probeHub) join(workload federation.WorkloadKey, network federation.Network) *probeAgent {
	a := &probeAgent{
		workload: workload, network: network, requests: make(chan *api.ProbeRequest),
		gone: make(chan struct{}), waiting: map[uint64]chan *api.ProbeResult{},
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.agents[a] = true
	return a
}

func (h *probeHub) leave(a *probeAgent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.agents, a)
	close(a.gone)
}

// agentOf is an agent of a gateway of the source; nil if there is none.
func (h *probeHub) agentOf(source federation.SourceID) *probeAgent {
	h.mu.Lock()
	defer h.mu.Unlock()
	for a := range h.agents {
		if a.workload.Source == source {
			return a
		}
	}
	return nil
}

// ask has an agent of the source try a path.
func (h *probeHub) ask(ctx context.Context, source federation.SourceID, req *api.ProbeRequest) (*api.ProbeResult, error) {
	a := h.agentOf(source)
	if a == nil {
		return nil, errNoAgent
	}
	h.mu.Lock()
	h.last++
	req.Id = h.last
	h.mu.Unlock()
	if deadline, ok := ctx.Deadline(); ok {
		req.Timeout = durationpb.New(min(probeTimeout, time.Until(deadline)))
	}
	return a.ask(ctx, req)
}

func (a *probeAgent) ask(ctx context.Context, req *api.ProbeRequest) (*api.ProbeResult, error) {
	result := make(chan *api.ProbeResult, 1)
	a.mu.Lock()
	a.waiting[req.GetId()] = result
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		delete(a.waiting, req.GetId())
		a.mu.Unlock()
	}()
	select {
	case a.requests <- req:
	case <-a.gone:
		return nil, errNoAgent
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case r := <-result:
		return r, nil
	case <-a.gone:
		return nil, errNoAgent
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// answer hands a result to who waits for it; one that nobody waits for is from
// before, or made up.
func (a *probeAgent) answer(r *api.ProbeResult) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if result, ok := a.waiting[r.GetId()]; ok {
		delete(a.waiting, r.GetId())
		result <- r
	}
}
