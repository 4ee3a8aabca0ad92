// SPDX-License-Identifier: Apache-2.0

package e2e

import "context"

// replicaWords are about several replicas of the control service.
//
//	ask REPLICA ARG… [code=N]   mesh, asked of that very replica
var replicaWords = map[string]word{"ask": wordAsk}

func wordAsk(ctx context.Context, s *scene) error {
	c, rest, err := s.control(1)
	if err != nil {
		return err
	}
	asked := *s
	asked.args = append([]string{"--config", c.AdminFile()}, rest...)
	err = wordMesh(ctx, &asked)
	s.out = asked.out
	return err
}
