// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// machineWords are about virtual machines and identities.
//
//	vm NAME [network=N] [address=A]
//	serve VM [FLAG…]                       the echo program, now and after each reboot
//	onboard VM FLAG…                       mesh vm onboard, and the printed line pasted
//	paste VM [FLAG…]                       the same line once more, with nobody to type a token
//	reboot VM                              all its processes are killed, and its start scripts run
//	vmcall VM URL [n=N] [want=CLUSTER] [FLAG…]
//	direct CLUSTER NS/APP CLUSTER NS/APP PORT   one GET to a pod's address, from a pod without a proxy
//	certificate FILE CLUSTER NS/APP [name=URI]  what meshd gives for the token of a pod
//	knock CLUSTER SNI [alpn=A,B] [cert=FILE] [by=callee]   a handshake with a gateway, and one page
var machineWords = map[string]word{
	"vm": wordVM, "serve": wordServe, "onboard": wordOnboard, "paste": wordPaste, "reboot": wordReboot, "vmcall": wordVMCall,
	"direct": wordDirect, "certificate": wordCertificate, "knock": wordKnock,
}

func wordVM(ctx context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	var address []netip.Addr
	if text, ok := s.opts["address"]; ok {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return err
		}
		address = append(address, a)
	}
	_, err = s.VM(ctx, args[0], first(s.opts["network"], args[0]+"-net"), address...)
	return err
}

func wordServe(_ context.Context, s *scene) error {
	args, flags, err := s.need(1)
	if err != nil {
		return err
	}
	vm, err := s.VMNamed(args[0])
	if err != nil {
		return err
	}
	// It answers with the VM's name where a pod answers with its cluster's.
	return s.Serve(vm, append([]string{"serve", "--cluster", vm.Name()}, flags...)...)
}

// wordOnboard registers a VM and pastes the printed line there; see wordPaste.
func wordOnboard(ctx context.Context, s *scene) error {
	args, flags, err := s.need(1)
	if err != nil {
		return err
	}
	invited, err := s.Invite(ctx, args[0], flags...)
	if err != nil {
		return err
	}
	s.ts.Setenv("LINE_"+args[0], invited.Line)
	if s.out, err = s.Paste(ctx, args[0], invited.Line+" --check", ""); err != nil {
		return fmt.Errorf("--check: %w", err)
	}
	out, err := s.Paste(ctx, args[0], invited.Line, invited.Token)
	s.out += out
	if err != nil {
		return err
	}
	return s.StartMeshAtBoot(ctx, args[0])
}

func wordPaste(ctx context.Context, s *scene) error {
	args, flags, err := s.need(1)
	if err != nil {
		return err
	}
	line := s.ts.Getenv("LINE_" + args[0])
	if line == "" {
		return fmt.Errorf("%s was not onboarded", args[0])
	}
	s.out, err = s.Paste(ctx, args[0], strings.Join(append([]string{line}, flags...), " "), "")
	return err
}

func wordReboot(_ context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	vm, err := s.VMNamed(args[0])
	if err != nil {
		return err
	}
	return vm.Reboot()
}

func wordVMCall(ctx context.Context, s *scene) error {
	args, flags, err := s.need(2)
	if err != nil {
		return err
	}
	report, err := s.CallFromVM(ctx, args[0], s.callFlags(args[1], flags)...)
	s.out = report.Text
	return errors.Join(err, report.Err)
}

func wordDirect(ctx context.Context, s *scene) error {
	args, _, err := s.need(5)
	if err != nil {
		return err
	}
	pods, err := s.Pods(ctx, args[2], args[3])
	if err != nil || len(pods) == 0 {
		s.ts.Fatalf("no pod of %s in %s: %v", args[3], args[2], err)
	}
	report, err := s.Call(ctx, args[0], args[1], fmt.Sprintf("http://%s:%s/", pods[0].Status.PodIP, args[4]))
	s.out = report.Text
	return errors.Join(err, report.Err)
}

func wordCertificate(ctx context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	text, err := s.Certificate(ctx, args[1], args[2], s.opts["name"])
	if err != nil {
		return err
	}
	return os.WriteFile(s.ts.MkAbs(args[0]), text, 0o600)
}

// wordKnock fails where it is refused by the gateway, or by whom by= names. A refusal by
// anybody else, and a try that could not be made, end the story: neither proves anything.
func wordKnock(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	k := stage.Knock{SNI: args[1]}
	if alpn := s.opts["alpn"]; alpn != "" {
		k.ALPN = strings.Split(alpn, ",")
	}
	if cert, ok := s.opts["cert"]; ok {
		k.Certificate = s.ts.MkAbs(cert)
	}
	refused := stage.ErrGateway
	if s.opts["by"] == "callee" {
		refused = stage.ErrCallee
	}
	s.out, err = s.Knock(ctx, args[0], k)
	if err != nil && !errors.Is(err, refused) {
		s.ts.Fatalf("knock: %v", err)
	}
	return err
}
