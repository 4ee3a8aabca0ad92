// SPDX-License-Identifier: Apache-2.0

package report

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/api"
)

// Connection says how to reach meshd with the workload's certificate.
type Connection struct {
	// Servers are meshd's; any of them will do.
	Servers servers.List
	// Credentials are mutual TLS; Ready blocks until they have a certificate.
	Credentials credentials.TransportCredentials
	Ready       func(ctx context.Context) error
	// Dial opens connections; nil uses the network as it is.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Log gets breaks; nil discards.
	Log *slog.Logger
}

// keep runs one conversation after another until ctx ends. Each gets a
// connection of its own, with the certificate that is current then.
func (c *Connection) keep(ctx context.Context, what string, talk func(ctx context.Context, client api.WorkloadsClient) error) error {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval = 250 * time.Millisecond
	wait.MaxInterval = 5 * time.Second
	said := ""
	for ctx.Err() == nil {
		began := time.Now()
		err := c.once(ctx, talk)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > 10*time.Second {
			wait.Reset()
			said = ""
		}
		if reason := fmt.Sprint(err); reason != said && c.Log != nil {
			said = reason
			c.Log.Warn("stream to meshd ended, opening it again", "stream", what, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait.NextBackOff()):
		}
	}
	return nil
}

func (c *Connection) once(ctx context.Context, talk func(context.Context, api.WorkloadsClient) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if c.Ready != nil {
		if err := c.Ready(ctx); err != nil {
			return err
		}
	}
	conn, err := c.Servers.Client(c.Dial, grpc.WithTransportCredentials(c.Credentials))
	if err != nil {
		return err
	}
	defer conn.Close()
	return talk(ctx, api.NewWorkloadsClient(conn))
}

// Reporter sends the state of one workload for as long as it lives.
type Reporter struct {
	Connection
	// Checker is whose verdict is sent.
	Checker *Checker
	// Addresses and Ports of the workload.
	Addresses []string
	Ports     []uint32
	// Version of the agent and Platform it runs on.
	Version, Platform string
	// Expires is when the workload's certificate ends, the zero time if there is none;
	// nil tells nothing.
	Expires func() time.Time

	accepted atomic.Bool
}

// errRefused means that meshd does not want this workload's reports.
var errRefused = errors.New("report not accepted")

// Accepted tells whether meshd has stored the last report.
func (r *Reporter) Accepted() bool { return r.accepted.Load() }

// Run reports until ctx ends. At the end it says that the workload leaves.
func (r *Reporter) Run(ctx context.Context) error {
	return r.keep(ctx, "report", r.talk)
}

func (r *Reporter) talk(ctx context.Context, client api.WorkloadsClient) error {
	defer r.accepted.Store(false)
	stream, err := client.Report(ctx)
	if err != nil {
		return err
	}
	intervals := make(chan time.Duration, 1)
	failed := make(chan error, 1)
	go func() { failed <- r.listen(stream, intervals) }()
	interval := 5 * time.Second
	for {
		changed := r.Checker.Changed()
		if err := stream.Send(r.message(r.Checker.State())); err != nil {
			return <-failed // the reason is what Recv returns
		}
		timer := time.NewTimer(interval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case err := <-failed:
			timer.Stop()
			return err
		case interval = <-intervals:
			// Sending at once keeps the rhythm simple; it happens once a stream.
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// listen takes what meshd says; a new interval is handed over once.
func (r *Reporter) listen(stream api.Workloads_ReportClient, intervals chan<- time.Duration) error {
	last := time.Duration(0)
	said := ""
	for {
		ack, err := stream.Recv()
		if err != nil {
			return err
		}
		r.accepted.Store(ack.GetAccepted())
		if !ack.GetAccepted() && ack.GetMessage() != said && r.Log != nil {
			said = ack.GetMessage()
			r.Log.Warn("meshd did not accept the report", "error", fmt.Errorf("%w: %s", errRefused, said))
		}
		interval := time.Duration(ack.GetIntervalSeconds()) * time.Second
		if interval > 0 && interval != last {
			last = interval
			select {
			case intervals <- interval:
			default:
			}
		}
	}
}

func (r *Reporter) message(s State) *api.HealthReport {
	out := &api.HealthReport{
		Healthy:   s.Healthy,
		Message:   s.Message,
		Addresses: r.Addresses,
		Ports:     r.Ports,
		Version:   r.Version,
		Observed:  timestamppb.New(s.Observed),
		Platform:  r.Platform,
	}
	if r.Expires != nil {
		if at := r.Expires(); !at.IsZero() {
			out.CertificateExpires = timestamppb.New(at)
		}
	}
	return out
}
