// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/xds"
)

func TestCheckAccessLogFormat(t *testing.T) {
	t.Parallel()
	for _, good := range []string{
		"", xds.AccessLogFormat, "[%START_TIME%] %PROTOCOL%", "%REQ(X-A?:PATH):10% 100%%",
		"peer=%UPSTREAM_PEER_CERT%", "%DOWNSTREAM_PEER_SERIAL%",
	} {
		if err := xds.CheckAccessLogFormat(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for format, names := range map[string]string{
		"%UPSTREAM_PEER_SERIAL%": "%UPSTREAM_PEER_SERIAL%", // Envoy has it for the downstream only
		"%REQ%":                  "%REQ%",
		"%PROTOCOL(x)%":          "%PROTOCOL(x)%",
		"%protocol%":             "%%",
		"100% of %PROTOCOL%":     "%%",
		"%DURATION":              "%%",
	} {
		err := xds.CheckAccessLogFormat(format)
		if !errors.Is(err, xds.ErrAccessLog) || !strings.Contains(err.Error(), names) {
			t.Errorf("%q: got %v, want an error that names %s", format, err, names)
		}
	}
}

func FuzzCheckAccessLogFormat(f *testing.F) {
	f.Add(xds.AccessLogFormat)
	f.Add("%REQ(A)%%%")
	f.Fuzz(func(t *testing.T, format string) {
		if xds.CheckAccessLogFormat(format) != nil {
			return
		}
		if _, err := xds.AccessLog(format); err != nil && strings.ToValidUTF8(format, "") == format {
			t.Error(err)
		}
	})
}
