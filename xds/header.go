// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	networking "istio.io/api/networking/v1alpha3"
)

// headerMatches gathers matches from maps and gives them back ordered, so that equal
// input makes equal bytes.
type headerMatches struct {
	byName map[string]*routev3.HeaderMatcher
	query  map[string]*routev3.QueryParameterMatcher
	err    error
}

func newHeaderMatches() *headerMatches {
	return &headerMatches{byName: map[string]*routev3.HeaderMatcher{}, query: map[string]*routev3.QueryParameterMatcher{}}
}

func (h *headerMatches) add(name string, s *networking.StringMatch, invert bool) {
	m := &routev3.HeaderMatcher{Name: strings.ToLower(name), InvertMatch: invert, TreatMissingHeaderAsEmpty: invert}
	if match := h.stringMatcher(name, s); match != nil {
		m.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: match}
	} else {
		m.TreatMissingHeaderAsEmpty = false
		m.HeaderMatchSpecifier = &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}
	}
	key := m.Name
	if invert {
		key += " not"
	}
	h.byName[key] = m
}

func (h *headerMatches) addQuery(name string, s *networking.StringMatch) {
	m := &routev3.QueryParameterMatcher{Name: name}
	if match := h.stringMatcher(name, s); match != nil {
		m.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_StringMatch{StringMatch: match}
	} else {
		m.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_PresentMatch{PresentMatch: true}
	}
	h.query[name] = m
}

// stringMatcher is nil for a match that asks only for presence: none, or an empty prefix
// or regular expression.
func (h *headerMatches) stringMatcher(name string, s *networking.StringMatch) *matcherv3.StringMatcher {
	switch m := s.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		return exactly(m.Exact)
	case *networking.StringMatch_Prefix:
		if m.Prefix != "" {
			return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: m.Prefix}}
		}
	case *networking.StringMatch_Regex:
		if m.Regex == "" || m.Regex == "*" {
			return nil
		}
		re, err := regex(m.Regex)
		if err != nil {
			if h.err == nil {
				h.err = fmt.Errorf("%s: %w", name, err)
			}
			return nil
		}
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: re}}
	}
	return nil
}

func (h *headerMatches) headers() []*routev3.HeaderMatcher {
	var out []*routev3.HeaderMatcher
	for _, k := range slices.Sorted(maps.Keys(h.byName)) {
		out = append(out, h.byName[k])
	}
	return out
}

func (h *headerMatches) queries() []*routev3.QueryParameterMatcher {
	var out []*routev3.QueryParameterMatcher
	for _, k := range slices.Sorted(maps.Keys(h.query)) {
		out = append(out, h.query[k])
	}
	return out
}

type headerChange struct {
	requestAdd, responseAdd       []*corev3.HeaderValueOption
	requestRemove, responseRemove []string
}

func headerOperations(h *networking.Headers) headerChange {
	var c headerChange
	c.requestAdd, c.requestRemove = operations(h.GetRequest())
	c.responseAdd, c.responseRemove = operations(h.GetResponse())
	return c
}

func operations(o *networking.Headers_HeaderOperations) (change []*corev3.HeaderValueOption, remove []string) {
	put := func(m map[string]string, action corev3.HeaderValueOption_HeaderAppendAction) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			change = append(change, &corev3.HeaderValueOption{
				Header: &corev3.HeaderValue{Key: k, Value: m[k]}, AppendAction: action,
			})
		}
	}
	put(o.GetSet(), corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)
	put(o.GetAdd(), corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD)
	return change, o.GetRemove()
}

// changeHeaders applies the header operations of a whole route.
func changeHeaders(route *routev3.Route, h *networking.Headers) {
	c := headerOperations(h)
	// A host header is not one to add: Envoy rewrites it in the action.
	kept := c.requestAdd[:0]
	for _, o := range c.requestAdd {
		if name := strings.ToLower(o.Header.Key); name == "host" || name == ":authority" {
			if action := route.GetRoute(); action != nil {
				action.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: o.Header.Value}
			}
			continue
		}
		kept = append(kept, o)
	}
	route.RequestHeadersToAdd, route.RequestHeadersToRemove = kept, c.requestRemove
	route.ResponseHeadersToAdd, route.ResponseHeadersToRemove = c.responseAdd, c.responseRemove
}
