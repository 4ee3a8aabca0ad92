// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/xds"
)

// DescribeDeparture implements api.AdminServer.
func (s *Server) DescribeDeparture(ctx context.Context, req *api.DescribeDepartureRequest) (*api.Departure, error) {
	cluster, err := s.GetCluster(ctx, &api.GetClusterRequest{Name: req.GetName()})
	if err != nil {
		return nil, err
	}
	source := federation.KubeSource(federation.ClusterID(cluster.GetMetadata().GetUid()))
	snapshot, _ := s.cfg.Store.Snapshot()
	out := &api.Departure{Cluster: cluster}
	for name, records := range snapshot.Records {
		only := len(records) > 0 && !slices.ContainsFunc(records, func(r *federation.Record) bool {
			return r.Source != source || r.ClusterLocal || r.Type == federation.ExternalName
		})
		if only {
			out.OnlyHere = append(out.OnlyHere, name.String())
		}
	}
	slices.Sort(out.OnlyHere)
	clusters := map[string]bool{}
	for _, p := range s.proxies(ctx) {
		if p.GetCluster() != cluster.GetMetadata().GetName() {
			out.Callers++
			clusters[p.GetCluster()] = true
		}
	}
	out.CallerClusters = int32(len(clusters))
	return out, nil
}

// RemoveCluster implements api.AdminServer.
func (s *Server) RemoveCluster(req *api.RemoveClusterRequest, stream grpc.ServerStreamingServer[api.Progress]) error {
	ctx := stream.Context()
	m, err := s.member(req.GetName())
	if err != nil {
		return err
	}
	verb := "remove-cluster"
	if req.GetForce() {
		verb = "force-remove-cluster"
	}
	if err := s.record(ctx, verb, m.Name, ca.Source(m.Source())); err != nil {
		return err
	}
	d := &departure{Server: s, m: m, send: stream.Send, timeout: 30 * time.Second}
	if req.GetDrainTimeout() != nil {
		d.timeout = req.GetDrainTimeout().AsDuration()
	}
	if !req.GetForce() {
		if err := d.withdraw(ctx); err != nil {
			return explain(err)
		}
		if err := d.drain(ctx); err != nil {
			return explain(err)
		}
	}
	return explain(d.remove(ctx))
}

// departure is a cluster on its way out.
type departure struct {
	*Server
	m       *registry.Member
	send    func(*api.Progress) error
	timeout time.Duration
	begun   time.Time
}

func (d *departure) tell(step, state, format string, args ...any) error {
	if state == "running" {
		d.begun = d.cfg.Clock()
	}
	return d.send(&api.Progress{
		Step: step, State: state, Message: fmt.Sprintf(format, args...), Elapsed: durationpb.New(d.cfg.Clock().Sub(d.begun)),
	})
}

// withdraw takes the cluster's endpoints out of the views of the others, and
// waits until their proxies have confirmed that.
func (d *departure) withdraw(ctx context.Context) error {
	if err := d.tell("withdraw", "running", "moving callers away from %s", d.m.Name); err != nil {
		return err
	}
	err := d.cfg.Store.UpdateMember(ctx, d.m.ID, func(m *registry.Member) error {
		m.Draining = true
		return nil
	})
	if err != nil {
		return err
	}
	deadline := d.cfg.Clock().Add(d.timeout)
	// The first look is not the last word: the change has to travel first.
	if err := wait(ctx, settle); err != nil {
		return err
	}
	for {
		behind, others := 0, 0
		for _, p := range d.proxies(ctx) {
			if p.GetCluster() == d.m.Name {
				continue
			}
			others++
			if !p.GetSynced() {
				behind++
			}
		}
		if behind == 0 {
			if others == 0 {
				return d.tell("withdraw", "done", "endpoints withdrawn (no proxy of another cluster is connected)")
			}
			return d.tell("withdraw", "done", "callers moved (%s of other clusters)", plural(others, "proxy", "proxies"))
		}
		if !d.cfg.Clock().Before(deadline) {
			return d.tell("withdraw", "warning", "%d of %s of other clusters not confirmed in %s", behind, plural(others, "proxy", "proxies"), d.timeout)
		}
		if err := wait(ctx, settle/4); err != nil {
			return err
		}
	}
}

// settle is how long a change may take from the store to the proxies of an idle
// system, with room.
const settle = time.Second

// drain lets connections that are under way end.
func (d *departure) drain(ctx context.Context) error {
	pause := min(d.cfg.DrainPause, d.timeout)
	others := slices.ContainsFunc(d.proxies(ctx), func(p *api.Proxy) bool { return p.GetCluster() != d.m.Name })
	if !others {
		return nil
	}
	if err := d.tell("drain", "running", "letting connections end, %s", pause); err != nil {
		return err
	}
	if err := wait(ctx, pause); err != nil {
		return err
	}
	return d.tell("drain", "done", "connections had %s to end", pause)
}

// remove ends the membership: identities first, then the registry, and the streams
// at last, so that nothing of the cluster comes back.
func (d *departure) remove(ctx context.Context) error {
	if err := d.tell("remove", "running", "removing %s", d.m.Name); err != nil {
		return err
	}
	snapshot, _ := d.cfg.Store.Snapshot()
	t := tallies(snapshot)[d.m.Source()]
	streams := 0
	for _, p := range d.proxies(ctx) {
		if p.GetCluster() == d.m.Name {
			streams++
		}
	}
	// While it is still a member, so that the command can be run again if this fails.
	if err := d.cfg.Authority.Revoke(ctx, ca.Source(d.m.Source()), "", "cluster "+d.m.Name+" has left"); err != nil {
		return fmt.Errorf("nothing is removed, since its identities could not be revoked; run the command again: %w", err)
	}
	if err := d.cfg.Store.Leave(ctx, d.m.ID); err != nil && !errors.Is(err, registry.ErrNotFound) {
		return err
	}
	err := d.tell("remove", "done", "removed from the registry: %s, %s",
		plural(int(t.services), "service", "services"), plural(int(t.endpoints), "endpoint", "endpoints"))
	if err != nil {
		return err
	}
	if err := d.tell("revoke", "running", "revoking the identities of %s", d.m.Name); err != nil {
		return err
	}
	// Every replica ends its streams as soon as it hears of the revocation, this one too.
	d.disconnect(d.m.Source(), "")
	return d.tell("revoke", "done", "identities revoked, %s closed", plural(streams, "stream", "streams"))
}

// streams counts the open streams of an instance at this replica.
func (s *Server) streams(source federation.SourceID, instance string) int {
	if s.cfg.Proxies == nil {
		return 0
	}
	n := 0
	for _, p := range s.cfg.Proxies.Proxies() {
		if p.Proxy.Workload.Source == source && p.Proxy.Workload.UID == instance {
			n++
		}
	}
	return n
}

// disconnect ends streams at this replica at once. The others see the revocation
// and do the same.
func (s *Server) disconnect(source federation.SourceID, instance string) {
	if s.cfg.Proxies == nil {
		return
	}
	s.cfg.Proxies.Disconnect(func(p xds.Proxy) bool {
		return p.Workload.Source == source && (instance == "" || p.Workload.UID == instance)
	})
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprint(n, " ", many)
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
