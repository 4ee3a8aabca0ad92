// SPDX-License-Identifier: Apache-2.0

package sds_test

import (
	"context"
	"crypto/x509"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/agent/identity"
	"github.com/isthmus-mesh/isthmus/agent/sds"
)

// source is a certificate that the test changes.
type source struct {
	mu      sync.Mutex
	cert    *identity.Certificate
	roots   []byte
	changed chan struct{}
}

func (s *source) Current() (*identity.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cert == nil {
		return nil, identity.ErrNoCertificate
	}
	return s.cert, nil
}

func (s *source) Roots() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.roots
}

func (s *source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *source) set(chain, roots string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cert = &identity.Certificate{Leaf: &x509.Certificate{}, ChainPEM: []byte(chain), KeyPEM: []byte("key of " + chain)}
	s.roots = []byte(roots)
	close(s.changed)
	s.changed = make(chan struct{})
}

func serve(t *testing.T) (*source, secretv3.SecretDiscoveryServiceClient, context.Context) {
	t.Helper()
	s, client, ctx, _ := serveWith(t)
	return s, client, ctx
}

func serveWith(t *testing.T) (*source, secretv3.SecretDiscoveryServiceClient, context.Context, *sds.Server) {
	t.Helper()
	s := &source{changed: make(chan struct{})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	secrets := &sds.Server{Source: s}
	secretv3.RegisterSecretDiscoveryServiceServer(server, secrets)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return s, secretv3.NewSecretDiscoveryServiceClient(conn), ctx, secrets
}

// content is the PEM of a secret.
func content(t *testing.T, body *anypb.Any) string {
	t.Helper()
	var secret tlsv3.Secret
	if err := body.UnmarshalTo(&secret); err != nil {
		t.Fatal(err)
	}
	if c := secret.GetTlsCertificate(); c != nil {
		return secret.GetName() + ": " + string(c.GetCertificateChain().GetInlineBytes()) + ", " + string(c.GetPrivateKey().GetInlineBytes())
	}
	return secret.GetName() + ": " + string(secret.GetValidationContext().GetTrustedCa().GetInlineBytes())
}

func must[T any](t *testing.T) func(T, error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func TestTheWorldIsSentAtEveryChange(t *testing.T) {
	t.Parallel()
	s, client, ctx := serve(t)
	stream := must[secretv3.SecretDiscoveryService_StreamSecretsClient](t)(client.StreamSecrets(ctx))
	send := func(r *discoveryv3.DiscoveryRequest) {
		t.Helper()
		r.ResourceNames, r.TypeUrl = []string{"default"}, sds.SecretType
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	receive := func() *discoveryv3.DiscoveryResponse { return must[*discoveryv3.DiscoveryResponse](t)(stream.Recv()) }

	send(&discoveryv3.DiscoveryRequest{}) // before there is a certificate: it waits
	s.set("one", "roots")
	first := receive()
	if got := content(t, first.GetResources()[0]); got != "default: one, key of one" || len(first.GetResources()) != 1 {
		t.Errorf("got %q", got)
	}
	send(&discoveryv3.DiscoveryRequest{ResponseNonce: first.GetNonce(), VersionInfo: first.GetVersionInfo()})
	s.set("one", "more roots") // not what this stream asked for
	s.set("two", "more roots")
	second := receive()
	if got := content(t, second.GetResources()[0]); got != "default: two, key of two" {
		t.Errorf("got %q", got)
	}
	send(&discoveryv3.DiscoveryRequest{ResponseNonce: second.GetNonce(), ErrorDetail: &statuspb.Status{Message: "bad key"}})
	s.set("three", "more roots")
	if got := content(t, receive().GetResources()[0]); !strings.Contains(got, "three") {
		t.Errorf("after a refusal: %q", got)
	}
}

func TestChangesAreSentAlone(t *testing.T) {
	t.Parallel()
	s, client, ctx := serve(t)
	s.set("one", "roots")
	stream := must[secretv3.SecretDiscoveryService_DeltaSecretsClient](t)(client.DeltaSecrets(ctx))
	receive := func() map[string]string {
		t.Helper()
		out := map[string]string{}
		for _, r := range must[*discoveryv3.DeltaDiscoveryResponse](t)(stream.Recv()).GetResources() {
			out[r.GetName()] = content(t, r.GetResource())
		}
		return out
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "ROOTCA", "kubernetes://other"}}); err != nil {
		t.Fatal(err)
	}
	if got := receive(); len(got) != 2 || got["ROOTCA"] != "ROOTCA: roots" {
		t.Errorf("first %v", got)
	}
	s.set("one", "roots and a new one")
	if got := receive(); len(got) != 1 || got["ROOTCA"] != "ROOTCA: roots and a new one" {
		t.Errorf("only the roots changed, got %v", got)
	}
}

func TestAReturningClientGetsNothingItHas(t *testing.T) {
	t.Parallel()
	s, client, ctx := serve(t)
	s.set("one", "roots")
	first := must[secretv3.SecretDiscoveryService_DeltaSecretsClient](t)(client.DeltaSecrets(ctx))
	if err := first.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}}); err != nil {
		t.Fatal(err)
	}
	version := must[*discoveryv3.DeltaDiscoveryResponse](t)(first.Recv()).GetResources()[0].GetVersion()
	second := must[secretv3.SecretDiscoveryService_DeltaSecretsClient](t)(client.DeltaSecrets(ctx))
	if err := second.Send(&discoveryv3.DeltaDiscoveryRequest{
		ResourceNamesSubscribe: []string{"default", "ROOTCA"}, InitialResourceVersions: map[string]string{"default": version},
	}); err != nil {
		t.Fatal(err)
	}
	response := must[*discoveryv3.DeltaDiscoveryResponse](t)(second.Recv())
	if len(response.GetResources()) != 1 || response.GetResources()[0].GetName() != "ROOTCA" {
		t.Errorf("sent again: %v", response.GetResources())
	}
}

// The roots count as acknowledged once every stream that asks for them has said so, and not
// when one refuses them.
func TestRootsAreInUseOnceEnvoyHasAcknowledged(t *testing.T) {
	t.Parallel()
	s, client, ctx, server := serveWith(t)
	if err := server.Acknowledged(ctx); err != nil {
		t.Errorf("without a stream: %v", err)
	}
	s.set("one", "roots")
	delta := must[secretv3.SecretDiscoveryService_DeltaSecretsClient](t)(client.DeltaSecrets(ctx))
	world := must[secretv3.SecretDiscoveryService_StreamSecretsClient](t)(client.StreamSecrets(ctx))
	if err := delta.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "ROOTCA"}}); err != nil {
		t.Fatal(err)
	}
	if err := world.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}}); err != nil {
		t.Fatal(err)
	}
	first := must[*discoveryv3.DeltaDiscoveryResponse](t)(delta.Recv())
	second := must[*discoveryv3.DiscoveryResponse](t)(world.Recv())
	done := make(chan error, 1)
	go func() { done <- server.Acknowledged(ctx) }()
	acknowledge := func(toDelta, toWorld *statuspb.Status) {
		t.Helper()
		if err := delta.Send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: first.GetNonce(), ErrorDetail: toDelta}); err != nil {
			t.Fatal(err)
		}
		if err := world.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}, ResponseNonce: second.GetNonce(), ErrorDetail: toWorld}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("nobody has acknowledged: %v", err)
	default:
	}
	acknowledge(nil, nil)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	s.set("one", "other roots")
	first, second = must[*discoveryv3.DeltaDiscoveryResponse](t)(delta.Recv()), must[*discoveryv3.DiscoveryResponse](t)(world.Recv())
	go func() { done <- server.Acknowledged(ctx) }()
	acknowledge(nil, &statuspb.Status{Message: "bad root"})
	if err := <-done; err == nil || !strings.Contains(err.Error(), "bad root") {
		t.Errorf("one refuses them: %v", err)
	}
}
