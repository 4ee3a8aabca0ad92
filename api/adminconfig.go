// SPDX-License-Identifier: Apache-2.0

package api

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"
)

// Version is the apiVersion of the objects of this package in JSON and YAML.
const Version = "isthmus-mesh.io/v1"

// AdminConfig is the content of admin.conf: where meshd is, how to recognise it,
// and the certificate of an administrator. meshd writes it into its data
// directory; the command line reads it.
type AdminConfig struct {
	APIVersion string `json:"apiVersion"` // Version
	Kind       string `json:"kind"`       // "AdminConfig"

	// Server is the URL of the admin port, "https://host:8443".
	Server string `json:"server"`

	// TrustDomain is the mesh's; meshd is recognised by its SPIFFE ID in it, so
	// any host name or address may be used to reach it.
	TrustDomain string `json:"trustDomain"`

	// Root, Certificate and Key are PEM.
	Root        string `json:"root"`
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
}

// AdminConfigKind is the kind that an admin.conf states.
const AdminConfigKind = "AdminConfig"

// The SPIFFE paths of meshd's own identities.
const (
	ServerIdentityPath = "/ns/isthmus-system/sa/meshd"
	AdminIdentityPath  = "/ns/isthmus-system/sa/admin"
)

// ErrAdminConfig is wrapped by every error about the content of an admin.conf.
var ErrAdminConfig = errors.New("not a usable admin.conf")

// ParseAdminConfig decodes and checks an admin.conf. Unknown keys are errors.
func ParseAdminConfig(data []byte) (*AdminConfig, error) {
	var c AdminConfig
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAdminConfig, err)
	}
	if c.APIVersion != Version || c.Kind != AdminConfigKind {
		return nil, fmt.Errorf("%w: apiVersion %q and kind %q, want %q and %q",
			ErrAdminConfig, c.APIVersion, c.Kind, Version, AdminConfigKind)
	}
	u, err := url.Parse(c.Server)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%w: server %q, want https://host:port", ErrAdminConfig, c.Server)
	}
	if c.TrustDomain == "" {
		return nil, fmt.Errorf("%w: trustDomain is empty", ErrAdminConfig)
	}
	if _, err := c.TLS(); err != nil {
		return nil, err
	}
	return &c, nil
}

// LoadAdminConfig reads an admin.conf; a missing file keeps its fs.ErrNotExist.
func LoadAdminConfig(path string) (*AdminConfig, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, err := ParseAdminConfig(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Save writes c to path in one step, readable by its owner only.
func (c *AdminConfig) Save(path string) error {
	data, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".admin-*.conf")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // a no-op once it is renamed
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := errors.Join(f.Chmod(0o600), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// TLS returns what a client needs to speak to meshd as the administrator: it
// presents c's certificate, and accepts a server only if its certificate leads
// to c's root and carries meshd's SPIFFE ID, under whatever host name.
func (c *AdminConfig) TLS() (*tls.Config, error) {
	pair, err := tls.X509KeyPair([]byte(c.Certificate), []byte(c.Key))
	if err != nil {
		return nil, fmt.Errorf("%w: certificate and key: %w", ErrAdminConfig, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.Root)) {
		return nil, fmt.Errorf("%w: root holds no certificate", ErrAdminConfig)
	}
	want := "spiffe://" + c.TrustDomain + ServerIdentityPath
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{pair},
		// Host names say nothing here: the identity is checked below, and on
		// resumption too, which is why this is not VerifyPeerCertificate.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			return verifyServer(s.PeerCertificates, roots, want)
		},
	}, nil
}

func verifyServer(chain []*x509.Certificate, roots *x509.CertPool, want string) error {
	if len(chain) == 0 {
		return errors.New("the server shows no certificate")
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return err
	}
	if len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != want {
		return fmt.Errorf("the server's certificate is for %v, want %s", chain[0].URIs, want)
	}
	return nil
}
