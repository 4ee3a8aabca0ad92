// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/agent/servers"
)

// GRPC is the Issuer that speaks istio.v1.auth.IstioCertificateService.
//
// The first certificate is asked for with the token, every further one with
// the present certificate alone.
type GRPC struct {
	// Servers are meshd's; the certificate of the one that answers must carry its host.
	Servers servers.List
	// TokenFile is read anew for each use, since the kubelet replaces it.
	// It may be empty or missing once a certificate is there.
	TokenFile string
	// Roots returns the PEM bundle to verify the service with.
	Roots func() []byte
	// Lifetime is what is asked for; zero leaves it to the service, which may
	// give less anyhow.
	Lifetime time.Duration
	// Cluster is sent as a hint (header ClusterID), which the service does not
	// believe but uses to look in the right place first.
	Cluster string
	// Dial opens the connection; nil uses the network as it is.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Timeout of one request; zero means 25 seconds, since the service may wait for the registry to hear of a new pod.
	Timeout time.Duration
}

// Issue implements Issuer.
func (g *GRPC) Issue(ctx context.Context, csr []byte, current *Certificate) ([]string, error) {
	timeout := g.Timeout
	if timeout == 0 {
		timeout = 25 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if current != nil {
		chain, err := g.call(ctx, csr, &current.TLS, "")
		if code := status.Code(err); code == codes.Unauthenticated || code == codes.PermissionDenied {
			err = fmt.Errorf("%w: %w", ErrRefused, err)
		}
		return chain, err
	}
	token, err := g.token()
	if err != nil {
		return nil, err
	}
	return g.call(ctx, csr, nil, token)
}

func (g *GRPC) token() (string, error) {
	if g.TokenFile == "" {
		return "", errors.New("no token file configured, and no valid certificate to renew with")
	}
	data, err := os.ReadFile(g.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fmt.Errorf("token file %s is empty", g.TokenFile)
	}
	return token, nil
}

// call opens a connection for this request alone: issuance is rare, and a
// connection is bound to the credential it was opened with.
func (g *GRPC) call(ctx context.Context, csr []byte, cert *tls.Certificate, token string) ([]string, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(g.Roots()) {
		return nil, errors.New("no root certificate to verify the certificate service with")
	}
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := g.Servers.Client(g.Dial, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		return nil, fmt.Errorf("certificate service: %w", err)
	}
	defer conn.Close()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	if g.Cluster != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "clusterid", g.Cluster)
	}
	answer, err := securityv1alpha1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &securityv1alpha1.IstioCertificateRequest{
		Csr:              string(csr),
		ValidityDuration: int64(g.Lifetime / time.Second),
	})
	if err != nil {
		by := "token"
		if cert != nil {
			by = "certificate"
		}
		return nil, fmt.Errorf("certificate service %s, asked by %s: %w", g.Servers, by, err)
	}
	return answer.GetCertChain(), nil
}
