// SPDX-License-Identifier: Apache-2.0

package caserver

import (
	"context"
	"fmt"
	"strings"

	"github.com/isthmus-mesh/isthmus/ca/attest"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// Evidence collects what the caller of an RPC showed: the client certificate of its connection, and the token of
// its authorization header. Nothing is verified here. It is an error to come without TLS, or with more than one
// authorization header, which different readers would read differently. Errors wrap attest.ErrCredential.
func Evidence(ctx context.Context) (attest.Evidence, error) {
	var e attest.Evidence
	from, ok := peer.FromContext(ctx)
	if !ok {
		return e, fmt.Errorf("%w: no connection", attest.ErrCredential)
	}
	if from.Addr != nil {
		e.Peer = from.Addr.String()
	}
	secure, ok := from.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return e, fmt.Errorf("%w: connection without TLS", attest.ErrCredential)
	}
	e.Chain = secure.State.PeerCertificates
	md, _ := metadata.FromIncomingContext(ctx)
	if hints := md.Get("clusterid"); len(hints) > 0 {
		e.ClusterHint = hints[0]
	}
	switch values := md.Get("authorization"); len(values) {
	case 0:
		return e, nil
	case 1:
		scheme, token, ok := strings.Cut(values[0], " ")
		if !ok || !strings.EqualFold(scheme, "bearer") || token == "" || strings.ContainsAny(token, " ,") {
			return e, fmt.Errorf("%w: authorization header is not a bearer token", attest.ErrCredential)
		}
		e.Bearer = token
		return e, nil
	default:
		return e, fmt.Errorf("%w: %d authorization headers", attest.ErrCredential, len(values))
	}
}
