// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/isthmus-mesh/isthmus/agent/onboard"
	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/deploy"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// The lifetimes of join tokens.
const (
	defaultTokenLifetime = 15 * time.Minute
	maxTokenLifetime     = 24 * time.Hour
)

// OnboardVM implements api.AdminServer.
func (s *Server) OnboardVM(ctx context.Context, req *api.OnboardVMRequest) (*api.OnboardVMResponse, error) {
	vm, err := s.vmIn(req.GetVm())
	if err != nil {
		return nil, err
	}
	lifetime := defaultTokenLifetime
	if req.GetTokenLifetime() != nil {
		lifetime = req.GetTokenLifetime().AsDuration()
	}
	if lifetime < time.Second || lifetime > maxTokenLifetime {
		return nil, invalid("tokenLifetime %s, want between 1s and %s", lifetime, maxTokenLifetime)
	}
	before := s.cfg.Store.VMs()[vm.Key()]
	out := &api.OnboardVMResponse{Outcome: "created", Findings: s.vmFindings(vm.Network)}
	if before != nil {
		out.Outcome, vm.Created = "reissued", before.Created
	}
	s.describeScript(out, vm.Name)
	ends := s.cfg.Clock().Add(lifetime)
	if !req.GetDryRun() {
		if ends, err = s.admitVM(ctx, vm, lifetime, out); err != nil {
			return nil, explain(err)
		}
	}
	out.Vm = vmOut(vm)
	out.Vm.Status = &api.VMStatus{Phase: "Pending", TokenExpires: stamp(ends)}
	return out, nil
}

// admitVM registers the machine and makes its token; earlier ones are void.
func (s *Server) admitVM(ctx context.Context, vm *registry.VM, lifetime time.Duration, out *api.OnboardVMResponse) (time.Time, error) {
	source := federation.VMSource(vm.Network)
	if err := s.record(ctx, "onboard-vm", vm.Key().String()+" as "+vm.Service.String(), ca.Source(source)); err != nil {
		return time.Time{}, err
	}
	vm.Invited = s.cfg.Clock().Add(lifetime).UTC().Truncate(time.Second)
	if _, err := s.cfg.Store.PutVM(ctx, vm); err != nil {
		return time.Time{}, err
	}
	if err := s.cfg.Authority.Reinstate(ctx, ca.Source(source), vm.Name, "onboarded"); err != nil {
		return time.Time{}, err
	}
	if _, err := s.cfg.Tokens.Void(ctx, string(vm.Network), vm.Name); err != nil {
		return time.Time{}, err
	}
	token, what, err := s.cfg.Tokens.Create(ctx, ca.JoinToken{
		Name: vm.Name, Network: string(vm.Network), Namespace: vm.Service.Namespace, ServiceAccount: vm.ServiceAccount,
	}, lifetime)
	if err != nil {
		return time.Time{}, err
	}
	out.Token = token
	return what.Expires, nil
}

// describeScript says where the script is and how to recognise it.
func (s *Server) describeScript(out *api.OnboardVMResponse, name string) {
	out.Root = s.cfg.Authority.Bundle().PEM()
	out.ScriptUrl = "https://" + s.cfg.AdminAddress + "/onboard/onboard.sh"
	sum := sha256.Sum256(deploy.OnboardScript)
	out.ScriptSha256 = hex.EncodeToString(sum[:])
	if fingerprints := s.cfg.Authority.Bundle().Fingerprints(); len(fingerprints) > 0 {
		out.RootFingerprint = fingerprints[0]
	}
	line, err := onboard.Line(onboard.LineOptions{Address: s.cfg.AdminAddress, Name: name, RootPEM: out.Root, Script: deploy.OnboardScript})
	if err != nil {
		s.cfg.Log.Error("onboarding line cannot be made", "error", err)
	}
	out.Line = line
}

// vmIn checks what a caller says about a machine.
func (s *Server) vmIn(v *api.VM) (*registry.VM, error) {
	spec := v.GetSpec()
	vm := &registry.VM{
		Network: federation.Network(spec.GetNetwork()), Name: v.GetMetadata().GetName(),
		Service:        federation.ServiceName{Namespace: spec.GetNamespace(), Name: spec.GetService()},
		ServiceAccount: cmp.Or(spec.GetServiceAccount(), spec.GetService()),
		HealthCheck:    spec.GetHealthCheck(), Locality: localityIn(spec.GetLocality()),
		Labels: v.GetMetadata().GetLabels(), Created: s.cfg.Clock().UTC(),
	}
	for _, f := range []struct{ field, value string }{
		{"name", vm.Name}, {"network", string(vm.Network)}, {"namespace", vm.Service.Namespace}, {"service", vm.Service.Name},
		{"serviceAccount", vm.ServiceAccount},
	} {
		if !isLabel(f.value) {
			return nil, invalid("vm %q: %s %q, want a DNS label: up to 63 lower-case letters, digits and dashes", vm.Name, f.field, f.value)
		}
	}
	if _, err := ca.ParseSource(string(federation.VMSource(vm.Network))); err != nil {
		return nil, invalid("vm %q: network: %v", vm.Name, err)
	}
	for _, p := range spec.GetPorts() {
		protocol, err := protocolIn(p.GetProtocol())
		if err != nil {
			return nil, invalid("vm %q: port %d: %v", vm.Name, p.GetNumber(), err)
		}
		vm.Ports = append(vm.Ports, registry.VMPort{Number: p.GetNumber(), Target: p.GetTarget(), Name: p.GetName(), Protocol: protocol})
	}
	if len(vm.Ports) == 0 {
		return nil, invalid("vm %q: ports are missing", vm.Name)
	}
	if _, err := healthCheck(vm.HealthCheck); err != nil {
		return nil, invalid("vm %q: healthCheck %q: %v", vm.Name, vm.HealthCheck, err)
	}
	if err := vm.Validate(); err != nil {
		return nil, invalid("%v", err)
	}
	for name, other := range s.cfg.Store.VMs() {
		if name.Name == vm.Name && name.Network != vm.Network {
			return nil, api.Problem{Status: codes.AlreadyExists, Code: api.InvalidInput,
				Message: fmt.Sprintf("a virtual machine %q exists on network %q", vm.Name, other.Network),
				Try:     "choose another name, or take the other one out: mesh vm offboard " + vm.Name}
		}
	}
	return vm, nil
}

// protocols are those a port can be given, in Istio's spelling.
var protocols = []federation.Protocol{
	federation.HTTP, federation.HTTP2, federation.GRPC, federation.GRPCWeb, federation.HTTPS,
	federation.TLS, federation.TCP, federation.Mongo, federation.Redis, federation.MySQL,
}

func protocolIn(text string) (federation.Protocol, error) {
	if text == "" {
		return federation.Unknown, nil
	}
	for _, p := range protocols {
		if strings.EqualFold(string(p), text) {
			return p, nil
		}
	}
	return "", fmt.Errorf("protocol %q, want one of %v", text, protocols)
}

func localityIn(text string) federation.Locality {
	parts := append(strings.SplitN(text, "/", 3), "", "", "")
	return federation.Locality{Region: parts[0], Zone: parts[1], Subzone: parts[2]}
}

// vmFindings warns of a network that cannot be entered.
func (s *Server) vmFindings(network federation.Network) []*api.Finding {
	snapshot, _ := s.cfg.Store.Snapshot()
	if slices.ContainsFunc(snapshot.Gateways[network], func(g *federation.Gateway) bool { return len(g.Addresses) > 0 }) {
		return nil
	}
	return []*api.Finding{{
		Code: string(api.NetworkNoGateway), Severity: "warning", Subject: "network/" + string(network),
		Message: fmt.Sprintf("network %s has no gateway: the machine can call out, but calls to it from other networks have no way in", network),
		Try:     "join a cluster on that network, or put the machine on the network of one",
	}}
}

func vmOut(vm *registry.VM) *api.VM {
	out := &api.VM{
		ApiVersion: api.Version, Kind: "VM",
		Metadata: &api.Metadata{Name: vm.Name, Created: stamp(vm.Created), Labels: vm.Labels},
		Spec: &api.VMSpec{
			Network: string(vm.Network), Namespace: vm.Service.Namespace, Service: vm.Service.Name,
			ServiceAccount: vm.ServiceAccount, HealthCheck: vm.HealthCheck,
			Locality: strings.TrimRight(vm.Locality.Region+"/"+vm.Locality.Zone+"/"+vm.Locality.Subzone, "/"),
		},
	}
	for _, p := range vm.Ports {
		out.Spec.Ports = append(out.Spec.Ports, &api.VMPort{
			Number: p.Number, Target: cmp.Or(p.Target, p.Number), Name: p.Name, Protocol: string(p.Protocol),
		})
	}
	return out
}

// ListVMs implements api.AdminServer.
func (s *Server) ListVMs(ctx context.Context, req *api.ListVMsRequest) (*api.VMList, error) {
	unspent := s.unspentTokens(ctx)
	connected := map[registry.VMName]*api.Proxy{}
	for _, p := range s.proxies(ctx) {
		if p.GetRole() == string(federation.VMRole) {
			connected[registry.VMName{Network: federation.Network(p.GetNetwork()), Name: p.GetMetadata().GetName()}] = p
		}
	}
	out := &api.VMList{ApiVersion: api.Version, Kind: "VMList"}
	vms := s.cfg.Store.VMs()
	for _, name := range slices.SortedFunc(maps.Keys(vms), func(a, b registry.VMName) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), cmp.Compare(a.Name, b.Name))
	}) {
		if req.GetNetwork() != "" && string(name.Network) != req.GetNetwork() || req.GetName() != "" && name.Name != req.GetName() {
			continue
		}
		one := vmOut(vms[name])
		one.Status = s.vmStatus(vms[name], unspent, connected[name])
		out.Items = append(out.Items, one)
	}
	if len(out.Items) == 0 && req.GetName() != "" {
		return nil, unknownVM(req.GetName(), vms)
	}
	return out, nil
}

// tokenPatience bounds a look at the unspent tokens, which are in the store.
const tokenPatience = time.Second

// unspentTokens is empty where it does not matter, and while the store is away: what is
// known of the machines is shown all the same.
func (s *Server) unspentTokens(ctx context.Context) []ca.JoinToken {
	if len(s.cfg.Store.VMs()) == 0 || s.cfg.Store.Health().Degraded {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, tokenPatience)
	defer cancel()
	unspent, err := s.cfg.Tokens.List(ctx)
	if err != nil {
		s.cfg.Log.Warn("join tokens cannot be listed", "error", err)
	}
	return unspent
}

func unknownVM(name string, vms map[registry.VMName]*registry.VM) error {
	var names []string
	for n := range vms {
		names = append(names, n.Name)
	}
	return unknown("virtual machine", name, names, "mesh vm list")
}

// vmStatus is where a machine is between its token and its health.
func (s *Server) vmStatus(vm *registry.VM, unspent []ca.JoinToken, proxy *api.Proxy) *api.VMStatus {
	out := &api.VMStatus{}
	if proxy != nil {
		out.AgentVersion, out.CertificateExpires = proxy.GetAgentVersion(), proxy.GetCertificateExpires()
	}
	for _, t := range unspent {
		if t.Name == vm.Name && t.Network == string(vm.Network) {
			out.TokenExpires = stamp(t.Expires)
		}
	}
	if h := vm.Health; h != nil {
		out.Addresses, out.AgentVersion, out.Message = addressTexts(h.Addresses), h.Version, h.Message
		out.Conditions = []*api.Condition{{Type: "Healthy", Status: truth(h.Healthy), Message: h.Message, LastTransition: stamp(h.Since)}}
	}
	if h := vm.Health; h != nil && !h.CertificateExpires.IsZero() {
		out.CertificateExpires = stamp(h.CertificateExpires)
	}
	ended := out.CertificateExpires != nil && proxy == nil && !s.cfg.Clock().Before(out.CertificateExpires.AsTime())
	switch {
	case vm.Health != nil && !vm.Present && ended && out.TokenExpires != nil:
		out.Phase, out.Message = "Pending", "its certificate ended while it was away, and its new token has not been used yet"
	case vm.Health != nil && !vm.Present && ended:
		out.Phase = "Expired"
		out.Message = "its certificate ended at " + out.CertificateExpires.AsTime().Format(time.RFC3339) + " while it was away; it needs a new token: mesh vm onboard " + vm.Name
	case vm.Health != nil && !vm.Present:
		out.Phase, out.Message = "Lost", "its agent has stopped reporting; it needs no token to come back"
	case vm.Health != nil && vm.Health.Healthy:
		out.Phase = "Healthy"
	case vm.Health != nil:
		out.Phase = "Unhealthy"
	case proxy != nil:
		out.Phase, out.Message = "Connected", "its health has not been reported yet"
	case out.TokenExpires != nil:
		out.Phase, out.Message = "Pending", "its token has not been used yet"
	default:
		out.Phase, out.Message = s.afterToken(vm)
	}
	return out
}

// afterToken tells a used token from an expired one. One that is not among the unspent
// before its time has come was used.
func (s *Server) afterToken(vm *registry.VM) (phase, message string) {
	if s.cfg.Clock().Before(vm.Invited) {
		return "Redeemed", "its token was used, and it has not reported yet"
	}
	return "Expired", "its token is used or expired, and it has never reported; it needs a new one: mesh vm onboard " + vm.Name
}

func truth(b bool) string {
	if b {
		return "True"
	}
	return "False"
}

// OffboardVM implements api.AdminServer.
func (s *Server) OffboardVM(ctx context.Context, req *api.OffboardVMRequest) (*api.OffboardVMResponse, error) {
	vms := s.cfg.Store.VMs()
	var found []*registry.VM
	for name, vm := range vms {
		if name.Name == req.GetName() && (req.GetNetwork() == "" || string(name.Network) == req.GetNetwork()) {
			found = append(found, vm)
		}
	}
	switch len(found) {
	case 0:
		return nil, unknownVM(req.GetName(), vms)
	case 1:
	default:
		return nil, invalid("virtual machine %q exists on %d networks: name one of them", req.GetName(), len(found))
	}
	vm := found[0]
	source := federation.VMSource(vm.Network)
	if err := s.record(ctx, "offboard-vm", vm.Key().String(), ca.Source(source)); err != nil {
		return nil, err
	}
	open := s.streams(source, vm.Name) // before the revocation, at which they are closed too
	// First what keeps it from coming back, then what it has.
	if err := s.cfg.Authority.Revoke(ctx, ca.Source(source), vm.Name, "offboarded"); err != nil {
		return nil, explain(err)
	}
	if _, err := s.cfg.Tokens.Void(ctx, string(vm.Network), vm.Name); err != nil {
		return nil, explain(err)
	}
	if err := s.cfg.Store.RemoveVM(ctx, vm.Key()); err != nil {
		return nil, explain(err)
	}
	s.disconnect(source, vm.Name)
	return &api.OffboardVMResponse{Vm: vmOut(vm), StreamsClosed: int32(open)}, nil
}
