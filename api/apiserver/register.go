// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// RegisterCluster implements api.AdminServer.
func (s *Server) RegisterCluster(ctx context.Context, req *api.RegisterClusterRequest) (*api.RegisterClusterResponse, error) {
	m, err := memberIn(req.GetCluster())
	if err != nil {
		return nil, err
	}
	members := s.cfg.Store.Members()
	if err := admissible(m, members, req.GetReplace()); err != nil {
		return nil, err
	}
	answer := &api.RegisterClusterResponse{
		NewNetwork: s.newNetwork(m), Root: s.cfg.Authority.Bundle().PEM(), Advertised: s.advertised(),
		TrustDomain: s.cfg.Authority.Bundle().TrustDomain.Name(), Findings: joinFindings(m, req.GetReader()),
	}
	before := members[m.ID]
	if before != nil {
		m.Joined, m.Conditions = before.Joined, before.Conditions
	} else {
		m.Joined = s.cfg.Clock().UTC()
	}
	answer.Outcome = outcomeOf(m, before, members)
	if !req.GetDryRun() {
		outcome, err := s.join(ctx, m, req)
		if err != nil {
			return nil, err
		}
		answer.Outcome = string(outcome)
	}
	if before != nil || !req.GetDryRun() {
		answer.Cluster, err = s.GetCluster(ctx, &api.GetClusterRequest{Name: string(m.ID)})
		if problemOf(err).Status == codes.NotFound { // this replica has not seen the write yet
			snapshot, _ := s.cfg.Store.Snapshot()
			answer.Cluster, err = s.describe(m, registry.SourceState{}, false, snapshot), nil
		}
	}
	return answer, err
}

// join writes the member and lets its identities in.
func (s *Server) join(ctx context.Context, m *registry.Member, req *api.RegisterClusterRequest) (registry.Outcome, error) {
	credentials, err := s.credentialsFor(ctx, m, req)
	if err != nil {
		return "", err
	}
	if err := s.record(ctx, "register-cluster", m.Name+" on network "+string(m.Network), ca.Source(m.Source())); err != nil {
		return "", err
	}
	replaced := predecessor(m, s.cfg.Store.Members())
	outcome, err := s.cfg.Store.Join(ctx, m, credentials, req.GetReplace())
	if err != nil {
		return "", explain(err)
	}
	if replaced != nil {
		if err := s.cutOff(ctx, replaced, "cluster "+m.Name+" was replaced"); err != nil {
			return "", explain(fmt.Errorf("registered, but the identities of the cluster it replaces are not revoked: %w", err))
		}
	}
	// A cluster that left and comes back was cut off meanwhile.
	if err := s.cfg.Authority.Reinstate(ctx, ca.Source(m.Source()), "", "joined"); err != nil {
		return "", explain(fmt.Errorf("registered, but its identities are still revoked; run the join again: %w", err))
	}
	return outcome, nil
}

// predecessor is the other cluster that has m's name, and whose place m takes; nil if none.
func predecessor(m *registry.Member, members map[federation.ClusterID]*registry.Member) *registry.Member {
	for _, other := range members {
		if other.Name == m.Name && other.ID != m.ID {
			return other
		}
	}
	return nil
}

// cutOff ends what a cluster that is no member any more could still do: its identities are
// neither issued nor renewed, and its streams are closed.
func (s *Server) cutOff(ctx context.Context, m *registry.Member, reason string) error {
	if err := s.cfg.Authority.Revoke(ctx, ca.Source(m.Source()), "", reason); err != nil {
		return err
	}
	s.disconnect(m.Source(), "")
	return nil
}

// credentialsFor takes the credentials of the request, or keeps those meshd has.
func (s *Server) credentialsFor(ctx context.Context, m *registry.Member, req *api.RegisterClusterRequest) (registry.Credentials, error) {
	if req.GetReader() == nil {
		have, err := s.cfg.Store.Credentials(ctx, m.ID)
		if err != nil || have.Reader.Empty() {
			return have, invalid("reader: a credential is missing, and meshd has none for cluster %q", m.Name)
		}
		return have, nil
	}
	reader, err := s.credentialIn("reader", req.GetReader())
	if err != nil {
		return registry.Credentials{}, err
	}
	out := registry.Credentials{Reader: reader}
	if req.GetWriter() != nil {
		out.Writer, err = s.credentialIn("writer", req.GetWriter())
	}
	return out, err
}

func (s *Server) credentialIn(field string, c *api.Credential) (registry.Credential, error) {
	out := registry.Credential{
		Token: c.GetToken(), Issued: s.cfg.Clock().UTC(),
		ClientCertificate: c.GetClientCertificate(), ClientKey: c.GetClientKey(),
	}
	if out.Empty() {
		return out, invalid("%s: neither a token nor a client certificate", field)
	}
	if c.GetExpires() != nil {
		out.Expires = c.GetExpires().AsTime()
	} else if _, expires, err := registry.ParseTokenTimes(c.GetToken()); err == nil {
		out.Expires = expires
	}
	if !out.Expires.IsZero() && !out.Expires.After(s.cfg.Clock()) {
		return out, api.Problem{
			Status: codes.InvalidArgument, Code: api.CredentialRefused,
			Message: fmt.Sprintf("%s: the token expired at %s", field, out.Expires.UTC().Format(time.RFC3339)),
			Try:     "run mesh join cluster with a kubeconfig context, which obtains a new one",
		}
	}
	return out, nil
}

// memberIn checks what a caller says about a cluster.
func memberIn(c *api.Cluster) (*registry.Member, error) {
	spec := c.GetSpec()
	if !isLabel(c.GetMetadata().GetName()) {
		return nil, invalid("cluster name %q, want a DNS label: up to 63 lower-case letters, digits and dashes", c.GetMetadata().GetName())
	}
	if !isLabel(spec.GetNetwork()) {
		return nil, invalid("network %q of cluster %q, want a DNS label: up to 63 lower-case letters, digits and dashes", spec.GetNetwork(), c.GetMetadata().GetName())
	}
	m := &registry.Member{
		Cluster: federation.Cluster{
			ID: federation.ClusterID(c.GetMetadata().GetUid()), Name: c.GetMetadata().GetName(),
			Network: federation.Network(spec.GetNetwork()), Role: federation.ClusterRole(spec.GetRole()),
			APIServer: spec.GetApiServer(),
			Grant:     federation.Grant{Namespaces: spec.GetGrant().GetNamespaces(), ServiceAccounts: spec.GetGrant().GetServiceAccounts()},
		},
		CertificateAuthority: spec.GetCertificateAuthority(), TLSServerName: spec.GetTlsServerName(),
		GatewayAddresses: spec.GetGatewayAddresses(), AllowIstioCA: spec.GetAllowIstioCa(),
		Issuer: spec.GetIssuer(), IssuerKeys: spec.GetIssuerKeys(),
	}
	if len(m.IssuerKeys) == 0 {
		return nil, invalid("cluster %q: issuerKeys are missing: without them no workload of it can be recognised", m.Name)
	}
	if _, err := ca.ParseSource(string(m.Source())); err != nil {
		return nil, invalid("cluster %q: uid: %v", m.Name, err)
	}
	for _, a := range m.GatewayAddresses {
		host, port, err := net.SplitHostPort(a)
		if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 || host == "" {
			return nil, invalid("cluster %q: gateway address %q, want HOST:PORT", m.Name, a)
		}
	}
	if err := m.Grant.Validate(); err != nil {
		return nil, invalid("cluster %q: grant: %v", m.Name, err)
	}
	if err := m.Validate(); err != nil {
		return nil, invalid("%v", err)
	}
	return m, nil
}

// isLabel tells whether s is a DNS label (RFC 1123).
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' })
}

// admissible words the refusals that the store's transaction would also give,
// with what to do about them. The store has the last word.
func admissible(m *registry.Member, members map[federation.ClusterID]*registry.Member, replace bool) error {
	keys, err := registry.KeyThumbprints(m.IssuerKeys)
	if err != nil {
		return invalid("cluster %q: issuerKeys: %v", m.Name, err)
	}
	for _, other := range members {
		if other.ID == m.ID {
			if other.Name != m.Name {
				return api.Problem{Status: codes.AlreadyExists, Code: api.DuplicateCluster,
					Message: fmt.Sprintf("the cluster with UID %s has joined already, as %q", m.ID, other.Name),
					Try:     "mesh clusters " + other.Name + "\nTo rename it: mesh leave cluster " + other.Name + ", then join again"}
			}
			continue
		}
		if other.Name == m.Name && replace {
			continue
		}
		if other.Name == m.Name {
			return api.Problem{Status: codes.AlreadyExists, Code: api.DuplicateName,
				Message: fmt.Sprintf("%q is another cluster, with UID %s; this one has %s", m.Name, other.ID, m.ID),
				Try:     "choose another name; if the cluster was rebuilt, add --replace"}
		}
		theirs, err := registry.KeyThumbprints(other.IssuerKeys)
		if err != nil {
			continue // the store reports it
		}
		for _, k := range keys {
			if slices.Contains(theirs, k) {
				return api.Problem{Status: codes.AlreadyExists, Code: api.DuplicateKey,
					Message: fmt.Sprintf("cluster %q signs its service account tokens with the same key (%s)", other.Name, k),
					Try:     "give one of them a key of its own: kube-apiserver --service-account-signing-key-file"}
			}
		}
	}
	return nil
}

// outcomeOf foretells what a join will do.
func outcomeOf(m, before *registry.Member, members map[federation.ClusterID]*registry.Member) string {
	if before != nil {
		if sameMember(m, before) {
			return string(registry.Unchanged)
		}
		return string(registry.Updated)
	}
	if predecessor(m, members) != nil {
		return string(registry.Replaced)
	}
	return string(registry.Created)
}

// sameMember compares what a join can change.
func sameMember(a, b *registry.Member) bool {
	return a.Network == b.Network && a.Role == b.Role && a.APIServer == b.APIServer && !b.Draining &&
		a.Grant.Equal(b.Grant) && bytes.Equal(a.CertificateAuthority, b.CertificateAuthority) &&
		a.TLSServerName == b.TLSServerName && slices.Equal(a.GatewayAddresses, b.GatewayAddresses) &&
		a.AllowIstioCA == b.AllowIstioCA && a.Issuer == b.Issuer && sameKeys(a.IssuerKeys, b.IssuerKeys)
}

func sameKeys(a, b []byte) bool {
	x, err1 := registry.KeyThumbprints(a)
	y, err2 := registry.KeyThumbprints(b)
	return err1 == nil && err2 == nil && reflect.DeepEqual(x, y)
}

// newNetwork tells that nothing is on the member's network yet.
func (s *Server) newNetwork(m *registry.Member) bool {
	for _, other := range s.cfg.Store.Members() {
		if other.Network == m.Network {
			return false
		}
	}
	for name := range s.cfg.Store.VMs() {
		if name.Network == m.Network {
			return false
		}
	}
	return true
}

// joinFindings is what a person who joins a cluster should hear at once.
func joinFindings(m *registry.Member, reader *api.Credential) []*api.Finding {
	var out []*api.Finding
	if u, err := url.Parse(m.APIServer); err == nil && isLoopback(u.Hostname()) {
		out = append(out, &api.Finding{
			Code: string(api.LoopbackAPIServer), Severity: "warning", Subject: "cluster/" + m.Name,
			Message: fmt.Sprintf("the API server's address %s is a loopback address: it works on one machine only", u.Host),
			Try:     "--api-server https://HOST:PORT",
		})
	}
	if reader != nil && reader.GetExpires() == nil {
		if _, expires, err := registry.ParseTokenTimes(reader.GetToken()); err != nil || expires.IsZero() {
			out = append(out, &api.Finding{
				Code: string(api.StaticCredential), Severity: "warning", Subject: "cluster/" + m.Name,
				Message: "the credential has no end and is not renewed: it stays valid wherever it was copied to",
				Try:     "mesh join cluster " + m.Name + " --context CONTEXT --network " + string(m.Network),
			})
		}
	}
	return out
}

func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") || strings.HasSuffix(strings.ToLower(host), ".localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && (a.Unmap().IsLoopback() || a.IsUnspecified())
}
