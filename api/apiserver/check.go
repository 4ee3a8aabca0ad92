// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
)

// The severities of findings.
const (
	severityOK      = "ok"
	severityInfo    = "info"
	severityWarning = "warning"
	severityError   = "error"
)

// lagLimit is the age from which what is known of a cluster is a finding.
const lagLimit = 10 * time.Second

// checking is one run of the check.
type checking struct {
	*Server
	wanted   map[string]bool // names of clusters; empty: all
	clusters []*api.Cluster
	report   *api.CheckReport
}

// Check implements api.AdminServer.
func (s *Server) Check(ctx context.Context, req *api.CheckRequest) (*api.CheckReport, error) {
	c := &checking{Server: s, wanted: map[string]bool{}, report: &api.CheckReport{ApiVersion: api.Version, Kind: "CheckReport"}}
	for _, name := range req.GetClusters() {
		m, err := s.member(name)
		if err != nil {
			return nil, err
		}
		c.wanted[m.Name] = true
	}
	c.clusters = slices.DeleteFunc(s.clusters(ctx), func(v *api.Cluster) bool { return !c.wants(v.GetMetadata().GetName()) })
	c.add("control service", c.checkService())
	c.add("trust", c.checkTrust())
	c.add("clusters", c.checkClusters())
	c.add("reachability", c.checkPaths(ctx))
	c.add("services", c.checkSnapshot())
	c.add("configuration", c.checkConfig())
	c.add("proxies", c.checkProxies(ctx))
	c.add("virtual machines", c.checkVMs(ctx))
	return c.report, nil
}

func (c *checking) wants(cluster string) bool { return len(c.wanted) == 0 || c.wanted[cluster] }

func (c *checking) add(group string, findings []*api.Finding) {
	if len(findings) == 0 {
		return
	}
	c.report.Groups = append(c.report.Groups, &api.CheckGroup{Name: group, Findings: findings})
	for _, f := range findings {
		switch f.GetSeverity() {
		case severityError:
			c.report.Errors++
		case severityWarning:
			c.report.Warnings++
		}
	}
}

func good(format string, args ...any) *api.Finding {
	return &api.Finding{Severity: severityOK, Message: fmt.Sprintf(format, args...)}
}

// checkService looks at meshd itself and its store.
func (c *checking) checkService() []*api.Finding {
	var out []*api.Finding
	if c.cfg.Health != nil {
		for _, h := range c.cfg.Health() {
			if h.Err == nil {
				out = append(out, good("%s", h.Name))
				continue
			}
			out = append(out, &api.Finding{Code: string(api.StoreUnreadable), Severity: severityError, Subject: "meshd/" + c.cfg.Replica, Message: h.Name + ": " + h.Err.Error()})
		}
	}
	h := c.cfg.Store.Health()
	if h.Degraded {
		out = append(out, &api.Finding{Code: string(api.StoreUnreadable), Severity: severityError, Subject: "etcd", Message: h.Reason, Since: stamp(h.Since),
			Try: "bring etcd back; proxies keep what they have meanwhile"})
	}
	if h.ReadOnly != "" {
		out = append(out, &api.Finding{Code: string(api.StoreReadOnly), Severity: severityError, Subject: "etcd", Message: h.ReadOnly, Try: "upgrade this meshd"})
	}
	for _, q := range h.Quarantined {
		out = append(out, &api.Finding{Code: string(api.ValuesQuarantined), Severity: severityWarning, Subject: q.Key, Message: q.Reason})
	}
	for _, alarm := range h.Alarms {
		f := &api.Finding{Code: string(api.StoreNearlyFull), Severity: severityError, Subject: "etcd", Message: fmt.Sprintf("%s: %d of %d bytes", alarm, h.InUse, h.Quota)}
		if strings.HasSuffix(alarm, "soon") {
			f.Severity = severityWarning
		}
		out = append(out, f)
	}
	if !h.Degraded && h.ReadOnly == "" && len(h.Quarantined)+len(h.Alarms) == 0 {
		out = append(out, good("store (revision %d)", h.Revision))
	}
	return out
}

// checkTrust looks at the authorities.
func (c *checking) checkTrust() []*api.Finding {
	now := c.cfg.Clock()
	bundle := c.cfg.Authority.Bundle()
	if len(bundle.Roots) == 0 {
		return []*api.Finding{{Code: string(api.AuthorityMissing), Severity: severityError, Message: "the trust domain has no root"}}
	}
	out := []*api.Finding{good("%s of trust domain %s", plural(len(bundle.Roots), "root", "roots"), bundle.TrustDomain.Name())}
	earliest := time.Time{}
	for _, i := range c.cfg.Authority.Issuers() {
		if i.Phase != ca.PhaseActive {
			continue
		}
		if earliest.IsZero() || i.NotAfter.Before(earliest) {
			earliest = i.NotAfter
		}
		if left := i.NotAfter.Sub(now); left < i.NotAfter.Sub(i.NotBefore)/10 {
			out = append(out, &api.Finding{Code: string(api.CertificateExpiring), Severity: severityWarning, Subject: "authority/" + i.Scope,
				Message: "ends at " + i.NotAfter.UTC().Format(time.RFC3339)})
		}
	}
	if !earliest.IsZero() {
		out = append(out, good("earliest end of an authority in %dd", int(earliest.Sub(now).Hours()/24)))
	}
	return append(out, c.checkAudit()...)
}

// checkClusters looks at the conditions of the members.
func (c *checking) checkClusters() []*api.Finding {
	var out []*api.Finding
	for _, v := range c.clusters {
		findings := clusterFindings(v)
		if len(findings) == 0 {
			findings = []*api.Finding{good("%s", v.GetMetadata().GetName())}
		}
		out = append(out, findings...)
	}
	return out
}

// conditionCodes are the findings that conditions turn into when they are false.
var conditionCodes = map[string]api.Code{
	federation.Reachable:        api.ClusterUnreachable,
	federation.Synced:           api.ClusterNotSynced,
	federation.CredentialsValid: api.CredentialsExpired,
	federation.SameCluster:      api.AnotherCluster,
	federation.GatewayReady:     api.ClusterNoGateway,
}

// rejoin is the command that joins a member again as it is.
func rejoin(v *api.Cluster) string {
	spec := v.GetSpec()
	out := "mesh join cluster " + v.GetMetadata().GetName() + " --context CONTEXT --network " + spec.GetNetwork() + " --api-server " + spec.GetApiServer()
	if spec.GetRole() == "primary" {
		out += " --primary"
	}
	for _, a := range spec.GetGatewayAddresses() {
		out += " --gateway-address " + a
	}
	if spec.GetAllowIstioCa() {
		out += " --allow-istio-ca"
	}
	for _, g := range slices.Concat(spec.GetGrant().GetNamespaces(), spec.GetGrant().GetServiceAccounts()) {
		out += " --grant '" + g + "'"
	}
	return out
}

func clusterFindings(v *api.Cluster) []*api.Finding {
	var out []*api.Finding
	name := v.GetMetadata().GetName()
	for _, condition := range v.GetStatus().GetConditions() {
		code := conditionCodes[condition.GetType()]
		if condition.GetStatus() == "True" || code == "" {
			continue
		}
		f := &api.Finding{Code: string(code), Severity: severityError, Subject: name, Message: condition.GetType() + " is false", Since: condition.GetLastTransition()}
		if m := strings.TrimSpace(condition.GetMessage()); m != "" {
			f.Message = m
		}
		switch code {
		case api.CredentialsExpired:
			f.Try = rejoin(v)
		case api.ClusterNoGateway:
			f.Severity = severityWarning
		}
		out = append(out, f)
	}
	switch v.GetStatus().GetStanding() {
	case federation.Demoted.String():
		out = append(out, &api.Finding{Code: string(api.ClusterSetAside), Severity: severityWarning, Subject: name,
			Message: "demoted: other clusters call it only where nothing fresh is left, since its API server is away"})
	case federation.Drained.String():
		out = append(out, &api.Finding{Code: string(api.ClusterSetAside), Severity: severityWarning, Subject: name,
			Message: "drained: other clusters call it only for what nobody else has, since its API server and its gateways are away",
			Try:     "if it is gone for good: mesh leave cluster " + name + " --force"})
	}
	if lag := v.GetStatus().GetLag(); lag.AsDuration() > lagLimit && len(out) == 0 {
		out = append(out, &api.Finding{Code: string(api.WatchLag), Severity: severityWarning, Subject: name,
			Message: fmt.Sprintf("what is known is %s old (limit %s)", lag.AsDuration().Round(time.Second), lagLimit)})
	}
	return out
}

// checkPaths tries the paths between networks.
func (c *checking) checkPaths(ctx context.Context) []*api.Finding {
	report, err := c.ProbePaths(ctx, &api.ProbePathsRequest{})
	if err != nil {
		return []*api.Finding{{Code: string(api.PathNotProven), Severity: severityWarning, Message: err.Error()}}
	}
	var out []*api.Finding
	tried, worked, worst := 0, 0, time.Duration(0)
	for _, p := range report.GetPaths() {
		if !c.wants(p.GetFrom()) && !c.wants(p.GetTo()) {
			continue
		}
		tried++
		subject := fmt.Sprintf("%s to %s %s", p.GetFrom(), p.GetTo(), p.GetAddress())
		switch p.GetState() {
		case "verified":
			worked++
			worst = max(worst, p.GetElapsed().AsDuration())
		case "reached", "unknown":
			out = append(out, &api.Finding{Code: string(api.PathNotProven), Severity: severityInfo, Subject: subject, Message: p.GetMessage()})
		default:
			out = append(out, &api.Finding{Code: string(api.PathBroken), Severity: severityError, Subject: subject, Message: p.GetMessage()})
		}
	}
	if worked > 0 {
		out = append(out, good("%d of %d gateway paths proven by mTLS, worst %s", worked, tried, worst.Round(time.Millisecond)))
	}
	return out
}

// checkSnapshot tells what merging and the sources have found.
func (c *checking) checkSnapshot() []*api.Finding {
	snapshot, _ := c.cfg.Store.Snapshot()
	out := slices.Clone(c.snapshotFindings(snapshot).all)
	for _, state := range c.sourceStates() {
		if c.wants(snapshot.SourceName(state.Source)) {
			out = append(out, findingsOut(slices.Clone(state.Findings))...)
		}
		if state.Err != nil {
			out = append(out, &api.Finding{Code: string(api.StoreBehind), Severity: severityWarning,
				Subject: snapshot.SourceName(state.Source), Message: "what it reports cannot be stored: " + state.Err.Error()})
		}
	}
	if c.cfg.Findings != nil {
		out = append(out, findingsOut(slices.Clone(c.cfg.Findings()))...)
	}
	out = distinct(out)
	if len(out) == 0 && len(snapshot.Records) > 0 {
		out = append(out, good("%s without conflicts", plural(len(snapshot.Records), "service", "services")))
	}
	return out
}

// distinct says each finding once, and leaves those about configuration to
// checkConfig.
func distinct(findings []*api.Finding) []*api.Finding {
	seen := map[string]bool{}
	return slices.DeleteFunc(findings, func(f *api.Finding) bool {
		key := f.GetCode() + "\x00" + f.GetSubject() + "\x00" + f.GetMessage()
		again := seen[key]
		seen[key] = true
		return again || strings.HasPrefix(f.GetCode(), "MESH500")
	})
}

// checkConfig tells what became of the objects of the wanted clusters.
func (c *checking) checkConfig() []*api.Finding {
	snapshot, _ := c.cfg.Store.Snapshot()
	var out []*api.Finding
	active := 0
	for _, o := range c.configObjects() {
		if o.GetStatus() == string(config.Active) && c.wants(o.GetCluster()) {
			active++
		}
	}
	for _, f := range findingsOut(slices.Clone(c.index(snapshot).Findings())) {
		_, source, _ := strings.Cut(f.GetSubject(), " @ ")
		cluster := snapshot.SourceName(federation.SourceID(source))
		if source != "" && !c.wants(cluster) {
			continue
		}
		f.Subject = strings.Replace(f.GetSubject(), " @ "+source, " in "+cluster, 1)
		out = append(out, f)
	}
	if active > 0 {
		out = append(out, good("%s in force", plural(active, "object", "objects")))
	}
	return out
}

// pendingLimit is how long a proxy may take to answer before that is a finding.
const pendingLimit = 10 * time.Second

func (c *checking) checkProxies(ctx context.Context) []*api.Finding {
	var out []*api.Finding
	synced := 0
	for _, p := range c.proxies(ctx) {
		if !c.wants(p.GetCluster()) {
			continue
		}
		found := c.proxyFindings(p)
		if len(found) == 0 {
			synced++
		}
		out = append(out, found...)
	}
	if synced > 0 {
		out = append(out, good("%d in sync", synced))
	}
	return out
}

func (c *checking) proxyFindings(p *api.Proxy) []*api.Finding {
	var out []*api.Finding
	subject := p.GetMetadata().GetNamespace() + "/" + p.GetMetadata().GetName()
	for _, t := range p.GetTypes() {
		if t.GetState() == "rejected" {
			out = append(out, &api.Finding{Code: string(api.ProxyRejected), Severity: severityError, Subject: subject,
				Message: t.GetType() + " " + t.GetError(), Since: t.GetSince()})
		}
	}
	behind := p.GetBehindSince()
	if len(out) == 0 && behind != nil && c.cfg.Clock().Sub(behind.AsTime()) > pendingLimit {
		out = append(out, &api.Finding{Code: string(api.ProxyPending), Severity: severityWarning, Subject: subject,
			Message: "has not acknowledged its configuration", Since: behind})
	}
	return out
}

func (c *checking) checkVMs(ctx context.Context) []*api.Finding {
	list, err := c.ListVMs(ctx, &api.ListVMsRequest{})
	if err != nil {
		return []*api.Finding{{Severity: severityWarning, Message: err.Error()}}
	}
	var out []*api.Finding
	healthy := 0
	for _, v := range list.GetItems() {
		f := &api.Finding{Severity: severityWarning, Subject: v.GetMetadata().GetName(), Message: v.GetStatus().GetMessage()}
		switch v.GetStatus().GetPhase() {
		case "Unhealthy":
			f.Code = string(api.VMUnhealthy)
		case "Lost":
			f.Code = string(api.VMLost)
		case "Expired":
			f.Code = string(api.VMTokenExpired)
		default:
			healthy++
			continue
		}
		out = append(out, f)
	}
	if healthy > 0 {
		out = append(out, good("%s", plural(healthy, "virtual machine", "virtual machines")))
	}
	return out
}
