// SPDX-License-Identifier: Apache-2.0

package workloadapi

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"
)

// CallUndecoded makes the calls that take arguments, with arguments as they come over the wire.
func CallUndecoded(t testing.TB, s *Server, fetch, validate []byte) (fetched *workload.JWTSVIDResponse, validated *workload.ValidateJWTSVIDResponse) {
	t.Helper()
	var f workload.JWTSVIDRequest
	if proto.Unmarshal(fetch, &f) == nil {
		if answer, err := s.FetchJWTSVID(t.Context(), &f); err == nil {
			fetched = answer
		}
	}
	var v workload.ValidateJWTSVIDRequest
	if proto.Unmarshal(validate, &v) == nil {
		if answer, err := s.ValidateJWTSVID(t.Context(), &v); err == nil {
			validated = answer
		}
	}
	return fetched, validated
}
