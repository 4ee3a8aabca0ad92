// SPDX-License-Identifier: Apache-2.0

package report

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/isthmus-mesh/isthmus/api"
)

// verifying prepares a handshake with a mesh workload. Its certificate has a
// SPIFFE ID and no host name, so Go's own verification, which insists on one,
// is replaced by the chain to the mesh's roots and the ID.
func verifying(base *tls.Config, request *api.ProbeRequest) *tls.Config {
	config := base.Clone()
	config.ServerName = request.GetSni()
	config.NextProtos = request.GetAlpn()
	roots := config.RootCAs
	config.InsecureSkipVerify = true //nolint:gosec // VerifyConnection below does it
	config.VerifyConnection = func(state tls.ConnectionState) error {
		return verifyPeer(state.PeerCertificates, roots, request.GetIdentities())
	}
	return config
}

func verifyPeer(chain []*x509.Certificate, roots *x509.CertPool, identities []string) error {
	if len(chain) == 0 {
		return errors.New("peer shows no certificate")
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	leaf := chain[0]
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}); err != nil {
		return fmt.Errorf("peer's certificate: %w", err)
	}
	if len(leaf.URIs) != 1 {
		return fmt.Errorf("peer's certificate has %d URI names, want one", len(leaf.URIs))
	}
	if id := leaf.URIs[0].String(); len(identities) > 0 && !slices.Contains(identities, id) {
		return fmt.Errorf("peer is %s, want one of %v", id, identities)
	}
	return nil
}
