// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"maps"
	"net"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// ListClusters implements api.AdminServer.
func (s *Server) ListClusters(ctx context.Context, _ *api.ListClustersRequest) (*api.ClusterList, error) {
	return &api.ClusterList{ApiVersion: api.Version, Kind: "ClusterList", Items: s.clusters(ctx)}, nil
}

// GetCluster implements api.AdminServer.
func (s *Server) GetCluster(ctx context.Context, req *api.GetClusterRequest) (*api.Cluster, error) {
	m, err := s.member(req.GetName())
	if err != nil {
		return nil, err
	}
	for _, c := range s.clusters(ctx) {
		if c.GetMetadata().GetUid() == string(m.ID) {
			return c, nil
		}
	}
	return nil, unknown("cluster", req.GetName(), nil, "mesh clusters") // it left meanwhile
}

// member finds a member by name or UID.
func (s *Server) member(name string) (*registry.Member, error) {
	members := s.cfg.Store.Members()
	if m, ok := members[federation.ClusterID(name)]; ok {
		return m, nil
	}
	var names []string
	for _, m := range members {
		if m.Name == name {
			return m, nil
		}
		names = append(names, m.Name)
	}
	if name == "" {
		return nil, invalid("the name of the cluster is missing")
	}
	return nil, unknown("cluster", name, names, "mesh clusters")
}

// tally counts what one source has.
type tally struct{ services, endpoints int32 }

func tallies(snapshot *federation.Snapshot) map[federation.SourceID]tally {
	out := map[federation.SourceID]tally{}
	for _, records := range snapshot.Records {
		for _, r := range records {
			t := out[r.Source]
			t.services++
			t.endpoints += int32(len(r.Endpoints))
			out[r.Source] = t
		}
	}
	return out
}

// clusters describes all members, ordered by name. What this replica does not
// sync itself, it asks the others for.
func (s *Server) clusters(ctx context.Context) []*api.Cluster {
	snapshot, _ := s.cfg.Store.Snapshot()
	counts := tallies(snapshot)
	states := s.sourceStates()
	proxies := map[string]int32{}
	for _, p := range s.proxies(ctx) {
		proxies[p.GetCluster()]++
	}
	var out []*api.Cluster
	elsewhere := false
	for _, m := range s.cfg.Store.Members() {
		state, mine := states[m.Source()]
		elsewhere = elsewhere || !state.Holding
		c := s.describe(m, state, mine, snapshot)
		t := counts[m.Source()]
		c.Status.Services, c.Status.Endpoints = t.services, t.endpoints
		c.Status.Proxies = proxies[m.Name]
		if s.cfg.Standing != nil {
			c.Status.Standing = s.cfg.Standing(m.Source()).String()
		}
		out = append(out, c)
	}
	if elsewhere {
		s.completeFromPeers(ctx, out)
	}
	slices.SortFunc(out, func(a, b *api.Cluster) int { return cmp.Compare(a.GetMetadata().GetName(), b.GetMetadata().GetName()) })
	return out
}

// sourceStates are the sources that this replica looks at: those it syncs, and while the
// store is away all others too.
func (s *Server) sourceStates() map[federation.SourceID]registry.SourceState {
	out := map[federation.SourceID]registry.SourceState{}
	if s.cfg.Sources == nil {
		return out
	}
	for _, state := range s.cfg.Sources.Sources() {
		if state.Holding || state.Watching {
			out[state.Source] = state
		}
	}
	return out
}

// completeFromPeers fills in what lives only in the memory of the replica that
// syncs a cluster.
func (s *Server) completeFromPeers(ctx context.Context, clusters []*api.Cluster) {
	if s.cfg.Peers == nil || callerOf(ctx).peer() {
		return
	}
	theirs := map[string]*api.Cluster{}
	for _, c := range s.cfg.Peers.Clusters(ctx) {
		if c.GetStatus().GetSyncedBy() != "" {
			theirs[c.GetMetadata().GetUid()] = c
		}
	}
	for _, c := range clusters {
		if t := theirs[c.GetMetadata().GetUid()]; t != nil && c.GetStatus().GetSyncedBy() == "" {
			own := c.Status
			c.Status = t.Status
			c.Status.Services, c.Status.Endpoints, c.Status.Proxies, c.Status.Standing = own.Services, own.Endpoints, own.Proxies, own.Standing
		}
	}
}

// describe is a member without its counts.
func (s *Server) describe(m *registry.Member, state registry.SourceState, mine bool, snapshot *federation.Snapshot) *api.Cluster {
	c := &api.Cluster{
		ApiVersion: api.Version, Kind: "Cluster",
		Metadata: &api.Metadata{Name: m.Name, Uid: string(m.ID), Created: stamp(m.Joined)},
		Spec: &api.ClusterSpec{
			Role: string(m.Role), Network: string(m.Network), ApiServer: m.APIServer,
			CertificateAuthority: m.CertificateAuthority, TlsServerName: m.TLSServerName,
			GatewayAddresses: m.GatewayAddresses, AllowIstioCa: m.AllowIstioCA, Grant: grantOut(m.Grant),
			Issuer: m.Issuer, IssuerKeys: m.IssuerKeys,
		},
		Status: &api.ClusterStatus{Gateways: gatewaysOf(m, snapshot)},
	}
	conditions := map[string]federation.Condition{}
	for _, condition := range m.Conditions {
		conditions[condition.Type] = condition
	}
	if mine {
		for _, condition := range state.Status.Conditions {
			// The store remembers across restarts since when; what is live knows only its own time.
			stored, ok := conditions[condition.Type]
			if ok && stored.Status == condition.Status && !stored.Since.IsZero() {
				condition.Since = stored.Since
			}
			conditions[condition.Type] = condition
		}
		s.live(c.Status, state, conditions)
	}
	for _, kind := range slices.Sorted(maps.Keys(conditions)) {
		c.Status.Conditions = append(c.Status.Conditions, conditionOut(conditions[kind]))
	}
	c.Status.Phase = phaseOf(m, conditions)
	if reachable, ok := conditions[federation.Reachable]; ok && !reachable.Status && c.Status.Lag == nil && !reachable.Since.IsZero() {
		// Nothing was heard since this meshd began: it is at least as old as that.
		c.Status.Lag = durationpb.New(s.cfg.Clock().Sub(reachable.Since))
	}
	s.describeCredential(m, c.Status)
	return c
}

// credentialPatience bounds a look at a stored credential, for a list that should
// be quick also when the store is away.
const credentialPatience = 300 * time.Millisecond

// describeCredential tells the end of meshd's credential, if only from the store.
func (s *Server) describeCredential(m *registry.Member, st *api.ClusterStatus) {
	if st.GetCredentialsExpire() != nil {
		st.Credentials = "auto"
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), credentialPatience)
	defer cancel()
	stored, err := s.cfg.Store.Credentials(ctx, m.ID)
	switch {
	case err != nil || stored.Reader.Empty():
	case stored.Reader.Expires.IsZero():
		st.Credentials = "static"
	default:
		st.Credentials, st.CredentialsExpire = "auto", stamp(stored.Reader.Expires)
	}
}

// freshFor is how long a beacon may be away before its age, and not its travel
// time, is what counts as lag. meshd renews the beacon every 5 s.
const freshFor = 12 * time.Second

// live fills in what is known only while a source is synced here.
func (s *Server) live(st *api.ClusterStatus, state registry.SourceState, conditions map[string]federation.Condition) {
	if state.Holding {
		st.SyncedBy = s.cfg.Replica
	}
	st.KubernetesVersion = state.Status.Version
	st.CredentialsExpire = stamp(state.Status.CredentialsExpire)
	st.LastSynced = stamp(state.Stored)
	if state.Status.Beacon.IsZero() {
		return
	}
	age := s.cfg.Clock().Sub(state.Status.Beacon)
	if reachable, ok := conditions[federation.Reachable]; age <= freshFor && (!ok || reachable.Status) {
		age = state.Status.Lag
	}
	if unheard := state.Status.Unheard; !unheard.IsZero() {
		// The beacon travels, but nothing is heard of something else.
		age = max(age, s.cfg.Clock().Sub(unheard))
	}
	st.Lag = durationpb.New(age)
}

// phaseOf is the sum of the conditions.
func phaseOf(m *registry.Member, conditions map[string]federation.Condition) string {
	bad := func(kind string) bool {
		c, ok := conditions[kind]
		return ok && !c.Status
	}
	synced, known := conditions[federation.Synced]
	switch {
	case m.Draining:
		return "Leaving"
	case bad(federation.SameCluster):
		return "Refused"
	case bad(federation.Reachable), bad(federation.CredentialsValid):
		return "Degraded"
	case !known:
		return "Joining"
	case !synced.Status:
		return "Degraded"
	}
	return "Ready"
}

func conditionOut(c federation.Condition) *api.Condition {
	status := "False"
	if c.Status {
		status = "True"
	}
	return &api.Condition{Type: c.Type, Status: status, Reason: c.Reason, Message: c.Message, LastTransition: stamp(c.Since)}
}

// gatewaysOf lists the addresses of a member's gateways, and one entry without
// address for each gateway that has none yet.
func gatewaysOf(m *registry.Member, snapshot *federation.Snapshot) []*api.Gateway {
	var out []*api.Gateway
	for _, gateways := range snapshot.Gateways {
		for _, g := range gateways {
			if g.Source != m.Source() {
				continue
			}
			out = append(out, gatewayOut(g, len(m.GatewayAddresses) > 0)...)
		}
	}
	slices.SortFunc(out, func(a, b *api.Gateway) int {
		return cmp.Or(cmp.Compare(a.GetAddress(), b.GetAddress()), cmp.Compare(a.GetPort(), b.GetPort()))
	})
	return out
}

func gatewayOut(g *federation.Gateway, explicit bool) []*api.Gateway {
	origin := "service"
	if explicit {
		origin = "explicit"
	}
	message := g.Pending
	if message == "" && g.Ready == 0 {
		message = "no pod of " + g.Name + " is ready"
	}
	if len(g.Addresses) == 0 {
		return []*api.Gateway{{Origin: origin, Message: cmp.Or(message, g.Name+" has no address yet")}}
	}
	var out []*api.Gateway
	for _, a := range g.Addresses {
		out = append(out, &api.Gateway{Address: a.Host, Port: a.Port, Origin: origin, Ready: g.Ready > 0, Message: message})
	}
	return out
}

func hostPort(a federation.GatewayAddress) string {
	return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
}

func grantOut(g federation.Grant) *api.Grant {
	if len(g.Namespaces)+len(g.ServiceAccounts) == 0 {
		return nil
	}
	return &api.Grant{Namespaces: g.Namespaces, ServiceAccounts: g.ServiceAccounts}
}

// stamp is nil for the zero time.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
