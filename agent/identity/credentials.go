// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"
)

// Credentials are the mutual TLS credentials of the workload towards meshd,
// with the certificate and roots that are current at each handshake.
// The server is verified by the host name it is dialled under.
func Credentials(k *Keeper) credentials.TransportCredentials {
	return &current{TransportCredentials: credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12}), keeper: k}
}

type current struct {
	credentials.TransportCredentials // for Info and the rest of the interface
	keeper                           *Keeper
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *current) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	config, err := c.keeper.TLS()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(config).ClientHandshake(ctx, authority, conn)
}

// Clone implements credentials.TransportCredentials.
func (c *current) Clone() credentials.TransportCredentials {
	return &current{TransportCredentials: c.TransportCredentials.Clone(), keeper: c.keeper}
}

// TLS returns a client configuration with the present certificate and roots.
// The server name is the caller's to set.
func (k *Keeper) TLS() (*tls.Config, error) {
	cert, err := k.Current()
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(k.Roots()) {
		return nil, errors.New("no root certificates to verify a server with")
	}
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert.TLS}, MinVersion: tls.VersionTLS12}, nil
}
