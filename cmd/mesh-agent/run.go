// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/agent"
	"github.com/isthmus-mesh/isthmus/agent/dns"
	"github.com/isthmus-mesh/isthmus/agent/identity"
	"github.com/isthmus-mesh/isthmus/agent/onboard"
	"github.com/isthmus-mesh/isthmus/agent/redirect"
)

// version of this program, from the build information that Go embeds.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

func root() *cobra.Command {
	command := &cobra.Command{
		Use:           "mesh-agent",
		Short:         "Run Envoy for one workload of the mesh",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	command.AddCommand(proxyCommand(), redirectCommand(), waitCommand(), certificateCommand(), versionCommand())
	return command
}

func proxyCommand() *cobra.Command {
	var f proxyFlags
	command := &cobra.Command{
		Use:   "proxy",
		Short: "Run the agent and its Envoy until told to stop",
		Long: "Run the agent and its Envoy until told to stop.\n\n" +
			"Every flag can be given as an environment variable too (named in its description); the flag wins.\n" +
			"On a virtual machine, --config names what the onboarding script stored; flags win over it as well.\n" +
			"SIGHUP renews the certificate now; by itself it is renewed at about half of its life.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := f.config()
			if err != nil {
				return err
			}
			log, err := f.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			one, err := agent.New(config, log)
			if err != nil {
				return err
			}
			defer onHangup(one.Renew)()
			return one.Run(cmd.Context())
		},
	}
	f.bind(command.Flags(), os.Getenv)
	return command
}

// onHangup does something at each SIGHUP, until stopped.
func onHangup(do func()) (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP)
	go func() {
		for range signals {
			do()
		}
	}()
	return func() { signal.Stop(signals); close(signals) }
}

func redirectCommand() *cobra.Command {
	var f ruleFlags
	var apply, undo bool
	var conf, show string
	command := &cobra.Command{
		Use:   "redirect",
		Short: "Send this machine's or pod's traffic through Envoy, or stop doing so",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if undo {
				return redirect.Undo(cmd.Context())
			}
			rules, err := f.rules(conf)
			if err != nil {
				return err
			}
			if show != "" {
				_, err := io.WriteString(cmd.OutOrStdout(), rules.Text())
				return err
			}
			return redirect.Apply(cmd.Context(), rules)
		},
	}
	flags := command.Flags()
	flags.BoolVar(&apply, "apply", false, "program redirection, replacing what was there")
	flags.BoolVar(&undo, "undo", false, "remove all of it")
	flags.StringVar(&show, "show", "", "print the rules (nft) instead of applying them")
	flags.Lookup("show").NoOptDefVal = "nft"
	flags.StringVar(&conf, "resolv-conf", "/etc/resolv.conf", "file whose resolvers' queries are captured")
	f.bind(flags, os.Getenv)
	command.MarkFlagsMutuallyExclusive("apply", "undo", "show")
	command.MarkFlagsOneRequired("apply", "undo", "show")
	return command
}

func waitCommand() *cobra.Command {
	var url string
	var timeout time.Duration
	command := &cobra.Command{
		Use:   "wait",
		Short: "Wait until the agent on this machine says that it is ready",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return wait(ctx, url)
		},
	}
	command.Flags().StringVar(&url, "url", "http://127.0.0.1:15021/healthz/ready", "where to ask")
	command.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return command
}

// wait asks until the answer is 200; the last answer says why it never was.
func wait(ctx context.Context, url string) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("not asked yet")
	for {
		err := ask(ctx, url)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready in time: %w", last)
		case <-tick.C:
		}
	}
}

func ask(ctx context.Context, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 4<<10))
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return errors.New(strings.ReplaceAll(strings.TrimSpace(string(body)), "\n", "; "))
	}
	return nil
}

func certificateCommand() *cobra.Command {
	var dir string
	command := &cobra.Command{
		Use:   "certificate",
		Short: "Tell whose certificate is stored, and until when it can renew itself",
		Long: "Tell whose certificate is stored, and until when it can renew itself.\n\n" +
			"It fails if there is none, or if it has ended: then a new token is needed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cert, err := (&identity.Store{Path: agent.IdentityPath(dir)}).Load()
			if err != nil {
				return err
			}
			ends := cert.Leaf.NotAfter.UTC().Format(time.RFC3339)
			if !cert.ValidAt(time.Now()) {
				return fmt.Errorf("the certificate of %s ended at %s", cert.URI(), ends)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s until %s\n", cert.URI(), ends)
			return err
		},
	}
	e := environment{command.Flags(), os.Getenv}
	e.text(&dir, "state-dir", "MESH_STATE_DIR", "/var/run/isthmus", "folder for key and certificate")
	return command
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), version())
			return err
		},
	}
}

// onboarded reads what the onboarding script stored.
func onboarded(path string) (*onboard.Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	config, err := onboard.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return config, nil
}

// resolvers are those whose queries are captured.
func resolvers(path string) (dns.ResolvConf, error) {
	conf, err := dns.ReadResolvConf(path)
	if errors.Is(err, os.ErrNotExist) {
		return dns.ResolvConf{}, nil
	}
	return conf, err
}
