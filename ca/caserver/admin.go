// SPDX-License-Identifier: Apache-2.0

package caserver

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
	"sigs.k8s.io/yaml"
)

// AdminFile is the name of the administrator's file in the data directory.
const AdminFile = "admin.conf"

// adminConf is the content of admin.conf, the same as package api reads.
type adminConf struct {
	APIVersion  string `json:"apiVersion"`
	Kind        string `json:"kind"`
	Server      string `json:"server"`
	TrustDomain string `json:"trustDomain"`
	Root        string `json:"root"`
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
}

// WriteAdmin makes sure that dir has an admin.conf, in mode 0600, with which the command line reaches server (an
// https URL): it is written if there is none, if it is not of this authority or for another server, if its
// certificate is revoked, of an authority that was replaced, or in the last third of its life. It tells whether it
// was written.
func WriteAdmin(ctx context.Context, authority *ca.Authority, dir, server string, now time.Time) (bool, error) {
	path := filepath.Join(dir, AdminFile)
	root := string(authority.Bundle().PEM())
	if adminStillGood(authority, path, server, root, now) {
		return false, nil
	}
	var random [6]byte
	rand.Read(random[:])
	cert, issued, err := selfIssue(ctx, authority, ca.Request{
		Subject: ca.Subject{
			Source: ca.SourceMeshd, Instance: "admin-" + hex.EncodeToString(random[:]),
			Namespace: ca.ControlNamespace, ServiceAccount: ca.AdminAccount,
		},
		Credential: ca.Credential{Method: "self", Note: "written to " + path},
	})
	if err != nil {
		return false, fmt.Errorf("%s: %w", AdminFile, err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return false, fmt.Errorf("%s: %w", AdminFile, err)
	}
	text, err := yaml.Marshal(adminConf{
		APIVersion: "isthmus-mesh.io/v1", Kind: "AdminConfig", Server: server,
		TrustDomain: authority.TrustDomain().Name(), Root: root, Certificate: string(issued.ChainPEM()),
		Key: string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
	})
	if err != nil {
		return false, fmt.Errorf("%s: %w", AdminFile, err)
	}
	return true, writeSecret(path, text)
}

// adminStillGood tells whether the file can stay.
func adminStillGood(authority *ca.Authority, path, server, root string, now time.Time) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o600 {
		return false
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	var have adminConf
	if yaml.Unmarshal(text, &have) != nil || have.Server != server || have.Root != root {
		return false
	}
	pair, err := tls.X509KeyPair([]byte(have.Certificate), []byte(have.Key))
	if err != nil {
		return false
	}
	var chain []*x509.Certificate
	for _, der := range pair.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return false
		}
		chain = append(chain, cert)
	}
	id, err := authority.Verify(chain)
	if err != nil || !id.IsAdmin() || authority.RevokedIdentity(id) != nil || !belowActive(authority, id.Authority) {
		return false
	}
	return now.Before(id.NotAfter.Add(-id.NotAfter.Sub(id.NotBefore) / 3))
}

// belowActive tells whether an issuer and its root are those that sign now.
func belowActive(authority *ca.Authority, id string) bool {
	active := map[string]bool{}
	for _, i := range authority.Issuers() {
		active[i.ID] = i.Phase == ca.PhaseActive
	}
	for _, i := range authority.Issuers() {
		if i.ID == id {
			return active[i.ID] && (active[i.Under] || i.Under == "")
		}
	}
	return false
}

// writeSecret replaces a file in one step; nobody but its owner can ever read it.
func writeSecret(path string, text []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".admin-*") // 0600
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer os.Remove(tmp.Name()) // nothing is left to remove once it has its name
	_, err = tmp.Write(text)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.Rename(tmp.Name(), path)
}
