// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca/attest"
	"github.com/isthmus-mesh/isthmus/ca/caserver"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// reportInterval is how often agents are asked to report; after three of them in
// silence a machine is lost.
const reportInterval = 5 * time.Second

// workloads answers agents, on the port of ADS.
type workloads struct {
	api.UnimplementedWorkloadsServer
	server *Server
}

var _ api.WorkloadsServer = (*workloads)(nil)

// authenticate takes certificates only: reports and probes come after the first
// certificate.
func (w *workloads) authenticate(ctx context.Context) (attest.Identity, error) {
	evidence, err := caserver.Evidence(ctx)
	if err == nil && evidence.Bearer != "" {
		err = errors.New("a token opens nothing here, show the certificate")
	}
	var id attest.Identity
	if err == nil {
		id, err = w.server.cfg.Authenticator.Authenticate(ctx, evidence)
	}
	if err == nil && id.Certificate == nil {
		err = errors.New("no client certificate")
	}
	if err != nil {
		return id, api.Problem{Status: codes.Unauthenticated, Message: err.Error()}
	}
	return id, nil
}

// refused reports why a stream must end; nil if it may go on.
func (w *workloads) refused(id attest.Identity) error {
	if err := w.server.cfg.Authority.RevokedIdentity(*id.Certificate); err != nil {
		return api.Problem{Status: codes.PermissionDenied, Message: err.Error()}
	}
	return nil
}

// received is one message of a stream, or its end.
type received[M any] struct {
	message *M
	err     error
}

// receive hands on what a stream receives until it ends.
func receive[M any](ctx context.Context, recv func() (*M, error)) <-chan received[M] {
	out := make(chan received[M])
	go func() {
		for {
			m, err := recv()
			select {
			case out <- received[M]{m, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return out
}

// Report implements api.WorkloadsServer.
func (w *workloads) Report(stream grpc.BidiStreamingServer[api.HealthReport, api.HealthAck]) error {
	ctx := stream.Context()
	id, err := w.authenticate(ctx)
	if err != nil {
		return err
	}
	network, ok := id.Source.Network()
	if !ok {
		return api.Problem{Status: codes.PermissionDenied, Message: fmt.Sprintf("%s is no virtual machine", id.Source)}
	}
	name := registry.VMName{Network: federation.Network(network), Name: id.Instance}
	defer w.lose(name)
	silence := time.NewTimer(3 * reportInterval)
	defer silence.Stop()
	messages := receive(ctx, stream.Recv)
	for {
		// The channel comes first, then the look: see ca.Authority.Changed.
		changed := w.server.cfg.Authority.Changed()
		if err := w.refused(id); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-silence.C:
			return api.Problem{Status: codes.DeadlineExceeded, Message: fmt.Sprintf("no report for %s", 3*reportInterval)}
		case r := <-messages:
			if errors.Is(r.err, io.EOF) {
				return nil
			}
			if r.err != nil {
				return r.err
			}
			silence.Reset(3 * reportInterval)
			if err := stream.Send(w.store(ctx, name, id, r.message)); err != nil {
				return err
			}
		}
	}
}

// store keeps a report, and says in the answer what was wrong with it.
func (w *workloads) store(ctx context.Context, name registry.VMName, id attest.Identity, report *api.HealthReport) *api.HealthAck {
	ack := &api.HealthAck{IntervalSeconds: uint32(reportInterval / time.Second)}
	err := w.admissible(name, id)
	var health registry.VMHealth
	if err == nil {
		health, err = healthIn(report)
	}
	if err == nil {
		health.Since = w.since(name, health.Healthy)
		ctx, cancel := context.WithTimeout(ctx, reportInterval)
		defer cancel()
		_, err = w.server.cfg.Store.ReportVM(ctx, name, health)
	}
	if err != nil {
		ack.Message = err.Error()
		return ack
	}
	ack.Accepted = true
	return ack
}

// admissible tells whether the machine is still what its certificate says.
func (w *workloads) admissible(name registry.VMName, id attest.Identity) error {
	vm := w.server.cfg.Store.VMs()[name]
	if vm == nil {
		return fmt.Errorf("virtual machine %s is not registered: mesh vm onboard %s", name, name.Name)
	}
	if vm.Service.Namespace != id.Namespace || vm.ServiceAccount != id.ServiceAccount {
		return fmt.Errorf("virtual machine %s is registered as %s/%s, but its certificate is that of %s/%s: onboard it again",
			name, vm.Service.Namespace, vm.ServiceAccount, id.Namespace, id.ServiceAccount)
	}
	return nil
}

// since is when the health last changed.
func (w *workloads) since(name registry.VMName, healthy bool) time.Time {
	if vm := w.server.cfg.Store.VMs()[name]; vm != nil && vm.Health != nil && vm.Health.Healthy == healthy {
		return vm.Health.Since
	}
	return w.server.cfg.Clock().UTC()
}

// lose ends the presence of a machine whose stream ended.
func (w *workloads) lose(name registry.VMName) {
	ctx, cancel := context.WithTimeout(context.Background(), reportInterval)
	defer cancel()
	if err := w.server.cfg.Store.LoseVM(ctx, name); err != nil && !errors.Is(err, registry.ErrNotFound) {
		w.server.cfg.Log.Warn("loss of a virtual machine not stored", "vm", name.String(), "error", err)
	}
}

// maxReported bounds what an agent can have stored.
const (
	maxReportedText      = 256
	maxReportedAddresses = 8
)

// healthIn checks a report. Addresses that lead nowhere for others are left out.
func healthIn(r *api.HealthReport) (registry.VMHealth, error) {
	h := registry.VMHealth{
		Healthy: r.GetHealthy(), Message: cut(r.GetMessage()), Version: cut(r.GetVersion()), Platform: cut(r.GetPlatform()),
	}
	if r.GetCertificateExpires() != nil {
		h.CertificateExpires = r.GetCertificateExpires().AsTime()
	}
	for _, text := range r.GetAddresses() {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return h, fmt.Errorf("address %.64q is no IP address", text)
		}
		a = a.Unmap().WithZone("")
		if a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() || slices.Contains(h.Addresses, a) {
			continue
		}
		if h.Addresses = append(h.Addresses, a); len(h.Addresses) > maxReportedAddresses {
			return h, fmt.Errorf("more than %d addresses", maxReportedAddresses)
		}
	}
	if len(h.Addresses) == 0 {
		return h, errors.New("no address that others can reach")
	}
	return h, nil
}

func cut(text string) string {
	if len(text) > maxReportedText {
		return text[:maxReportedText]
	}
	return text
}

// Probe implements api.WorkloadsServer.
func (w *workloads) Probe(stream grpc.BidiStreamingServer[api.ProbeResult, api.ProbeRequest]) error {
	ctx := stream.Context()
	id, err := w.authenticate(ctx)
	if err != nil {
		return err
	}
	key := federation.WorkloadKey{Source: federation.SourceID(id.Source), UID: id.Instance}
	snapshot, _ := w.server.cfg.Store.Snapshot()
	workload := snapshot.Workloads[key]
	if workload == nil {
		return api.Problem{Status: codes.Unavailable, Message: "the workload is not in the registry yet; try again"}
	}
	if workload.Role != federation.GatewayRole {
		return api.Problem{Status: codes.PermissionDenied, Message: fmt.Sprintf("%s/%s is no gateway", workload.Namespace, workload.Name)}
	}
	agent := w.server.probes.join(key, workload.Network)
	defer w.server.probes.leave(agent)
	messages := receive(ctx, stream.Recv)
	for {
		changed := w.server.cfg.Authority.Changed()
		if err := w.refused(id); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case request := <-agent.requests:
			if err := stream.Send(request); err != nil {
				return err
			}
		case r := <-messages:
			if errors.Is(r.err, io.EOF) {
				return nil
			}
			if r.err != nil {
				return r.err
			}
			agent.answer(r.message)
		}
	}
}
