// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
)

// replicaWords are about several replicas of the control service.
//
//	ask REPLICA ARG… [code=N]   mesh, asked of that very replica
var replicaWords = map[string]word{"ask": wordAsk}

func wordAsk(ctx context.Context, s *scene) error {
	args, rest, err := s.need(1)
	if err != nil {
		return err
	}
	c, ok := s.Controls()[args[0]]
	if !ok {
		return fmt.Errorf("there is no replica %q", args[0])
	}
	asked := *s
	asked.args = append([]string{"--config", c.AdminFile()}, rest...)
	err = wordMesh(ctx, &asked)
	s.out = asked.out
	return err
}
