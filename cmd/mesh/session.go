// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// session is one run of the command: its streams, its environment, and the
// flags that every verb has.
type session struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            func(string) string
	home           string
	now            func() time.Time

	// Whether the streams are terminals; the width of the terminal, else 80.
	inTerminal, outTerminal, errTerminal bool
	width                                int

	server         string        // --server
	config         string        // --config
	requestTimeout time.Duration // --request-timeout

	output    string // -o
	noHeaders bool
	color     string
	ascii     bool
	progress  string

	member memberFlags

	target string // address of meshd, once connected
}

// memberFlags say which Kubernetes cluster a verb touches, as kubectl's do.
type memberFlags struct {
	kubeconfig, context, as string
	asGroups                []string
}

func newSession() *session {
	home, _ := os.UserHomeDir() // empty: then --config has to be given
	s := &session{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		env: os.Getenv, home: home, now: time.Now,
		inTerminal:  term.IsTerminal(int(os.Stdin.Fd())),
		outTerminal: term.IsTerminal(int(os.Stdout.Fd())),
		errTerminal: term.IsTerminal(int(os.Stderr.Fd())),
		width:       80,
	}
	if w, _, err := term.GetSize(int(os.Stdout.Fd())); err == nil && w > 0 {
		s.width = w
	}
	return s
}

// run executes the command line args and returns the exit code.
func (s *session) run(ctx context.Context, args []string) int {
	root := s.root()
	root.SetArgs(args)
	root.SetIn(s.stdin)
	root.SetOut(s.stdout)
	root.SetErr(s.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	f := s.failureOf(ctx, err)
	if f.why == "" && f.what == "" { // said all it had to say: findings
		return f.exit
	}
	if f.what == "" {
		f.what = "cannot run " + cmd.CommandPath()
	}
	f.print(s.stderr, s.style(s.stderr), s.columns(s.stderr))
	return f.exit
}

func (s *session) root() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "mesh",
		Short: "Join clusters and virtual machines into one service mesh",
		Example: `  mesh join cluster east --context prod-east --network east-net --primary
  mesh clusters
  mesh check`,
		SilenceErrors: true, SilenceUsage: true,
		Args: subcommandOnly, RunE: showHelp,
		PersistentPreRunE: func(*cobra.Command, []string) error { return s.validate() },
	}
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError(c, err) })
	s.addGlobalFlags(cmd)

	cmd.AddGroup(
		&cobra.Group{ID: "members", Title: "Clusters and virtual machines:"},
		&cobra.Group{ID: "look", Title: "Look:"},
		&cobra.Group{ID: "workloads", Title: "Workloads:"},
	)
	for group, children := range map[string][]*cobra.Command{
		"members":   {s.joinCommand(), s.leaveCommand(), s.vmCommand()},
		"look":      {s.clustersCommand(), s.servicesCommand(), s.endpointsCommand(), s.proxiesCommand(), s.configCommand(), s.checkCommand(), s.activityCommand(), s.caCommand(), s.explainCommand()},
		"workloads": {s.injectCommand()},
		"":          {s.versionCommand(), s.docsCommand()},
	} {
		for _, c := range children {
			c.GroupID = group
			cmd.AddCommand(c)
		}
	}
	cmd.SetUsageTemplate(strings.ReplaceAll(cmd.UsageTemplate(), "Flags.FlagUsages ", fmt.Sprintf("Flags.FlagUsagesWrapped %d ", min(s.width, 100))))
	cmd.InitDefaultCompletionCmd()
	return cmd
}

func (s *session) addGlobalFlags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringVar(&s.server, "server", "", "address of meshd's admin port; default: MESH_SERVER, else what admin.conf says")
	f.StringVar(&s.config, "config", "", "path of admin.conf; default: MESH_CONFIG, else ~/.config/isthmus/admin.conf")
	f.DurationVar(&s.requestTimeout, "request-timeout", 30*time.Second, "how long one request to meshd may take")
	f.StringVar(&s.color, "color", "auto", "colour: auto, always or never")
	f.BoolVar(&s.ascii, "ascii", false, "no other symbols than ASCII")
	f.SortFlags = true
	for name, values := range map[string][]string{"color": {"auto", "always", "never"}} {
		must(cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)))
	}
}

// addOutputFlags gives a verb that lists something -o and --no-headers.
func (s *session) addOutputFlags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&s.output, "output", "o", "table", "output: table, wide, json, yaml or name")
	cmd.Flags().BoolVar(&s.noHeaders, "no-headers", false, "no header line")
	must(cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(
		[]string{"table", "wide", "json", "yaml", "name"}, cobra.ShellCompDirectiveNoFileComp)))
}

// addMemberFlags gives a verb that touches a cluster the flags of kubectl.
func (s *session) addMemberFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.member.kubeconfig, "kubeconfig", "", "path of the kubeconfig; default: KUBECONFIG, else ~/.kube/config")
	f.StringVar(&s.member.context, "context", "", "context of the kubeconfig")
	f.StringVar(&s.member.as, "as", "", "user to impersonate in the cluster")
	f.StringArrayVar(&s.member.asGroups, "as-group", nil, "group to impersonate in the cluster; repeatable")
	must(cmd.RegisterFlagCompletionFunc("context", s.completeContexts))
}

// addProgressFlags gives a verb of several steps --progress and --timeout.
func (s *session) addProgressFlags(cmd *cobra.Command, timeout *time.Duration, def time.Duration) {
	cmd.Flags().StringVar(&s.progress, "progress", "auto", "how steps are shown: auto, plain or json (one event a line)")
	cmd.Flags().DurationVar(timeout, "timeout", def, "how long the whole may take")
	must(cmd.RegisterFlagCompletionFunc("progress", cobra.FixedCompletions(
		[]string{"auto", "plain", "json"}, cobra.ShellCompDirectiveNoFileComp)))
}

// validate checks the values of the shared flags before any verb runs.
func (s *session) validate() error {
	for _, f := range []struct {
		name, value string
		allowed     []string
	}{
		{"--output", s.output, []string{"", "table", "wide", "json", "yaml", "name"}},
		{"--color", s.color, []string{"auto", "always", "never"}},
		{"--progress", s.progress, []string{"", "auto", "plain", "json"}},
	} {
		if err := oneOf(f.name, f.value, f.allowed); err != nil {
			return err
		}
	}
	return nil
}

// must is for the registration of completions, which fails only on a flag that
// does not exist.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
