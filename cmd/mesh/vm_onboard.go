// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
)

// onboardFlags are the flags of mesh vm onboard.
type onboardFlags struct {
	network, service, account, health, locality string
	ports                                       []string
	lifetime, timeout                           time.Duration
	tokenFile                                   string
	dryRun, wait                                bool
}

func (s *session) vmOnboardCommand() *cobra.Command {
	var f onboardFlags
	cmd := &cobra.Command{
		Use:   "onboard NAME",
		Short: "Admit a virtual machine and print the line to paste on it",
		Long: `Admit a virtual machine and print the line to paste on it.

The token can be used once, and for a short time only. It is asked for by the
script on the machine, so that it is in no argument list and no shell history.
Running the command again gives a new token, for a machine that has not come yet or
whose certificate ended while it was away; the name alone is enough then, and the
line is pasted again. A machine whose certificate is valid needs no token.`,
		Example: `  mesh vm onboard web-1 --network n1 --service legacy/web --port 8080
  mesh vm onboard web-1 --network n1 --service legacy/web --port 80:8080/http --health-check http://:8080/ready --wait
  mesh vm onboard web-1`,
		Args: arguments(1, 1, "a name for the virtual machine"),
		RunE: func(cmd *cobra.Command, args []string) error {
			vm, err := s.vmToOnboard(cmd.Context(), args[0], f)
			if err != nil {
				return err
			}
			return s.onboard(cmd.Context(), vm, f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.network, "network", "", "network of the machine (required)")
	fl.StringVar(&f.service, "service", "", "NAMESPACE/NAME of the service that it serves (required)")
	fl.StringArrayVar(&f.ports, "port", nil, "PORT[:TARGET][/PROTOCOL] of the service; repeatable (required)")
	fl.StringVar(&f.account, "service-account", "", "account of its identity; default: the service's name")
	fl.StringVar(&f.health, "health-check", "", "http://:PORT/PATH or tcp://:PORT; default: whether the first port accepts connections")
	fl.StringVar(&f.locality, "locality", "", "REGION[/ZONE[/SUBZONE]]")
	fl.DurationVar(&f.lifetime, "token-lifetime", 15*time.Minute, "how long the token can be used, at most 24h")
	fl.StringVar(&f.tokenFile, "token-file", "", "write the token to this new file instead of the screen")
	fl.BoolVar(&f.dryRun, "dry-run", false, "decide, and change nothing")
	fl.BoolVar(&f.wait, "wait", false, "wait until the machine is healthy")
	s.addProgressFlags(cmd, &f.timeout, 15*time.Minute)
	fl.StringVarP(&s.output, "output", "o", "table", "output: table, json or yaml")
	return cmd
}

// vmToOnboard is what the flags ask for; without any, the machine as it is registered.
func (s *session) vmToOnboard(ctx context.Context, name string, f onboardFlags) (*api.VM, error) {
	if f.network != "" || f.service != "" || len(f.ports) > 0 || f.account != "" || f.health != "" || f.locality != "" {
		return f.vm(name)
	}
	var list *api.VMList
	err := s.call(ctx, "cannot onboard "+name, func(ctx context.Context, c *connection) (err error) {
		list, err = c.ListVMs(ctx, &api.ListVMsRequest{Name: name})
		return err
	})
	var unknown *failure
	if errors.As(err, &unknown) && unknown.code == api.UnknownName {
		return nil, &failure{exit: exitUsage, what: "cannot onboard " + name, code: api.UnknownName,
			why: name + " is not registered yet, so that --network, --service and --port are needed",
			try: "mesh vm onboard " + name + " --network NETWORK --service NAMESPACE/NAME --port PORT"}
	}
	if err != nil {
		return nil, err
	}
	known := list.GetItems()[0]
	return &api.VM{ApiVersion: api.Version, Kind: "VM", Metadata: &api.Metadata{Name: name, Labels: known.GetMetadata().GetLabels()}, Spec: known.GetSpec()}, nil
}

// vm is what the flags ask for.
func (f *onboardFlags) vm(name string) (*api.VM, error) {
	for flag, value := range map[string]string{"--network": f.network, "--service": f.service} {
		if value == "" {
			return nil, usagef("%s is missing", flag)
		}
	}
	namespace, service, ok := strings.Cut(f.service, "/")
	if !ok || namespace == "" || service == "" {
		return nil, usagef("--service is %q, want NAMESPACE/NAME", f.service)
	}
	if len(f.ports) == 0 {
		return nil, usagef("--port is missing")
	}
	spec := &api.VMSpec{
		Network: f.network, Namespace: namespace, Service: service,
		ServiceAccount: f.account, HealthCheck: f.health, Locality: f.locality,
	}
	for _, p := range f.ports {
		port, err := parsePort(p)
		if err != nil {
			return nil, err
		}
		spec.Ports = append(spec.Ports, port)
	}
	return &api.VM{ApiVersion: api.Version, Kind: "VM", Metadata: &api.Metadata{Name: name}, Spec: spec}, nil
}

// parsePort reads PORT[:TARGET][/PROTOCOL].
func parsePort(s string) (*api.VMPort, error) {
	rest, protocol, _ := strings.Cut(s, "/")
	number, target, mapped := strings.Cut(rest, ":")
	if !mapped {
		target = number
	}
	n, err1 := strconv.ParseUint(number, 10, 16)
	t, err2 := strconv.ParseUint(target, 10, 16)
	if err1 != nil || err2 != nil || n == 0 || t == 0 {
		return nil, usagef("--port is %q, want PORT[:TARGET][/PROTOCOL] with ports from 1 to 65535", s)
	}
	return &api.VMPort{Number: uint32(n), Target: uint32(t), Protocol: protocol}, nil
}

func vmPortsText(ports []*api.VMPort) string {
	var out []string
	for _, p := range ports {
		t := fmt.Sprint(p.GetNumber())
		if p.GetTarget() != p.GetNumber() {
			t += fmt.Sprintf(":%d", p.GetTarget())
		}
		if p.GetProtocol() != "" {
			t += "/" + p.GetProtocol()
		}
		out = append(out, t)
	}
	return strings.Join(out, ",")
}

func (s *session) onboard(ctx context.Context, vm *api.VM, f onboardFlags) error {
	var out *api.OnboardVMResponse
	err := s.call(ctx, "cannot onboard "+vm.GetMetadata().GetName(), func(ctx context.Context, c *connection) (err error) {
		out, err = c.OnboardVM(ctx, &api.OnboardVMRequest{Vm: vm, TokenLifetime: durationpb.New(f.lifetime), DryRun: f.dryRun})
		return err
	})
	if err != nil {
		return err
	}
	if f.tokenFile != "" && !f.dryRun {
		if err := writeToken(f.tokenFile, out.GetToken()); err != nil {
			return err
		}
		out.Token = ""
	}
	switch s.output {
	case "json":
		return writeJSON(s.stdout, out)
	case "yaml":
		return writeYAML(s.stdout, out)
	}
	s.printOnboarding(out, f)
	if f.dryRun || !f.wait {
		return nil
	}
	return s.awaitVM(ctx, vm, f.timeout)
}

// writeToken makes a file that only its owner can read, and never writes over
// an existing one.
func writeToken(path, token string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return &failure{exit: exitFailed, what: "cannot write the token", why: err.Error(), try: "name a file that does not exist: --token-file FILE", err: err}
	}
	if _, err := fmt.Fprintln(file, token); err != nil {
		file.Close()
		return err
	}
	return file.Close()
}

func (s *session) printOnboarding(out *api.OnboardVMResponse, f onboardFlags) {
	st, columns := s.style(s.stdout), s.columns(s.stdout)
	for _, finding := range out.GetFindings() {
		in := 1 + st.markWidth(finding.GetSeverity())
		text := behind(fold(printable(finding.GetMessage()), columns, in), finding.GetCode(), columns, in, func(code string) string { return st.paint(faint, code) })
		fmt.Fprintf(s.stdout, "%s %s\n", st.mark(finding.GetSeverity()), text)
	}
	name := out.GetVm().GetMetadata().GetName()
	if f.dryRun {
		fmt.Fprintf(s.stdout, "%s would be admitted to %s (dry run)\n", name, vmService(out.GetVm()))
		return
	}
	fmt.Fprintf(s.stdout, "Paste this on %s, as root:\n\n  %s\n\n", name, out.GetLine())
	lives := short(out.GetVm().GetStatus().GetTokenExpires().AsTime().Sub(s.now()) + 500*time.Millisecond)
	if f.tokenFile != "" {
		fmt.Fprintf(s.stdout, "The token is in %s (single use, valid for %s).\n", f.tokenFile, lives)
	} else {
		fmt.Fprintf(s.stdout, "It asks for this token (single use, valid for %s):\n\n  %s\n\n", lives, out.GetToken())
	}
	fmt.Fprintf(s.stdout, "Then: mesh vm list %s     Undo: mesh vm offboard %s\n", name, name)
}

func vmService(v *api.VM) string {
	return v.GetSpec().GetNamespace() + "/" + v.GetSpec().GetService()
}

// awaitVM waits until the machine is healthy, and shows its phases.
func (s *session) awaitVM(ctx context.Context, vm *api.VM, timeout time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, context.DeadlineExceeded)
	defer cancel()
	name := vm.GetMetadata().GetName()
	p := s.newSteps()
	step := p.begin("healthy", "waiting for "+name)
	last := "Pending"
	for {
		var list *api.VMList
		err := s.call(ctx, "cannot list virtual machines", func(ctx context.Context, c *connection) (err error) {
			list, err = c.ListVMs(ctx, &api.ListVMsRequest{Name: name, Network: vm.GetSpec().GetNetwork()})
			return err
		})
		if st := statusOf(list, vm); err == nil && st != nil {
			last = strings.TrimSuffix(st.GetPhase()+": "+st.GetMessage(), ": ")
			if st.GetPhase() == "Healthy" {
				step.done("%s has an endpoint from %s; undo: mesh vm offboard %s", vmService(vm), name, name)
				return nil
			}
			step.waits("waiting for %s: %s", name, last)
		}
		if err := pause(ctx, time.Second); err != nil {
			step.fail(api.TimedOut, "%s is not healthy: %s", name, last)
			return s.waitFailure(ctx, "waiting for "+name, last)
		}
	}
}

// statusOf finds a machine in a list; nil if it is not there.
func statusOf(list *api.VMList, vm *api.VM) *api.VMStatus {
	for _, v := range list.GetItems() {
		if v.GetMetadata().GetName() == vm.GetMetadata().GetName() && v.GetSpec().GetNetwork() == vm.GetSpec().GetNetwork() {
			return v.GetStatus()
		}
	}
	return nil
}

// waitFailure is for a wait that ended because of ctx.
func (s *session) waitFailure(ctx context.Context, what, last string) error {
	if context.Cause(ctx) != context.DeadlineExceeded {
		return &failure{exit: exitInterrupted, what: what, why: "interrupted; last state: " + last}
	}
	return &failure{exit: exitTimeout, what: what, why: "gave up; last state: " + last, code: api.TimedOut, try: "run the command again, or allow more by --timeout"}
}
