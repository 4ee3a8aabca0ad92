// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/xds"
)

// probeTimeout bounds one trial of one path, and askTimeout how long an agent that tries one
// is waited for: packets that vanish use up all of the former, and that is to be heard.
// probesAtOnce is how many run together.
const (
	probeTimeout = 4 * time.Second
	askTimeout   = probeTimeout + time.Second
	probesAtOnce = 16
)

// path is a way that is to be tried.
type path struct {
	from    federation.SourceID // empty: meshd itself
	gateway *federation.Gateway
	address federation.GatewayAddress
}

// ProbePaths implements api.AdminServer. From meshd and from every cluster whose
// gateways belong to another network, each address of each gateway is tried by mutual
// TLS through it, as callers do it.
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
			id := spiffeID(trustDomain, name.Namespace, e.ServiceAccount)
			if !slices.Contains(t.identities, id) {
				t.identities = append(t.identities, id)
			}
		}
	}
	return t, t.sni != ""
}

// proxyLabel marks the pods that join installed, see registry/kube.ProxyLabel: behind
// them an agent of ours answers probes.
const proxyLabel = "isthmus-mesh.io/proxy"

// answerers are the SPIFFE IDs that the agents of a gateway may have; none if the pods of
// the gateway are of another making, or not known.
func answerers(snapshot *federation.Snapshot, g *federation.Gateway, trustDomain string) []string {
	var out []string
	for _, w := range snapshot.Workloads {
		if w.Source != g.Source || w.Network != g.Network || w.Role != federation.GatewayRole || w.Labels[proxyLabel] == "" {
			continue
		}
		id := spiffeID(trustDomain, w.Namespace, w.ServiceAccount)
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func spiffeID(trustDomain, namespace, account string) string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, namespace, account)
}

// proof is how one path is to be proven.
type proof struct {
	request *api.ProbeRequest
	// source whose authority must have signed the peer's certificate; empty where a
	// service of several sources may answer.
	source federation.SourceID
	with   string // whom mutual TLS is spoken with, for people; empty: no TLS
	behind string // the service, where that is it
}

// proofOf has the gateway's own agent answer, by the name that is reserved for that. A
// gateway of another making has none: there a workload behind it must do, and if there
// is none, the connection itself.
func (s *Server) proofOf(snapshot *federation.Snapshot, p path) proof {
	trustDomain := s.cfg.Authority.Bundle().TrustDomain.Name()
	out := proof{request: &api.ProbeRequest{Address: hostPort(p.address), Timeout: durationpb.New(probeTimeout)}}
	if ids := answerers(snapshot, p.gateway, trustDomain); len(ids) > 0 {
		out.request.Sni, out.request.Alpn, out.request.Identities, out.request.Answered = api.ProbeName, xds.ALPN, ids, true
		out.source, out.with = p.gateway.Source, "the gateway"
		return out
	}
	if behind, found := targetBehind(snapshot, p.gateway.Network, trustDomain); found {
		out.request.Sni, out.request.Alpn, out.request.Identities = behind.sni, xds.ALPN, behind.identities
		out.behind, out.with = behind.service.String(), behind.service.String()
	}
	return out
}

// try tries one path.
func (s *Server) try(ctx context.Context, snapshot *federation.Snapshot, p path) *api.Path {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	out := &api.Path{From: "meshd", To: snapshot.SourceName(p.gateway.Source), Address: hostPort(p.address)}
	how := s.proofOf(snapshot, p)
	var result *api.ProbeResult
	var err error
	if p.from == "" {
		result = s.probe(ctx, how.request)
	} else {
		out.From = snapshot.SourceName(p.from)
		result, err = s.probes.ask(ctx, p.from, how.request)
	}
	out.Elapsed = result.GetElapsed()
	switch {
	case errors.Is(err, errNoAgent):
		out.State, out.Message = "unknown", fmt.Sprintf("no agent of a gateway of %s is connected to meshd, so nobody could try it from there", out.From)
		return out
	case err != nil:
		out.State, out.Message = "unknown", fmt.Sprintf("the agent of a gateway of %s does not answer meshd: %v", out.From, err)
		return out
	case !result.GetConnected():
		out.State, out.Message = "failed", result.GetMessage()
		return out
	case how.with == "":
		out.State, out.Message = "reached", "reached; the gateway is not one that mesh join installed, and no workload of the mesh is behind it yet to speak mTLS with"
		return out
	}
	if err := s.proven(result, how); err != nil {
		out.State, out.Message = "failed", fmt.Sprintf("connected, but no mTLS with %s: %v", how.with, err)
		return out
	}
	out.State, out.Service, out.Peer = "verified", how.behind, result.GetPeer()
	return out
}

// proven tells whether a probe has ended where it was to. The certificates are looked at
// here, whoever probed: only the authority knows which source's intermediate signed them.
func (s *Server) proven(result *api.ProbeResult, how proof) error {
	if !result.GetVerified() {
		return errors.New(result.GetMessage())
	}
	var chain []*x509.Certificate
	for _, der := range result.GetChain() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("the peer's certificate: %w", err)
		}
		chain = append(chain, c)
	}
	id, err := s.cfg.Authority.Verify(chain)
	switch {
	case err != nil:
		return err
	case !slices.Contains(how.request.GetIdentities(), id.ID.String()):
		return fmt.Errorf("the peer is %s, want one of %v", id.ID, how.request.GetIdentities())
	case how.source != "" && id.Source != ca.Source(how.source):
		return fmt.Errorf("the peer's certificate is of %s, not of %s: the address leads to another gateway", id.Source, how.source)
	}
	return nil
}

// probe is what agents do, done by meshd itself.
func (s *Server) probe(ctx context.Context, req *api.ProbeRequest) *api.ProbeResult {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	out := &api.ProbeResult{}
	begun := s.cfg.Clock()
	if err := s.connect(ctx, req, out); err != nil {
		out.Message = err.Error()
	}
	out.Elapsed = durationpb.New(s.cfg.Clock().Sub(begun))
	return out
}

func (s *Server) connect(ctx context.Context, req *api.ProbeRequest, out *api.ProbeResult) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", req.GetAddress())
	if err != nil {
		return err
	}
	defer conn.Close()
	out.Connected = true
	if req.GetSni() == "" {
		return nil
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: req.GetSni(), NextProtos: req.GetAlpn(),
		InsecureSkipVerify: true, // names are identities here, see proven
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := s.cfg.Authority.Verify(state.PeerCertificates)
			if err == nil {
				out.Peer, out.Serial = id.ID.String(), id.Serial
			}
			return err
		},
	}
	if s.cfg.Certificate != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return s.cfg.Certificate(), nil
		}
	}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		return err
	}
	for _, c := range secure.ConnectionState().PeerCertificates {
		out.Chain = append(out.Chain, c.Raw)
	}
	if req.GetAnswered() {
		if deadline, ok := ctx.Deadline(); ok {
			if err := conn.SetReadDeadline(deadline); err != nil {
				return err
			}
		}
		if err := s.expectAnswer(secure); err != nil {
			return err
		}
	}
	out.Verified = true
	return nil
}

// maxAnswer bounds the line in which a gateway's agent says whom it saw.
const maxAnswer = 2049

// expectAnswer reads whom the other end saw, which must be meshd.
func (s *Server) expectAnswer(conn io.Reader) error {
	line, err := bufio.NewReader(io.LimitReader(conn, maxAnswer)).ReadString('\n')
	if err != nil {
		return fmt.Errorf("the peer does not say whom it saw: %w", err)
	}
	own := spiffeID(s.cfg.Authority.Bundle().TrustDomain.Name(), ca.ControlNamespace, ca.ControlAccount)
	if seen := strings.TrimSuffix(line, "\n"); seen != own {
		return fmt.Errorf("the peer saw %.200q, want %s", seen, own)
	}
	return nil
}
