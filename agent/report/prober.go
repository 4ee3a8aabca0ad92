// SPDX-License-Identifier: Apache-2.0

package report

import (
	"context"
	"crypto/tls"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
)

// longestProbe bounds what meshd may ask for.
const longestProbe = 30 * time.Second

// concurrentProbes bounds how many connections meshd can make us open at once.
const concurrentProbes = 16

// Prober answers meshd's requests to try a connection from here.
type Prober struct {
	Connection
	// TLS returns a client configuration with the workload's certificate and
	// the mesh's roots.
	TLS func() (*tls.Config, error)
}

// Run offers the service until ctx ends.
func (p *Prober) Run(ctx context.Context) error {
	return p.keep(ctx, "probe", p.talk)
}

func (p *Prober) talk(ctx context.Context, client api.WorkloadsClient) error {
	stream, err := client.Probe(ctx)
	if err != nil {
		return err
	}
	var sending sync.Mutex
	send := func(result *api.ProbeResult) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(result)
	}
	if err := send(&api.ProbeResult{}); err != nil {
		_, err = stream.Recv()
		return err
	}
	slots := make(chan struct{}, concurrentProbes)
	var probing sync.WaitGroup
	defer probing.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		request, err := stream.Recv()
		if err != nil {
			return err
		}
		slots <- struct{}{}
		probing.Go(func() {
			defer func() { <-slots }()
			_ = send(p.try(ctx, request)) // a broken stream shows in Recv
		})
	}
}

// try makes one connection and closes it.
func (p *Prober) try(ctx context.Context, request *api.ProbeRequest) *api.ProbeResult {
	timeout := request.GetTimeout().AsDuration()
	if timeout <= 0 || timeout > longestProbe {
		timeout = 5 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	began := time.Now()
	result := &api.ProbeResult{Id: request.GetId()}
	if err := p.connect(ctx, request, result); err != nil {
		result.Message = err.Error()
	}
	result.Elapsed = durationpb.New(time.Since(began))
	return result
}

func (p *Prober) connect(ctx context.Context, request *api.ProbeRequest, result *api.ProbeResult) error {
	conn, err := p.Dial(ctx, request.GetAddress())
	if err != nil {
		return err
	}
	defer conn.Close()
	result.Connected = true
	if request.GetSni() == "" {
		return nil
	}
	config, err := p.TLS()
	if err != nil {
		return err
	}
	config = verifying(config, request)
	secured := tls.Client(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return err
	}
	chain := secured.ConnectionState().PeerCertificates
	result.Serial = chain[0].SerialNumber.Text(16)
	if len(chain[0].URIs) > 0 {
		result.Peer = chain[0].URIs[0].String()
	}
	for _, c := range chain {
		result.Chain = append(result.Chain, c.Raw)
	}
	if request.GetAnswered() {
		if deadline, ok := ctx.Deadline(); ok {
			if err := conn.SetReadDeadline(deadline); err != nil {
				return err
			}
		}
		if err := expectAnswer(secured, config); err != nil {
			return err
		}
	}
	result.Verified = true
	return nil
}
