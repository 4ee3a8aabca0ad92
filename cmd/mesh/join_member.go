// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/registry/kube"
)

// token asks the cluster for a token of one of our accounts.
func (m *member) token(ctx context.Context, account string) (*api.Credential, error) {
	c, err := m.server.RequestToken(ctx, kube.Namespace, account, kube.TokenLifetime)
	if err != nil {
		return nil, err
	}
	return &api.Credential{Token: c.Token, Expires: timestamppb.New(c.Expires)}, nil
}

// certificateAuthority is the PEM that a kubeconfig trusts; nil means the
// system's.
func certificateAuthority(c *rest.Config) ([]byte, error) {
	if len(c.CAData) > 0 {
		return c.CAData, nil
	}
	if c.CAFile != "" {
		return os.ReadFile(c.CAFile)
	}
	if c.Insecure {
		return nil, fmt.Errorf("server %s: certificates are not verified (insecure-skip-tls-verify); meshd always does", c.Host)
	}
	return nil, nil
}

// openSecret takes the cluster and meshd's credential from --remote-secret.
func (j *join) openSecret() error {
	if j.outputDir != "" {
		return usagef("--remote-secret and --output-dir exclude each other: with a Secret nothing is applied")
	}
	data, err := os.ReadFile(j.remoteSecret)
	if err != nil {
		return usagef("--remote-secret: %v", err)
	}
	m, credential, err := kube.ParseRemoteSecret(data)
	if err != nil {
		return usagef("--remote-secret %s: %v", j.remoteSecret, err)
	}
	config, err := kube.RESTConfig(m, credential)
	if err != nil {
		return usagef("--remote-secret %s: %v", j.remoteSecret, err)
	}
	j.noGateway = true
	j.reader = &api.Credential{
		Token: credential.Token, ClientCertificate: credential.ClientCertificate, ClientKey: credential.ClientKey,
	}
	if !credential.Expires.IsZero() {
		j.reader.Expires = timestamppb.New(credential.Expires)
	}
	j.member, err = newMember("", config)
	return err
}

// write puts the manifests into files, numbered in the order to apply them.
func (j *join) write(context.Context) error {
	objects, err := kube.Manifests(j.options())
	if err != nil {
		return fmt.Errorf("manifests: %w", err)
	}
	if err := os.MkdirAll(j.outputDir, 0o755); err != nil {
		return usagef("--output-dir: %v", err)
	}
	for i, obj := range objects {
		data, err := yaml.Marshal(obj.Object)
		if err != nil {
			return err
		}
		name := strings.ReplaceAll(fmt.Sprintf("%02d-%s-%s.yaml", i, strings.ToLower(obj.GetKind()), obj.GetName()), ":", "-")
		if err := os.WriteFile(filepath.Join(j.outputDir, name), data, 0o644); err != nil {
			return usagef("--output-dir: %v", err)
		}
	}
	j.steps.begin("write", "").done("%s written to %s", noun(len(objects), "manifest"), j.outputDir)
	return nil
}

// transient tells whether meshd may answer when it is asked again.
func transient(err error) bool {
	switch api.ProblemOf(err).Status {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted:
		return true
	}
	return false
}
