// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
)

// authorityFlags name one authority.
type authorityFlags struct {
	root             bool
	cluster, network string
}

func (s *session) addAuthorityFlags(cmd *cobra.Command, f *authorityFlags) {
	cmd.Flags().BoolVar(&f.root, "root", false, "the root of the trust domain")
	cmd.Flags().StringVar(&f.cluster, "cluster", "", "the authority of this cluster; meshd is that of meshd itself")
	cmd.Flags().StringVar(&f.network, "network", "", "the authority of this network of virtual machines")
	cmd.MarkFlagsMutuallyExclusive("root", "cluster", "network")
	must(cmd.RegisterFlagCompletionFunc("cluster", s.completeClusters))
}

// name is how the API calls it; empty if none was named.
func (f *authorityFlags) name() string {
	switch {
	case f.root:
		return "root"
	case f.network != "":
		return "network/" + f.network
	}
	return f.cluster
}

func (s *session) caRotateCommand() *cobra.Command {
	var f authorityFlags
	var plan, yes bool
	cmd := &cobra.Command{
		Use:   "rotate {--root | --cluster NAME | --network NAME}",
		Short: "Replace an authority by a new one, without a failed handshake",
		Long: `Replace an authority by a new one, without a failed handshake.

meshd takes the steps by itself and keeps each in etcd, whichever replica goes
away meanwhile. A new root is given to every workload first, and signs only when
the Envoy of each has acknowledged it: who has not is named by mesh ca status, and
waited for, unless somebody decides to go on without (mesh ca proceed). The old
root goes when nothing is alive that it vouched for. The authority of one cluster
needs no acknowledgements: it travels with every certificate that it signed.

It can be paused (mesh ca pause), and taken back until the old authority is
removed (mesh ca rollback).

An authority that was brought along (meshd --ca-dir) is not rotated by the mesh.`,
		Example: `  mesh ca rotate --root --plan
  mesh ca rotate --root
  mesh ca rotate --cluster prod-eu`,
		Args: arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.name() == "" {
				return usagef("name what to rotate: --root, --cluster NAME or --network NAME")
			}
			if !plan {
				// What cannot be done is not asked about.
				if _, err := s.plan(cmd.Context(), f.name()); err != nil {
					return err
				}
				if err := s.confirm(yes, "Rotate the authority "+f.name()+"?", f.name()); err != nil {
					return err
				}
			}
			return s.rotate(cmd.Context(), f.name(), plan)
		},
	}
	s.addAuthorityFlags(cmd, &f)
	s.addOutputFlags(cmd)
	cmd.Flags().BoolVar(&plan, "plan", false, "say what would be done, and do nothing")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

func (s *session) plan(ctx context.Context, name string) (*api.RotateAuthorityResponse, error) {
	return s.changeRotation(ctx, &api.RotateAuthorityRequest{Name: name, Action: "plan"}, "cannot rotate the authority "+name)
}

func (s *session) rotate(ctx context.Context, name string, plan bool) error {
	if !plan {
		answer, err := s.changeRotation(ctx, &api.RotateAuthorityRequest{Name: name, Action: "start"}, "cannot rotate the authority "+name)
		if err != nil {
			return err
		}
		fmt.Fprintf(s.stderr, "%s rotation of %s has begun; follow it: mesh ca status\n", s.style(s.stderr).mark("done"), printable(name))
		return s.printAuthority(answer.GetReport())
	}
	answer, err := s.plan(ctx, name)
	if err != nil {
		return err
	}
	drain := time.Duration(answer.GetDrainSeconds()) * time.Second
	fmt.Fprintf(s.stdout, "prepare → distribute → sign-new → drain-old → remove   est. %s, once all have acknowledged\n", short(drain))
	fmt.Fprintln(s.stdout, "point of no return: remove")
	if name == "root" {
		fmt.Fprintln(s.stdout, "copies of admin.conf that are older than sign-new stop working at remove: take new ones from meshd's data directory")
	}
	return nil
}

// rotationChange is a verb that changes a rotation which goes on.
type rotationChange struct {
	verb, action, short, long, done string
}

var rotationChanges = []rotationChange{
	{"pause", "pause", "Stop a rotation where it is", "Both authorities go on being trusted. Resume it by mesh ca resume.", "is paused; go on: mesh ca resume"},
	{"resume", "resume", "Let a rotation go on that was paused", "", "goes on"},
	{"rollback", "rollback", "Take a rotation back", `Possible until the old authority is removed. Before the new one has signed, it is
given up at once. After that the old one signs again, and the new one is drained and
removed by the same steps.`, "is rolled back"},
	{"proceed", "proceed", "Go on without those that have not acknowledged the new root", `Those that are waited for are shown, and left behind if you say so: they, and nobody
else, may fail to reach others once the old root is removed. The decision and their
names are kept in the audit log. If others are waited for by the time that it reaches
meshd, it is refused.`, "goes on without them"},
}

func (s *session) caChangeCommand(c rotationChange) *cobra.Command {
	var f authorityFlags
	var yes bool
	cmd := &cobra.Command{
		Use:   c.verb + " [--root | --cluster NAME | --network NAME]",
		Short: c.short,
		Long:  strings.TrimSpace(c.short + ".\n\n" + c.long + "\n\nThe authority needs to be named only if several are being rotated."),
		Args:  arguments(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.change(cmd.Context(), c, f.name(), yes)
		},
	}
	s.addAuthorityFlags(cmd, &f)
	s.addOutputFlags(cmd)
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

func (s *session) change(ctx context.Context, c rotationChange, name string, yes bool) error {
	req := &api.RotateAuthorityRequest{Name: name, Action: c.action}
	if c.action == "proceed" {
		report, err := s.fetchAuthority(ctx)
		if err != nil {
			return err
		}
		req.Stragglers = stragglersOf(report, name)
		for _, straggler := range req.Stragglers {
			fmt.Fprintln(s.stderr, "  "+printable(straggler))
		}
		if err := s.confirm(yes, "Go on without these?", "proceed"); err != nil {
			return err
		}
	}
	answer, err := s.changeRotation(ctx, req, "cannot "+c.verb+" the rotation")
	if err != nil {
		return err
	}
	fmt.Fprintf(s.stderr, "%s the rotation %s\n", s.style(s.stderr).mark("done"), c.done)
	return s.printAuthority(answer.GetReport())
}

// stragglersOf are those that a rotation waits for and that were not left behind before.
func stragglersOf(report *api.AuthorityReport, name string) []string {
	var out []string
	for _, r := range report.GetRotations() {
		if name != "" && r.GetName() != name {
			continue
		}
		for _, p := range r.GetProgress() {
			for _, straggler := range p.GetStragglers() {
				if !slices.Contains(r.GetLeft(), straggler.GetName()) {
					out = append(out, straggler.GetName())
				}
			}
		}
	}
	return out
}

func (s *session) changeRotation(ctx context.Context, req *api.RotateAuthorityRequest, what string) (answer *api.RotateAuthorityResponse, err error) {
	err = s.call(ctx, what, func(ctx context.Context, c *connection) (err error) {
		answer, err = c.RotateAuthority(ctx, req)
		return err
	})
	return answer, err
}

// printRotation prints how far a rotation is.
func (s *session) printRotation(r *api.Rotation) error {
	st := s.style(s.stdout)
	what := "rotation of " + r.GetName()
	if r.GetBack() {
		what = "rotation of " + r.GetName() + ", rolled back"
	}
	fmt.Fprintf(s.stdout, "\n%s   phase %s   started %s ago   point of no return: remove\n", printable(what), r.GetPhase(), s.age(r.GetStarted()))
	if w := r.GetWaiting(); w != "" {
		at := ""
		if r.GetDrains() != nil && r.GetPhase() == "drain-old" && !r.GetPaused() {
			at = ", in " + short(r.GetDrains().AsTime().Sub(s.now()))
		}
		fmt.Fprintf(s.stdout, "waiting for %s%s\n", printable(w), at)
	}
	t := table{columns: []column{
		{head: "CLUSTER"}, {head: "PROXIES", right: true}, {head: "TRUST PRESENT ROOTS", right: true}, {head: "SIGNED BY NEW", right: true}, {head: "WAITING FOR"},
	}}
	for _, p := range r.GetProgress() {
		t.rows = append(t.rows, []cell{
			{text: p.GetName()}, {text: fmt.Sprint(p.GetProxies())}, {text: percent(p.GetTrusting(), p.GetProxies())},
			{text: percent(p.GetSigned(), p.GetProxies())}, {text: waitingOn(p, r.GetLeft())},
		})
	}
	if len(t.rows) == 0 {
		return nil
	}
	return t.write(s.stdout, st, s.output == "wide", !s.noHeaders)
}

// percent is rounded down, so that 100% is all.
func percent(n, of int32) string {
	if of == 0 {
		return "-"
	}
	return fmt.Sprintf("%d%%", int64(n)*100/int64(of))
}

// maxNamed is how many stragglers of a cluster are named in the table; -o json has all.
const maxNamed = 3

func waitingOn(p *api.RotationProgress, left []string) string {
	var names []string
	for i, straggler := range p.GetStragglers() {
		if i == maxNamed {
			names = append(names, fmt.Sprintf("and %d more (-o json)", len(p.GetStragglers())-maxNamed))
			break
		}
		why := straggler.GetReason()
		if slices.Contains(left, straggler.GetName()) {
			why = "left behind"
		}
		names = append(names, straggler.GetName()+" ("+why+")")
	}
	return strings.Join(names, ", ")
}
