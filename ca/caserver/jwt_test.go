// SPDX-License-Identifier: Apache-2.0

package caserver_test

import (
	"context"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// token asks for a JWT-SVID for the audience billing.
func (a *asker) token(t *testing.T, md ...string) (string, error) {
	t.Helper()
	out, err := api.NewIdentityClient(a.conn).CreateJWTSVID(metadata.AppendToOutgoingContext(t.Context(), md...), &api.CreateJWTSVIDRequest{Audience: []string{"billing"}})
	return out.GetToken(), err
}

// whose says whom a token speaks for, by the keys that meshd publishes to the asker.
func (a *asker) whose(t *testing.T, token string) (ca.JWTIdentity, error) {
	t.Helper()
	stream, err := api.NewIdentityClient(a.conn).WatchJWTBundle(t.Context(), &api.WatchJWTBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ca.ParseJWTBundle(bundle.GetJwks())
	if err != nil {
		t.Fatal(err)
	}
	return ca.VerifyJWT(token, "billing", time.Now(), func(spiffeid.TrustDomain) ca.JWTKeys { return keys })
}

func reviews(s *service) ca.Subject {
	return ca.Subject{Source: s.east.Source(), Instance: "uid-0", Namespace: "shop", ServiceAccount: "reviews"}
}

func lastAudit(t *testing.T, s *service) ca.AuditEntry {
	t.Helper()
	log := s.AuditEntries(t)
	return log[len(log)-1]
}

// Whoever has a certificate gets tokens for its identity, and nobody gets one by anything else.
func TestJWTByCertificateAlone(t *testing.T) {
	t.Parallel()
	s := start(t)
	pod := s.dial(t, s.Leaf(t, reviews(s)))
	token, err := pod.token(t)
	if err != nil {
		t.Fatal(err)
	}
	if line := lastAudit(t, s); line.Event != ca.AuditJWTIssued || line.Method != "certificate" || line.Peer == "" || line.Instance != "uid-0" {
		t.Errorf("audit line %+v", line)
	}
	if id, err := pod.whose(t, token); err != nil || id.ID.String() != "spiffe://cluster.local/ns/shop/sa/reviews" {
		t.Errorf("the token is that of %v, %v", id.ID, err)
	}
	kubernetes := s.east.Token(t, "shop", "reviews", "reviews-0", "uid-0")
	for name, c := range map[string]struct {
		certificate []tls.Certificate
		bearer      string
		want        codes.Code
	}{
		"nothing":                   {nil, "", codes.Unauthenticated},
		"a Kubernetes token":        {nil, kubernetes, codes.Unauthenticated},
		"a join token":              {nil, s.tokens.token, codes.Unauthenticated},
		"the JWT-SVID itself":       {nil, token, codes.Unauthenticated},
		"a certificate and a token": {[]tls.Certificate{s.Leaf(t, reviews(s))}, kubernetes, codes.Unauthenticated},
		"a foreign certificate":     {[]tls.Certificate{catest.New(t).Leaf(t, reviews(s))}, "", codes.Unauthenticated},
		"an administrator":          {[]tls.Certificate{s.Admin(t)}, "", codes.PermissionDenied},
		"meshd's own certificate":   {[]tls.Certificate{s.Serving(t, "meshd.example")}, "", codes.PermissionDenied},
	} {
		var md []string
		if c.bearer != "" {
			md = []string{"authorization", "Bearer " + c.bearer}
		}
		_, err := s.dial(t, c.certificate...).token(t, md...)
		if status.Code(err) != c.want {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if line := lastAudit(t, s); line.Event != ca.AuditJWTRefused {
			t.Errorf("%s: audit line %+v", name, line)
		}
	}
	if s.tokens.spent.Load() {
		t.Error("the join token was used up")
	}
	if _, err := api.NewIdentityClient(pod.conn).CreateJWTSVID(t.Context(), &api.CreateJWTSVIDRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without an audience: %v", err)
	}
	stream, err := api.NewIdentityClient(s.dial(t).conn).WatchJWTBundle(t.Context(), &api.WatchJWTBundleRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.Unauthenticated, "credential")
}

// Every source's tokens are for what it may host, whatever else it asks for: the row of JWT-SVIDs in the matrix of
// issuance.
func TestAttackA03JWT(t *testing.T) {
	t.Parallel()
	s := start(t)
	leaf := s.Leaf(t, reviews(s))
	if err := s.Revoke(t.Context(), s.east.Source(), "uid-0", "test"); err != nil {
		t.Fatal(err)
	}
	_, err := s.dial(t, leaf).token(t)
	wantCode(t, err, codes.PermissionDenied, "revoked")
	other := reviews(s)
	other.Instance = "uid-1"
	pod := s.dial(t, s.Leaf(t, other))
	if _, err := pod.token(t); err != nil {
		t.Errorf("another pod: %v", err)
	}
	if err := s.Revoke(t.Context(), s.east.Source(), "", "test"); err != nil {
		t.Fatal(err)
	}
	_, err = pod.token(t)
	wantCode(t, err, codes.PermissionDenied, "revoked")
}

// One workload cannot fill the audit log.
func TestJWTLimit(t *testing.T) {
	t.Parallel()
	s := start(t)
	pod := s.dial(t, s.Leaf(t, reviews(s)))
	for range 300 {
		if _, err := pod.token(t); status.Code(err) == codes.ResourceExhausted {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Error("300 tokens at once are not too many")
}

// FuzzCreateJWTSVID: whatever is asked for, it is refused with a reason, or is for the caller's own identity.
func FuzzCreateJWTSVID(f *testing.F) {
	s := start(f)
	chain := leafChain(f, s.Leaf(f, reviews(s)))
	good, err := proto.Marshal(&api.CreateJWTSVIDRequest{Audience: []string{"billing"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, "")
	f.Add([]byte{}, "Bearer "+s.tokens.token)
	f.Fuzz(func(t *testing.T, message []byte, authorization string) {
		in := new(api.CreateJWTSVIDRequest)
		if proto.Unmarshal(message, in) != nil {
			return
		}
		md := metadata.MD{}
		if authorization != "" {
			md.Set("authorization", authorization)
		}
		ctx := peer.NewContext(metadata.NewIncomingContext(context.Background(), md), &peer.Peer{
			Addr:     &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1},
			AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: chain}},
		})
		out, err := s.server.CreateJWTSVID(ctx, in)
		if err != nil {
			if code := status.Code(err); code == codes.Internal || code == codes.Unknown {
				t.Fatalf("%q: %v", message, err)
			}
			return
		}
		keys, err := ca.ParseJWTBundle(s.jwt.Bundle())
		if err != nil {
			t.Fatal(err)
		}
		id, err := ca.VerifyJWT(out.GetToken(), in.GetAudience()[0], time.Now(), func(spiffeid.TrustDomain) ca.JWTKeys { return keys })
		if err != nil || id.ID.Path() != "/ns/shop/sa/reviews" {
			t.Fatalf("%q got a token for %v, %v", message, id.ID, err)
		}
	})
}
