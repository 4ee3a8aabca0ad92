// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
)

// machineWords are about virtual machines and identities.
var machineWords = map[string]word{
	"vm": wordVM, "onboard": wordOnboard, "reboot": wordReboot,
}

func wordVM(ctx context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	_, err = s.VM(ctx, args[0], first(s.opts["network"], args[0]+"-net"))
	return err
}

// wordOnboard registers a VM and pastes the printed line there.
func wordOnboard(ctx context.Context, s *scene) error {
	args, flags, err := s.need(1)
	if err != nil {
		return err
	}
	s.out, err = s.Onboard(ctx, args[0], flags...)
	return err
}

func wordReboot(_ context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	vm, ok := s.VMs()[args[0]]
	if !ok {
		return fmt.Errorf("there is no VM %q", args[0])
	}
	return vm.Reboot()
}
