// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/xds"
)

// probeTimeout bounds one trial of one path; probesAtOnce how many run together.
const (
	probeTimeout = 4 * time.Second
	probesAtOnce = 16
)

// path is a way that is to be tried.
type path struct {
	from    federation.SourceID // empty: meshd itself
	gateway *federation.Gateway
	address federation.GatewayAddress
}

// ProbePaths implements api.AdminServer. From meshd and from every cluster whose
// gateways belong to another network, each address of each gateway is tried by a
// handshake with a workload behind it, as callers do it.
func (s *Server) ProbePaths(ctx context.Context, req *api.ProbePathsRequest) (*api.PathReport, error) {
	about := federation.SourceID("")
	if req.GetCluster() != "" {
		m, err := s.member(req.GetCluster())
		if err != nil {
			return nil, err
		}
		about = m.Source()
	}
	snapshot, _ := s.cfg.Store.Snapshot()
	var mu sync.Mutex
	out := &api.PathReport{}
	group, trying := errgroup.WithContext(ctx)
	group.SetLimit(probesAtOnce)
	for _, p := range pathsOf(snapshot, s.cfg.Store.Members(), about) {
		group.Go(func() error {
			result := s.try(trying, snapshot, p)
			mu.Lock()
			defer mu.Unlock()
			out.Paths = append(out.Paths, result)
			return nil
		})
	}
	err := group.Wait()
	s.completePaths(ctx, out.Paths, req.GetCluster())
	slices.SortFunc(out.Paths, func(a, b *api.Path) int {
		return cmp.Or(cmp.Compare(a.GetFrom(), b.GetFrom()), cmp.Compare(a.GetTo(), b.GetTo()), cmp.Compare(a.GetAddress(), b.GetAddress()))
	})
	return out, err
}

// completePaths asks the replicas that the agents are connected to which are not
// here.
func (s *Server) completePaths(ctx context.Context, paths []*api.Path, cluster string) {
	unknown := slices.ContainsFunc(paths, func(p *api.Path) bool { return p.GetState() == "unknown" })
	if !unknown || s.cfg.Peers == nil || callerOf(ctx).peer() {
		return
	}
	type way struct{ from, to, address string }
	theirs := map[way]*api.Path{}
	for _, p := range s.cfg.Peers.Paths(ctx, cluster) {
		if p.GetState() != "unknown" {
			theirs[way{p.GetFrom(), p.GetTo(), p.GetAddress()}] = p
		}
	}
	for i, p := range paths {
		if t := theirs[way{p.GetFrom(), p.GetTo(), p.GetAddress()}]; p.GetState() == "unknown" && t != nil {
			paths[i] = t
		}
	}
}

// pathsOf lists the paths from and to a source, or all of them.
func pathsOf(snapshot *federation.Snapshot, members map[federation.ClusterID]*registry.Member, about federation.SourceID) []path {
	var out []path
	for network, gateways := range snapshot.Gateways {
		for _, g := range gateways {
			for _, address := range g.Addresses {
				if about == "" || g.Source == about {
					out = append(out, path{"", g, address})
				}
				for _, m := range members {
					concerned := about == "" || g.Source == about || m.Source() == about
					if concerned && m.Network != network && m.Source() != g.Source && hasGateway(snapshot, m.Source()) {
						out = append(out, path{m.Source(), g, address})
					}
				}
			}
		}
	}
	return out
}

// hasGateway tells whether somebody in the source can try a path.
func hasGateway(snapshot *federation.Snapshot, source federation.SourceID) bool {
	for _, gateways := range snapshot.Gateways {
		if slices.ContainsFunc(gateways, func(g *federation.Gateway) bool { return g.Source == source && g.Ready > 0 }) {
			return true
		}
	}
	return false
}

// target is a workload behind a gateway that can complete a handshake.
type target struct {
	service    federation.ServiceName
	sni        string
	identities []string
}

// targetBehind finds one: an exported service with a ready workload of the mesh
// on the gateway's network. The first in order of names, so that repeated trials
// are of the same.
func targetBehind(snapshot *federation.Snapshot, network federation.Network, trustDomain string) (target, bool) {
	best, found := target{}, false
	for name, records := range snapshot.Records {
		if found && name.Compare(best.service) >= 0 {
			continue
		}
		if t, ok := targetIn(snapshot, name, records, network, trustDomain); ok {
			best, found = t, true
		}
	}
	return best, found
}

func targetIn(snapshot *federation.Snapshot, name federation.ServiceName, records []*federation.Record, network federation.Network, trustDomain string) (target, bool) {
	t := target{service: name}
	for _, r := range records {
		if snapshot.LocalOnly(r) || r.Type == federation.ExternalName {
			continue
		}
		for i := range r.Endpoints {
			e := &r.Endpoints[i]
			if !e.Mesh || e.Health != federation.Ready || e.Network != network {
				continue
			}
			for _, p := range r.Ports {
				if _, serves := e.TargetPorts[p.Number]; serves && t.sni == "" {
					t.sni = federation.SNI(p.Number, "", name.Host())
				}
			}
			id := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, name.Namespace, e.ServiceAccount)
			if !slices.Contains(t.identities, id) {
				t.identities = append(t.identities, id)
			}
		}
	}
	return t, t.sni != ""
}

// try tries one path.
func (s *Server) try(ctx context.Context, snapshot *federation.Snapshot, p path) *api.Path {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	out := &api.Path{From: "meshd", To: snapshot.SourceName(p.gateway.Source), Address: hostPort(p.address)}
	req := &api.ProbeRequest{Address: out.Address, Timeout: durationpb.New(probeTimeout)}
	behind, found := targetBehind(snapshot, p.gateway.Network, s.cfg.Authority.Bundle().TrustDomain.Name())
	if found {
		req.Sni, req.Alpn, req.Identities = behind.sni, xds.ALPN, behind.identities
	}
	begun := s.cfg.Clock()
	var result *api.ProbeResult
	var err error
	if p.from == "" {
		result = s.probe(ctx, req)
	} else {
		out.From = snapshot.SourceName(p.from)
		result, err = s.probes.ask(ctx, p.from, req)
	}
	out.Elapsed = durationpb.New(s.cfg.Clock().Sub(begun))
	switch {
	case errors.Is(err, errNoAgent):
		out.State, out.Message = "unknown", err.Error()
	case err != nil:
		out.State, out.Message = "failed", "no answer of the agent: "+err.Error()
	case !result.GetConnected():
		out.State, out.Message = "failed", result.GetMessage()
	case !found:
		out.State, out.Message = "reached", "reached; no workload of the mesh behind it yet to speak mTLS with"
	case !result.GetVerified():
		out.State, out.Message = "failed", fmt.Sprintf("connected, but no mTLS with %s: %s", behind.service, result.GetMessage())
	default:
		out.State, out.Service = "verified", behind.service.String()
	}
	return out
}

// probe is what agents do, done by meshd itself.
func (s *Server) probe(ctx context.Context, req *api.ProbeRequest) *api.ProbeResult {
	out := &api.ProbeResult{}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", req.GetAddress())
	if err != nil {
		out.Message = err.Error()
		return out
	}
	defer conn.Close()
	out.Connected = true
	if req.GetSni() == "" {
		return out
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: req.GetSni(), NextProtos: req.GetAlpn(),
		InsecureSkipVerify: true, // names are identities here, see below
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := s.cfg.Authority.Verify(state.PeerCertificates)
			if err != nil {
				return err
			}
			if out.Peer, out.Serial = id.ID.String(), id.Serial; !slices.Contains(req.GetIdentities(), out.Peer) {
				return fmt.Errorf("the peer is %s, want one of %v", out.Peer, req.GetIdentities())
			}
			return nil
		},
	}
	if s.cfg.Certificate != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return s.cfg.Certificate(), nil
		}
	}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		out.Message = err.Error()
		return out
	}
	out.Verified = true
	return out
}
