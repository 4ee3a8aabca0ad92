// SPDX-License-Identifier: Apache-2.0

package xds

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/federation"
)

// The secrets that the agent serves to Envoy, and the static cluster it is reached by.
// Private keys never travel from the control service, so there is no file of secrets here.
const (
	CertificateSecret = "default"
	RootsSecret       = "ROOTCA"
	SecretCluster     = "sds-grpc"
)

func secret(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{
		Name: name,
		SdsConfig: &corev3.ConfigSource{
			ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{
				ApiConfigSource: &corev3.ApiConfigSource{
					ApiType:                   corev3.ApiConfigSource_GRPC,
					TransportApiVersion:       corev3.ApiVersion_V3,
					SetNodeOnFirstMessageOnly: true,
					GrpcServices: []*corev3.GrpcService{{
						TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
							EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: SecretCluster},
						},
					}},
				},
			},
			ResourceApiVersion: corev3.ApiVersion_V3,
		},
	}
}

// meshContext is mutual TLS with certificate and roots of the mesh. identities are the
// SPIFFE IDs the peer may have, exactly; none means any identity under the roots.
func meshContext(identities []string, alpn []string) *tlsv3.CommonTlsContext {
	validation := &tlsv3.CertificateValidationContext{}
	for _, id := range identities {
		validation.MatchTypedSubjectAltNames = append(validation.MatchTypedSubjectAltNames, &tlsv3.SubjectAltNameMatcher{
			SanType: tlsv3.SubjectAltNameMatcher_URI,
			Matcher: exactly(id),
		})
	}
	return &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2,
			TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		AlpnProtocols:                  alpn,
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{secret(CertificateSecret)},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext:         validation,
				ValidationContextSdsSecretConfig: secret(RootsSecret),
			},
		},
	}
}

// meshClient is the transport socket towards a service of the mesh. Who knows that it
// speaks HTTP says so: the server may be of two minds about its port.
func (p *packer) meshClient(sni string, identities []string, protocol federation.Protocol) *corev3.TransportSocket {
	alpn := ALPN
	if protocol.IsHTTP() {
		alpn = offeredHTTP
	}
	return p.tlsSocket(&tlsv3.UpstreamTlsContext{CommonTlsContext: meshContext(identities, alpn), Sni: sni})
}

// meshServer is the transport socket of inbound chains. It names no ALPN of its own:
// Envoy chose the chain by what the client offered, and where nothing is negotiated its
// codec tells HTTP/1.1 and HTTP/2 apart by the first bytes.
func (p *packer) meshServer() *corev3.TransportSocket {
	return p.tlsSocket(&tlsv3.DownstreamTlsContext{
		CommonTlsContext:         meshContext(nil, nil),
		RequireClientCertificate: wrapperspb.Bool(true),
	})
}

func exactly(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}
