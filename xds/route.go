// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	previousv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1alpha3"
)

// defaultRetryOn are the failures after which a request may be tried again although the
// user said nothing, as in Istio.
const defaultRetryOn = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes,reset-before-request"

// routeName is the name of a service port's route configuration, as Istio spells it where
// a listener has one service.
func routeName(host string, port uint32) string { return fmt.Sprintf("%s:%d", host, port) }

// routeConfiguration has one virtual host for every name: the address that was dialled
// has already said which service is meant.
func routeConfiguration(name string, routes []*routev3.Route) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{
		Name:             name,
		VirtualHosts:     []*routev3.VirtualHost{{Name: name, Domains: []string{"*"}, Routes: routes, IncludeRequestAttemptCount: true}},
		ValidateClusters: wrapperspb.Bool(false),
	}
}

// defaultRoute sends everything to one cluster.
func (p *packer) defaultRoute(cluster string) *routev3.Route {
	action := p.routeAction()
	action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: cluster}
	return &routev3.Route{
		Name:   "default",
		Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action: &routev3.Route_Route{Route: action},
	}
}

// routeAction has no time limit, and the default retries.
func (p *packer) routeAction() *routev3.RouteAction {
	return &routev3.RouteAction{
		Timeout: durationpb.New(0),
		MaxStreamDuration: &routev3.RouteAction_MaxStreamDuration{
			MaxStreamDuration:    durationpb.New(0),
			GrpcTimeoutHeaderMax: durationpb.New(0),
		},
		RetryPolicy: p.retries(defaultRetryOn, 2, []uint32{503}),
	}
}

// retries are tried on another host where there is one.
func (p *packer) retries(on string, attempts uint32, codes []uint32) *routev3.RetryPolicy {
	return &routev3.RetryPolicy{
		RetryOn:              on,
		NumRetries:           wrapperspb.UInt32(attempts),
		RetriableStatusCodes: codes,
		RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
			Name: "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{
				TypedConfig: p.any(&previousv3.PreviousHostsPredicate{}),
			},
		}},
		HostSelectionRetryMaxAttempts: 5,
	}
}

// clusterOf names the cluster of a destination of a VirtualService, or says why it has none.
type clusterOf func(*networking.Destination) (string, error)

// caller is what matches of a VirtualService may ask about who calls, and where.
type caller struct {
	namespace string
	labels    map[string]string
	port      uint32
}

// virtualRoutes are the HTTP routes of a VirtualService for one caller, in their order.
// What Envoy is not told is listed in notes.
func (p *packer) virtualRoutes(routes []*networking.HTTPRoute, who caller, cluster clusterOf) (out []*routev3.Route, notes []string) {
	for i, r := range routes {
		name := r.Name
		if name == "" {
			name = fmt.Sprintf("http[%d]", i)
		}
		made, err := p.httpRoute(r, name, who, cluster)
		if err != nil {
			notes = append(notes, fmt.Sprintf("spec.http[%d]: %v; the route is left out", i, err))
			continue
		}
		out = append(out, made...)
		for field, set := range map[string]bool{"fault": r.Fault != nil, "corsPolicy": r.CorsPolicy != nil, "delegate": r.Delegate != nil} {
			if set {
				notes = append(notes, fmt.Sprintf("spec.http[%d].%s: not translated yet; the rest of the route is in effect", i, field))
			}
		}
	}
	return out, notes
}

// httpRoute makes one Envoy route for each match that can apply to the caller.
func (p *packer) httpRoute(r *networking.HTTPRoute, name string, who caller, cluster clusterOf) ([]*routev3.Route, error) {
	matches := []*routev3.RouteMatch{}
	if len(r.Match) == 0 {
		matches = append(matches, &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}})
	}
	for i, m := range r.Match {
		if !applies(m, who) {
			continue
		}
		match, err := routeMatch(m)
		if err != nil {
			return nil, fmt.Errorf("match[%d]: %w", i, err)
		}
		matches = append(matches, match)
	}
	var out []*routev3.Route
	for _, match := range matches {
		route := &routev3.Route{Name: name, Match: match}
		if err := p.act(route, r, cluster); err != nil {
			return nil, err
		}
		changeHeaders(route, r.Headers)
		out = append(out, route)
	}
	return out, nil
}

// applies tells whether a match can be true for the caller at all.
func applies(m *networking.HTTPMatchRequest, who caller) bool {
	if m.Port != 0 && m.Port != who.port {
		return false
	}
	if m.SourceNamespace != "" && m.SourceNamespace != who.namespace {
		return false
	}
	for k, v := range m.SourceLabels {
		if who.labels[k] != v {
			return false
		}
	}
	if len(m.Gateways) == 0 {
		return true
	}
	for _, g := range m.Gateways {
		if g == "mesh" {
			return true
		}
	}
	return false
}

func routeMatch(m *networking.HTTPMatchRequest) (*routev3.RouteMatch, error) {
	out := &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}
	if m.IgnoreUriCase {
		out.CaseSensitive = wrapperspb.Bool(false)
	}
	switch uri := m.Uri.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: uri.Exact}
	case *networking.StringMatch_Prefix:
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: uri.Prefix}
	case *networking.StringMatch_Regex:
		re, err := regex(uri.Regex)
		if err != nil {
			return nil, fmt.Errorf("uri.regex: %w", err)
		}
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: re}
	}
	headers := newHeaderMatches()
	for name, s := range m.Headers {
		headers.add(name, s, false)
	}
	for name, s := range m.WithoutHeaders {
		headers.add(name, s, true)
	}
	for name, s := range map[string]*networking.StringMatch{":method": m.Method, ":authority": m.Authority, ":scheme": m.Scheme} {
		if s != nil {
			headers.add(name, s, false)
		}
	}
	for name, s := range m.QueryParams {
		headers.addQuery(name, s)
	}
	out.Headers, out.QueryParameters = headers.headers(), headers.queries()
	return out, headers.err
}

func regex(s string) (*matcherv3.RegexMatcher, error) {
	if _, err := regexp.Compile(s); err != nil {
		return nil, fmt.Errorf("%q is no RE2 expression: %w", s, err)
	}
	return &matcherv3.RegexMatcher{Regex: s}, nil
}

// act gives the route what it does: redirect, answer, or forward.
func (p *packer) act(route *routev3.Route, r *networking.HTTPRoute, cluster clusterOf) error {
	switch {
	case r.Redirect != nil:
		return redirect(route, r.Redirect)
	case r.DirectResponse != nil:
		answer := &routev3.DirectResponseAction{Status: r.DirectResponse.Status}
		if body := r.DirectResponse.Body; body != nil {
			answer.Body = &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: body.GetString_()}}
			if b := body.GetBytes(); len(b) > 0 {
				answer.Body.Specifier = &corev3.DataSource_InlineBytes{InlineBytes: b}
			}
		}
		route.Action = &routev3.Route_DirectResponse{DirectResponse: answer}
		return nil
	case len(r.Route) == 0:
		return fmt.Errorf("route: has no destination; give at least one")
	}
	action := p.routeAction()
	if err := p.destinations(action, r, cluster); err != nil {
		return err
	}
	if r.Timeout != nil {
		action.Timeout = r.Timeout
	}
	if r.Retries != nil {
		p.retry(action, r.Retries)
	}
	if err := rewrite(action, r.Rewrite); err != nil {
		return err
	}
	route.Action = &routev3.Route_Route{Route: action}
	return nil
}

// destinations shares the requests by weight, and copies them to mirrors.
func (p *packer) destinations(action *routev3.RouteAction, r *networking.HTTPRoute, cluster clusterOf) error {
	weighted := &routev3.WeightedCluster{}
	for i, d := range r.Route {
		name, err := cluster(d.Destination)
		if err != nil {
			return fmt.Errorf("route[%d].destination: %w", i, err)
		}
		weight := uint32(max(0, d.Weight))
		if len(r.Route) == 1 && weight == 0 {
			weight = 1
		}
		if weight == 0 {
			continue
		}
		w := &routev3.WeightedCluster_ClusterWeight{Name: name, Weight: wrapperspb.UInt32(weight)}
		h := headerOperations(d.Headers)
		w.RequestHeadersToAdd, w.RequestHeadersToRemove = h.requestAdd, h.requestRemove
		w.ResponseHeadersToAdd, w.ResponseHeadersToRemove = h.responseAdd, h.responseRemove
		weighted.Clusters = append(weighted.Clusters, w)
	}
	if len(weighted.Clusters) == 0 {
		return fmt.Errorf("route: all weights are 0; give at least one destination a weight")
	}
	action.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: weighted}
	for i, m := range append(mirrorOf(r), r.Mirrors...) {
		name, err := cluster(m.Destination)
		if err != nil {
			return fmt.Errorf("mirrors[%d].destination: %w", i, err)
		}
		share := 100.0
		if m.Percentage != nil {
			share = m.Percentage.Value
		}
		action.RequestMirrorPolicies = append(action.RequestMirrorPolicies, &routev3.RouteAction_RequestMirrorPolicy{
			Cluster: name,
			RuntimeFraction: &corev3.RuntimeFractionalPercent{DefaultValue: &typev3.FractionalPercent{
				Numerator: uint32(share * 10000), Denominator: typev3.FractionalPercent_MILLION,
			}},
		})
	}
	return nil
}

func mirrorOf(r *networking.HTTPRoute) []*networking.HTTPMirrorPolicy {
	if r.Mirror == nil {
		return nil
	}
	return []*networking.HTTPMirrorPolicy{{Destination: r.Mirror, Percentage: r.MirrorPercentage}}
}

// retry applies the user's retries.
func (p *packer) retry(action *routev3.RouteAction, r *networking.HTTPRetry) {
	if r.Attempts <= 0 {
		action.RetryPolicy = nil
		return
	}
	on, codes := defaultRetryOn, []uint32{503}
	if r.RetryOn != "" {
		on, codes = splitRetryOn(r.RetryOn)
	}
	action.RetryPolicy = p.retries(on, uint32(r.Attempts), codes)
	action.RetryPolicy.PerTryTimeout = r.PerTryTimeout
	if r.Backoff != nil && r.Backoff.AsDuration() > 0 {
		action.RetryPolicy.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: r.Backoff}
	}
}

// splitRetryOn separates status codes, which Istio allows in the list, from policies.
func splitRetryOn(list string) (string, []uint32) {
	var on []string
	var codes []uint32
	for _, item := range strings.Split(list, ",") {
		item = strings.TrimSpace(item)
		var code uint32
		if n, err := fmt.Sscanf(item, "%d", &code); n == 1 && err == nil && code >= 100 && code < 600 {
			codes = append(codes, code)
		} else if item != "" {
			on = append(on, item)
		}
	}
	if len(codes) > 0 {
		on = append(on, "retriable-status-codes")
	}
	return strings.Join(on, ","), codes
}

func rewrite(action *routev3.RouteAction, r *networking.HTTPRewrite) error {
	if r == nil {
		return nil
	}
	if r.Uri != "" {
		action.PrefixRewrite = r.Uri
	}
	if u := r.UriRegexRewrite; u != nil {
		re, err := regex(u.Match)
		if err != nil {
			return fmt.Errorf("rewrite.uriRegexRewrite.match: %w", err)
		}
		action.PrefixRewrite = ""
		action.RegexRewrite = &matcherv3.RegexMatchAndSubstitute{Pattern: re, Substitution: u.Rewrite}
	}
	if r.Authority != "" {
		action.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: r.Authority}
	}
	return nil
}

func redirect(route *routev3.Route, r *networking.HTTPRedirect) error {
	action := &routev3.RedirectAction{HostRedirect: r.Authority}
	if r.Uri != "" {
		action.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: r.Uri}
	}
	if r.Scheme != "" {
		action.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: r.Scheme}
	}
	if port := r.GetPort(); port != 0 {
		action.PortRedirect = port
	}
	codes := map[uint32]routev3.RedirectAction_RedirectResponseCode{
		0: routev3.RedirectAction_MOVED_PERMANENTLY, 301: routev3.RedirectAction_MOVED_PERMANENTLY,
		302: routev3.RedirectAction_FOUND, 303: routev3.RedirectAction_SEE_OTHER,
		307: routev3.RedirectAction_TEMPORARY_REDIRECT, 308: routev3.RedirectAction_PERMANENT_REDIRECT,
	}
	code, ok := codes[r.RedirectCode]
	if !ok {
		return fmt.Errorf("redirect.redirectCode: %d is not 301, 302, 303, 307 or 308", r.RedirectCode)
	}
	action.ResponseCode = code
	route.Action = &routev3.Route_Redirect{Redirect: action}
	return nil
}

// hashPolicies render what a DestinationRule hashes requests by.
func hashPolicies(h *networking.LoadBalancerSettings_ConsistentHashLB) []*routev3.RouteAction_HashPolicy {
	switch key := h.GetHashKey().(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
		return []*routev3.RouteAction_HashPolicy{{PolicySpecifier: &routev3.RouteAction_HashPolicy_Header_{
			Header: &routev3.RouteAction_HashPolicy_Header{HeaderName: key.HttpHeaderName},
		}}}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
		cookie := &routev3.RouteAction_HashPolicy_Cookie{Name: key.HttpCookie.Name, Path: key.HttpCookie.Path}
		if key.HttpCookie.Ttl != nil {
			cookie.Ttl = durationpb.New(key.HttpCookie.Ttl.AsDuration().Truncate(time.Second))
		}
		return []*routev3.RouteAction_HashPolicy{{PolicySpecifier: &routev3.RouteAction_HashPolicy_Cookie_{Cookie: cookie}}}
	case *networking.LoadBalancerSettings_ConsistentHashLB_UseSourceIp:
		if key.UseSourceIp {
			return []*routev3.RouteAction_HashPolicy{{PolicySpecifier: &routev3.RouteAction_HashPolicy_ConnectionProperties_{
				ConnectionProperties: &routev3.RouteAction_HashPolicy_ConnectionProperties{SourceIp: true},
			}}}
		}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
		return []*routev3.RouteAction_HashPolicy{{PolicySpecifier: &routev3.RouteAction_HashPolicy_QueryParameter_{
			QueryParameter: &routev3.RouteAction_HashPolicy_QueryParameter{Name: key.HttpQueryParameterName},
		}}}
	}
	return nil
}
