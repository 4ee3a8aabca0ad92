// SPDX-License-Identifier: Apache-2.0

// Package sds serves the workload's certificate and trust roots to the local
// Envoy, as Envoy's secret discovery service in both variants.
//
// There are exactly two secrets: CertificateName, the certificate with its
// key, and RootsName, what to verify peers with. Who subscribes before the
// first certificate exists waits for it; Envoy keeps the listeners that need
// it warming meanwhile.
//
// The answers contain a private key: serve them on a socket that only Envoy's
// user can open.
package sds

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/agent/identity"
)

const (
	// CertificateName is the secret with certificate chain and private key.
	CertificateName = "default"
	// RootsName is the secret with the trust bundle.
	RootsName = "ROOTCA"
	// SecretType is the type URL of all answers.
	SecretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// Source is where certificate and roots come from; *identity.Keeper is one.
type Source interface {
	// Current returns the certificate or an error while there is none.
	Current() (*identity.Certificate, error)
	// Roots returns a PEM bundle, empty while there is none.
	Roots() []byte
	// Changed returns a channel closed at the next change of either.
	Changed() <-chan struct{}
}

// Server implements Envoy's secret discovery service.
type Server struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	// Source is asked at every change.
	Source Source
	// Log gets what Envoy refuses; nil discards.
	Log *slog.Logger

	holders holders
}

// secret is one secret ready to send. The version is a hash of the content, so
// that a reconnecting Envoy gets nothing it already has.
type secret struct {
	name    string
	version string
	body    *anypb.Any
}

// secrets returns what exists now, by name.
func (s *Server) secrets() (map[string]secret, error) {
	found := map[string]secret{}
	add := func(message *tlsv3.Secret) error {
		body, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
		if err != nil {
			return fmt.Errorf("encode secret %s: %w", message.GetName(), err)
		}
		sum := sha256.Sum256(body)
		found[message.GetName()] = secret{
			name:    message.GetName(),
			version: hex.EncodeToString(sum[:8]),
			body:    &anypb.Any{TypeUrl: SecretType, Value: body},
		}
		return nil
	}
	if cert, err := s.Source.Current(); err == nil {
		if err := add(certificateSecret(cert)); err != nil {
			return nil, err
		}
		// Roots are shown together with the first certificate, not before:
		// they are then those of the answer, never only those of the file.
		if roots := s.Source.Roots(); len(bytes.TrimSpace(roots)) > 0 {
			if err := add(rootsSecret(roots)); err != nil {
				return nil, err
			}
		}
	}
	return found, nil
}

func certificateSecret(cert *identity.Certificate) *tlsv3.Secret {
	return &tlsv3.Secret{Name: CertificateName, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(cert.ChainPEM),
		PrivateKey:       inline(cert.KeyPEM),
	}}}
}

func rootsSecret(roots []byte) *tlsv3.Secret {
	return &tlsv3.Secret{Name: RootsName, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		TrustedCa: inline(roots),
	}}}
}

func inline(data []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: data}}
}

// FetchSecrets answers once, with what exists.
func (s *Server) FetchSecrets(_ context.Context, request *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	found, err := s.secrets()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	response := stateOfTheWorld(found, request.GetResourceNames())
	if len(response.GetResources()) == 0 {
		return nil, status.Errorf(codes.NotFound, "no secret among %q yet", request.GetResourceNames())
	}
	return response, nil
}

func stateOfTheWorld(found map[string]secret, names []string) *discoveryv3.DiscoveryResponse {
	response := &discoveryv3.DiscoveryResponse{TypeUrl: SecretType}
	sum := sha256.New()
	for _, name := range slices.Sorted(slices.Values(names)) {
		if one, ok := found[name]; ok {
			response.Resources = append(response.Resources, one.body)
			fmt.Fprintln(sum, one.name, one.version)
		}
	}
	response.VersionInfo = hex.EncodeToString(sum.Sum(nil)[:8])
	return response
}

func (s *Server) refused(name string, detail string) {
	if s.Log != nil {
		s.Log.Warn("envoy refused a secret", "secret", name, "error", detail)
	}
}
