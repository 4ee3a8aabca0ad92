// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
)

// problems collects what cannot be meant: "field: value, want …".
type problems []string

func (p *problems) add(field string, value any, want string, args ...any) {
	*p = append(*p, fmt.Sprintf("%s: %v, want %s", field, value, fmt.Sprintf(want, args...)))
}

// validate checks what the translated kinds mean; the schema has been checked before.
// It refuses what Istio's own validation refuses, where that decides what traffic does.
func validate(d *Object) []string {
	var p problems
	switch spec := d.Spec.(type) {
	case *networking.VirtualService:
		p.virtualService(spec)
	case *networking.DestinationRule:
		p.destinationRule(spec)
	case *networking.Sidecar:
		p.sidecar(spec)
	case *security.PeerAuthentication:
		p.peerAuthentication(spec)
	}
	return p
}

func (p *problems) exportTo(list []string) {
	for i, to := range list {
		if to == "" || strings.ContainsAny(to, "/ ") {
			p.add(fmt.Sprintf("spec.exportTo[%d]", i), quote(to), `a namespace, ".", "*" or "~"`)
		}
	}
}

func (p *problems) host(field, host string) {
	if host == "" || strings.Contains(strings.TrimPrefix(host, "*"), "*") || strings.ContainsAny(host, " /") {
		p.add(field, quote(host), "a host name, or one that begins with *")
	}
}

func (p *problems) positive(field string, d *durationpb.Duration, least time.Duration) {
	if d != nil && (!d.IsValid() || d.AsDuration() < least) {
		p.add(field, d.AsDuration(), "at least %s", least)
	}
}

func (p *problems) virtualService(v *networking.VirtualService) {
	p.exportTo(v.ExportTo)
	for i, h := range v.Hosts {
		p.host(fmt.Sprintf("spec.hosts[%d]", i), h)
	}
	if len(v.Http)+len(v.Tls)+len(v.Tcp) == 0 {
		p.add("spec.http", "none", "at least one route in http, tls or tcp")
	}
	for i, r := range v.Http {
		p.httpRoute(fmt.Sprintf("spec.http[%d]", i), r)
	}
	for i, r := range v.Tls {
		field := fmt.Sprintf("spec.tls[%d]", i)
		if len(r.Match) == 0 {
			p.add(field+".match", "none", "at least one with sniHosts")
		}
		p.routes(field, r.Route)
	}
	for i, r := range v.Tcp {
		p.routes(fmt.Sprintf("spec.tcp[%d]", i), r.Route)
	}
}

func (p *problems) routes(field string, routes []*networking.RouteDestination) {
	weights := make([]int32, len(routes))
	for i, r := range routes {
		weights[i] = r.Weight
		p.destination(fmt.Sprintf("%s.route[%d].destination", field, i), r.Destination)
	}
	if len(routes) == 0 {
		p.add(field+".route", "none", "at least one destination")
	}
	p.weights(field, weights)
}

func (p *problems) weights(field string, weights []int32) {
	sum := int64(0)
	for i, w := range weights {
		sum += int64(w)
		if w < 0 {
			p.add(fmt.Sprintf("%s.route[%d].weight", field, i), w, "0 or more")
		}
	}
	if len(weights) > 1 && sum == 0 {
		p.add(field+".route", "all weights 0", "at least one above 0")
	}
	if sum > 1<<31 {
		p.add(field+".route", sum, "weights that add up to at most %d", 1<<31)
	}
}

func (p *problems) destination(field string, d *networking.Destination) {
	if d == nil {
		p.add(field, "none", "a host")
		return
	}
	p.host(field+".host", d.Host)
	if strings.HasPrefix(d.Host, "*") {
		p.add(field+".host", quote(d.Host), "a host without wildcard")
	}
	if d.Port != nil && (d.Port.Number == 0 || d.Port.Number > 65535) {
		p.add(field+".port.number", d.Port.Number, "1 to 65535")
	}
}

func (p *problems) httpRoute(field string, r *networking.HTTPRoute) {
	actions := 0
	for _, set := range []bool{len(r.Route) > 0, r.Redirect != nil, r.DirectResponse != nil, r.Delegate != nil} {
		if set {
			actions++
		}
	}
	if actions != 1 {
		p.add(field, fmt.Sprintf("%d actions", actions), "exactly one of route, redirect, directResponse, delegate")
	}
	weights := make([]int32, len(r.Route))
	for i, d := range r.Route {
		weights[i] = d.Weight
		p.destination(fmt.Sprintf("%s.route[%d].destination", field, i), d.Destination)
	}
	p.weights(field, weights)
	p.positive(field+".timeout", r.Timeout, 0)
	if t := r.Retries; t != nil {
		if t.Attempts < 0 {
			p.add(field+".retries.attempts", t.Attempts, "0 or more")
		}
		p.positive(field+".retries.perTryTimeout", t.PerTryTimeout, time.Millisecond)
		p.positive(field+".retries.backoff", t.Backoff, time.Millisecond)
	}
	if a := r.DirectResponse; a != nil && (a.Status < 200 || a.Status > 599) {
		p.add(field+".directResponse.status", a.Status, "200 to 599")
	}
	if x := r.Rewrite.GetUriRegexRewrite(); x != nil {
		p.regex(field+".rewrite.uriRegexRewrite.match", x.Match)
	}
	if r.Mirror != nil {
		p.destination(field+".mirror", r.Mirror)
	}
	for i, m := range r.Mirrors {
		p.destination(fmt.Sprintf("%s.mirrors[%d].destination", field, i), m.Destination)
		p.percent(fmt.Sprintf("%s.mirrors[%d].percentage.value", field, i), m.Percentage)
	}
	p.percent(field+".mirrorPercentage.value", r.MirrorPercentage)
	for i, m := range r.Match {
		p.httpMatch(fmt.Sprintf("%s.match[%d]", field, i), m)
	}
}

func (p *problems) percent(field string, v *networking.Percent) {
	if v != nil && (v.Value < 0 || v.Value > 100) {
		p.add(field, v.Value, "0 to 100")
	}
}

func (p *problems) httpMatch(field string, m *networking.HTTPMatchRequest) {
	if m.Port > 65535 {
		p.add(field+".port", m.Port, "at most 65535")
	}
	p.stringMatch(field+".uri", m.Uri)
	p.stringMatch(field+".scheme", m.Scheme)
	p.stringMatch(field+".method", m.Method)
	p.stringMatch(field+".authority", m.Authority)
	for name, group := range map[string]map[string]*networking.StringMatch{
		"headers": m.Headers, "withoutHeaders": m.WithoutHeaders, "queryParams": m.QueryParams,
	} {
		for key, s := range group {
			if key == "" {
				p.add(field+"."+name, `""`, "a name")
			}
			p.stringMatch(fmt.Sprintf("%s.%s[%s]", field, name, key), s)
		}
	}
}

func (p *problems) stringMatch(field string, s *networking.StringMatch) {
	if re, ok := s.GetMatchType().(*networking.StringMatch_Regex); ok {
		p.regex(field+".regex", re.Regex)
	}
}

// regex takes RE2 only, whose matching time is bounded; Envoy has the same syntax.
func (p *problems) regex(field, re string) {
	if len(re) > 1024 {
		p.add(field, fmt.Sprintf("%d bytes", len(re)), "at most 1024")
		return
	}
	if _, err := regexp.Compile(re); err != nil {
		p.add(field, quote(re), "an RE2 expression: %v", err)
	}
}

func (p *problems) destinationRule(r *networking.DestinationRule) {
	p.exportTo(r.ExportTo)
	p.host("spec.host", r.Host)
	p.policy("spec.trafficPolicy", r.TrafficPolicy)
	seen := map[string]bool{}
	for i, s := range r.Subsets {
		field := fmt.Sprintf("spec.subsets[%d]", i)
		if s.Name == "" || strings.ContainsAny(s.Name, "|_ /") {
			p.add(field+".name", quote(s.Name), "a name without | _ / and spaces")
		}
		if seen[s.Name] {
			p.add(field+".name", quote(s.Name), "a name of its own")
		}
		seen[s.Name] = true
		p.policy(field+".trafficPolicy", s.TrafficPolicy)
	}
}

func (p *problems) policy(field string, t *networking.TrafficPolicy) {
	if t == nil {
		return
	}
	p.settings(field, t.LoadBalancer, t.ConnectionPool, t.OutlierDetection, t.Tls)
	for i, port := range t.PortLevelSettings {
		at := fmt.Sprintf("%s.portLevelSettings[%d]", field, i)
		if n := port.Port.GetNumber(); n == 0 || n > 65535 {
			p.add(at+".port.number", n, "1 to 65535")
		}
		p.settings(at, port.LoadBalancer, port.ConnectionPool, port.OutlierDetection, port.Tls)
	}
}

func (p *problems) settings(field string, lb *networking.LoadBalancerSettings, pool *networking.ConnectionPoolSettings,
	outlier *networking.OutlierDetection, tls *networking.ClientTLSSettings) {
	if h := lb.GetConsistentHash(); h != nil && h.HashKey == nil {
		p.add(field+".loadBalancer.consistentHash", "no key", "httpHeaderName, httpCookie, useSourceIp or httpQueryParameterName")
	}
	p.positive(field+".connectionPool.tcp.connectTimeout", pool.GetTcp().GetConnectTimeout(), time.Millisecond)
	for name, n := range map[string]int32{
		"tcp.maxConnections": pool.GetTcp().GetMaxConnections(), "http.http1MaxPendingRequests": pool.GetHttp().GetHttp1MaxPendingRequests(),
		"http.http2MaxRequests": pool.GetHttp().GetHttp2MaxRequests(), "http.maxRequestsPerConnection": pool.GetHttp().GetMaxRequestsPerConnection(),
		"http.maxRetries": pool.GetHttp().GetMaxRetries(),
	} {
		if n < 0 {
			p.add(field+".connectionPool."+name, n, "0 or more")
		}
	}
	if o := outlier; o != nil {
		p.positive(field+".outlierDetection.interval", o.Interval, time.Millisecond)
		p.positive(field+".outlierDetection.baseEjectionTime", o.BaseEjectionTime, time.Millisecond)
		for name, n := range map[string]int32{"maxEjectionPercent": o.MaxEjectionPercent, "minHealthPercent": o.MinHealthPercent} {
			if n < 0 || n > 100 {
				p.add(field+".outlierDetection."+name, n, "0 to 100")
			}
		}
	}
	if t := tls; t != nil && t.Mode == networking.ClientTLSSettings_MUTUAL && t.CredentialName == "" && cmp.Or(t.ClientCertificate, t.PrivateKey) == "" {
		p.add(field+".tls.mode", "MUTUAL", "clientCertificate and privateKey beside it")
	}
}

func (p *problems) sidecar(s *networking.Sidecar) {
	for i, e := range s.Egress {
		if len(e.Hosts) == 0 {
			p.add(fmt.Sprintf("spec.egress[%d].hosts", i), "none", "at least one namespace/host")
		}
		for j, h := range e.Hosts {
			field := fmt.Sprintf("spec.egress[%d].hosts[%d]", i, j)
			ns, name, ok := strings.Cut(h, "/")
			if !ok || ns == "" || strings.Contains(name, "/") {
				p.add(field, quote(h), `namespace/host, such as "./*" or "*/cart.shop.svc.cluster.local"`)
				continue
			}
			p.host(field, name)
		}
	}
}

func (p *problems) peerAuthentication(a *security.PeerAuthentication) {
	if len(a.PortLevelMtls) > 0 && len(a.Selector.GetMatchLabels()) == 0 {
		p.add("spec.portLevelMtls", "without a selector", "selector.matchLabels beside it: ports are a workload's")
	}
	for _, port := range slices.Sorted(maps.Keys(a.PortLevelMtls)) {
		if port == 0 || port > 65535 {
			p.add(fmt.Sprintf("spec.portLevelMtls[%d]", port), port, "1 to 65535")
		}
	}
}

func quote(s string) string {
	if len(s) > 60 {
		s = s[:60] + "…"
	}
	return fmt.Sprintf("%q", s)
}
