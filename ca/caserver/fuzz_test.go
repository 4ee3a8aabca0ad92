// SPDX-License-Identifier: Apache-2.0

package caserver_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// leafChain is what a server sees of a client's certificate.
func leafChain(t testing.TB, leaf tls.Certificate) (chain []*x509.Certificate) {
	t.Helper()
	for _, der := range leaf.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	return chain
}

// FuzzCreateCertificate: whatever a caller sends, as a message and beside it, is refused with a reason, or gets the
// certificate of its credential and no other.
func FuzzCreateCertificate(f *testing.F) {
	s := start(f)
	subject := ca.Subject{Source: s.east.Source(), Instance: "uid-0", Namespace: "shop", ServiceAccount: "reviews"}
	chain := leafChain(f, s.Leaf(f, subject))
	good, err := proto.Marshal(&security.IstioCertificateRequest{Csr: string(catest.CSR(f, catest.Key(f), nil)), ValidityDuration: 1 << 62})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, "", "")
	f.Add(good, "Bearer "+s.east.Token(f, "shop", "reviews", "reviews-0", "uid-0"), "east")
	f.Add(good, "Bearer "+s.tokens.token, "\x00")
	f.Add([]byte{}, "Basic eDp5", "west")
	f.Fuzz(func(t *testing.T, message []byte, authorization, cluster string) {
		in := new(security.IstioCertificateRequest)
		if proto.Unmarshal(message, in) != nil {
			return
		}
		md := metadata.Pairs("clusterid", cluster)
		if authorization != "" {
			md.Set("authorization", authorization)
		}
		ctx := metadata.NewIncomingContext(context.Background(), md)
		ctx = peer.NewContext(ctx, &peer.Peer{
			Addr:     &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1},
			AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: chain}},
		})
		out, err := s.server.CreateCertificate(ctx, in)
		if err != nil {
			if code := status.Code(err); code == codes.Internal || code == codes.Unknown {
				t.Fatalf("%q: %v", message, err)
			}
			return
		}
		block, _ := pem.Decode([]byte(out.GetCertChain()[0]))
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		// The fuzzer cannot sign tokens: whoever is let in is one of the two that have a credential here.
		machine := leaf.URIs[0].Path == "/ns/legacy/sa/web" && leaf.Subject.OrganizationalUnit[0] == "vm:n1"
		pod := leaf.URIs[0].Path == "/ns/shop/sa/reviews" && leaf.Subject.OrganizationalUnit[0] == string(s.east.Source())
		if !machine && !pod || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 || leaf.IsCA {
			t.Fatalf("%q got %v of %v", message, leaf.URIs, leaf.Subject)
		}
	})
}
