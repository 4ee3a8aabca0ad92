// SPDX-License-Identifier: Apache-2.0

package xds

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// AccessLogKey is the key in an Envoy's runtime that turns its access log on: the share of
// requests and connections that are written to standard output, in percent. Every proxy
// is told the log, and none writes it unless its own bootstrap, or a person at its admin
// port (POST /runtime_modify?isthmus.access_log=100), says so. So it can be had from one
// proxy, at once, without a change of configuration for anybody.
const AccessLogKey = "isthmus.access_log"

// AccessLogFormat is the format unless meshd is told another: one line for each request or
// connection, with what it takes to find the other end and why it failed.
const AccessLogFormat = `[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% ` +
	`%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" ` +
	`%BYTES_RECEIVED% %BYTES_SENT% %DURATION% "%REQ(:AUTHORITY)%" from %DOWNSTREAM_REMOTE_ADDRESS% "%DOWNSTREAM_PEER_URI_SAN%" ` +
	`to %UPSTREAM_CLUSTER% %UPSTREAM_HOST% "%UPSTREAM_PEER_URI_SAN%" sni %REQUESTED_SERVER_NAME% id %REQ(X-REQUEST-ID)%`

// ErrAccessLog means that Envoy would not take an access log's format, and with it no
// listener that has one.
var ErrAccessLog = errors.New("invalid access log format")

// AccessLog makes Envoy write a line of a format (without a line end) for each request or
// connection; empty means AccessLogFormat.
func AccessLog(format string) ([]*accesslogv3.AccessLog, error) {
	if format == "" {
		format = AccessLogFormat
	}
	stdout := &anypb.Any{}
	err := anypb.MarshalFrom(stdout, &streamv3.StdoutAccessLog{AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{
		LogFormat: &corev3.SubstitutionFormatString{Format: &corev3.SubstitutionFormatString_TextFormatSource{
			TextFormatSource: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: format + "\n"}},
		}},
	}}, proto.MarshalOptions{Deterministic: true})
	return []*accesslogv3.AccessLog{{
		Name:       "envoy.access_loggers.stdout",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: stdout},
		Filter: &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_RuntimeFilter{
			RuntimeFilter: &accesslogv3.RuntimeFilter{
				RuntimeKey: AccessLogKey, PercentSampled: &typev3.FractionalPercent{}, UseIndependentRandomness: true,
			},
		}},
	}}, err
}

// accessLog is AccessLog in the format of the build.
func (p *packer) accessLog() []*accesslogv3.AccessLog {
	log, err := AccessLog(p.logFormat)
	if err != nil && p.err == nil {
		p.err = err
	}
	return log
}

// formatCommand is what Envoy replaces in a format: %NAME%, %NAME(argument)%, %NAME(argument):LENGTH%.
var formatCommand = regexp.MustCompile(`%([A-Z0-9_]+)(\([^()%]*\))?(:[0-9]+)?%`)

// CheckAccessLogFormat refuses a format with commands that Envoy does not have.
func CheckAccessLogFormat(format string) error {
	for _, m := range formatCommand.FindAllStringSubmatch(format, -1) {
		known := slices.Contains(formatCommands, m[1])
		for _, of := range []string{"UPSTREAM_", "DOWNSTREAM_"} {
			name, has := strings.CutPrefix(m[1], of)
			known = known || has && slices.Contains(formatEnds[of], name)
		}
		if !known {
			return fmt.Errorf("%w: %s is no command that may be used here; see Envoy's documentation of access log formats", ErrAccessLog, m[0])
		}
		if slices.Contains(needArgument, m[1]) != (m[2] != "") && m[1] != "START_TIME" {
			return fmt.Errorf("%w: %s: want an argument in parentheses for REQ, RESP and TRAILER, and for no other", ErrAccessLog, m[0])
		}
	}
	if rest := formatCommand.ReplaceAllString(format, ""); strings.Contains(strings.ReplaceAll(rest, "%%", ""), "%") {
		return fmt.Errorf("%w: a %% outside of a command such as %%PROTOCOL%%; write %%%% for the sign itself", ErrAccessLog)
	}
	return nil
}

// The commands of Envoy's formats that need no set-up of their own.
var (
	needArgument   = []string{"REQ", "RESP", "TRAILER"}
	formatCommands = []string{
		"REQ", "RESP", "TRAILER", "START_TIME", "DURATION", "REQUEST_DURATION", "RESPONSE_DURATION", "RESPONSE_TX_DURATION",
		"PROTOCOL", "RESPONSE_CODE", "RESPONSE_CODE_DETAILS", "RESPONSE_FLAGS", "RESPONSE_FLAGS_LONG", "CONNECTION_TERMINATION_DETAILS",
		"BYTES_RECEIVED", "BYTES_SENT", "REQUESTED_SERVER_NAME", "ROUTE_NAME", "CONNECTION_ID", "FILTER_CHAIN_NAME", "HOSTNAME", "GRPC_STATUS",
	}
	formatEnds = map[string][]string{
		"UPSTREAM_": {
			"CLUSTER", "HOST", "REMOTE_ADDRESS", "LOCAL_ADDRESS", "TRANSPORT_FAILURE_REASON", "REQUEST_ATTEMPT_COUNT", "PROTOCOL",
			"PEER_SUBJECT", "PEER_ISSUER", "PEER_CERT", "PEER_URI_SAN", "LOCAL_URI_SAN", "TLS_VERSION", "TLS_CIPHER", "CONNECTION_ID",
			"WIRE_BYTES_SENT", "WIRE_BYTES_RECEIVED",
		},
		"DOWNSTREAM_": {
			"REMOTE_ADDRESS", "LOCAL_ADDRESS", "DIRECT_REMOTE_ADDRESS", "REMOTE_PORT", "LOCAL_PORT", "TRANSPORT_FAILURE_REASON",
			"PEER_SUBJECT", "PEER_ISSUER", "PEER_CERT", "PEER_SERIAL", "PEER_FINGERPRINT_256", "PEER_URI_SAN", "LOCAL_URI_SAN",
			"TLS_VERSION", "TLS_CIPHER", "WIRE_BYTES_SENT", "WIRE_BYTES_RECEIVED",
		},
	}
)
