// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// IstioKinds gives a cluster the CustomResourceDefinitions of Istio, of the version whose
// types the product is built with, and waits until they are served.
func (s *Stage) IstioKinds(ctx context.Context, cluster string) error {
	const library = "istio.io/api"
	dir, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", library).Output()
	if err != nil {
		exit := new(exec.ExitError)
		errors.As(err, &exit)
		return fmt.Errorf("find module %s: %w\n%s", library, err, exit.Stderr)
	}
	file := filepath.Join(strings.TrimSpace(string(dir)), "kubernetes", "customresourcedefinitions.gen.yaml")
	// They are too long for the annotation that a client-side apply leaves.
	for _, args := range [][]string{
		{"apply", "--server-side", "-f", file},
		{"wait", "--for=condition=Established", "--timeout=30s", "-f", file},
	} {
		r, err := s.Kubectl(ctx, cluster, nil, args...)
		if err == nil && r.Code != 0 {
			err = fmt.Errorf("kubectl %s: exit code %d\n%s", args[0], r.Code, r.Stderr)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
