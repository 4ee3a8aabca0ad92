// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// fields are the paths of a kind's spec that have an effect, without list indexes; a path
// covers all that is below it. What a user sets and is not here is reported as not
// translated yet, so that a field of a newer API can never be ignored silently. The
// tables follow package xds.
type fields []string

var peerAuthenticationFields = fields{"selector", "mtls", "portLevelMtls"}

var sidecarFields = fields{"workloadSelector", "egress.hosts", "outboundTrafficPolicy.mode"}

var virtualServiceFields = fields{
	"hosts", "gateways", "exportTo",
	"http.name", "http.route", "http.redirect", "http.directResponse", "http.rewrite", "http.timeout", "http.headers",
	"http.mirror", "http.mirrors", "http.mirrorPercentage",
	"http.retries.attempts", "http.retries.perTryTimeout", "http.retries.retryOn", "http.retries.backoff",
	"http.match.name", "http.match.uri", "http.match.scheme", "http.match.method", "http.match.authority",
	"http.match.headers", "http.match.withoutHeaders", "http.match.queryParams", "http.match.ignoreUriCase",
	"http.match.port", "http.match.gateways", "http.match.sourceLabels", "http.match.sourceNamespace",
}

var destinationRuleFields = append(fields{
	"host", "exportTo", "workloadSelector", "subsets.name", "subsets.labels", "trafficPolicy.portLevelSettings.port",
	"subsets.trafficPolicy.portLevelSettings.port",
}, policyFields("trafficPolicy.", "trafficPolicy.portLevelSettings.", "subsets.trafficPolicy.", "subsets.trafficPolicy.portLevelSettings.")...)

// policyFields are those of a traffic policy, wherever one may stand.
func policyFields(prefixes ...string) fields {
	policy := fields{
		"loadBalancer.simple", "loadBalancer.consistentHash", "loadBalancer.warmupDurationSecs",
		"connectionPool.tcp.maxConnections", "connectionPool.tcp.connectTimeout", "connectionPool.tcp.tcpKeepalive",
		"connectionPool.http.http1MaxPendingRequests", "connectionPool.http.http2MaxRequests", "connectionPool.http.maxRequestsPerConnection",
		"connectionPool.http.maxRetries", "connectionPool.http.idleTimeout", "connectionPool.http.h2UpgradePolicy",
		"outlierDetection.splitExternalLocalOriginErrors", "outlierDetection.consecutiveLocalOriginFailures",
		"outlierDetection.consecutiveGatewayErrors", "outlierDetection.consecutive5xxErrors", "outlierDetection.interval",
		"outlierDetection.baseEjectionTime", "outlierDetection.maxEjectionPercent", "outlierDetection.minHealthPercent",
		"tls.mode", "tls.clientCertificate", "tls.privateKey", "tls.caCertificates", "tls.subjectAltNames", "tls.sni", "tls.insecureSkipVerify",
	}
	var out fields
	for _, prefix := range prefixes {
		for _, f := range policy {
			out = append(out, prefix+f)
		}
	}
	return out
}

// missing are the fields that are set in a message but have no effect, as paths with
// indexes.
func (f fields) missing(m proto.Message) []string {
	var out []string
	f.walk(m.ProtoReflect(), "", "spec", &out)
	slices.Sort(out)
	return out
}

func (f fields) walk(m protoreflect.Message, path, shown string, out *[]string) {
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		at, seen := path+field.JSONName(), shown+"."+field.JSONName()
		switch covered, below := f.covers(at); {
		case covered:
		case !below || field.Kind() != protoreflect.MessageKind || field.IsMap():
			*out = append(*out, seen)
		case field.IsList():
			for i := range v.List().Len() {
				f.walk(v.List().Get(i).Message(), at+".", fmt.Sprintf("%s[%d]", seen, i), out)
			}
		default:
			f.walk(v.Message(), at+".", seen, out)
		}
		return true
	})
}

// covers tells whether a path has an effect, or something below it.
func (f fields) covers(path string) (covered, below bool) {
	for _, known := range f {
		if known == path {
			return true, true
		}
		below = below || strings.HasPrefix(known, path+".")
	}
	return false, below
}
