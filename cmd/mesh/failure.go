// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"

	"github.com/isthmus-mesh/isthmus/api"
)

// The exit codes. They are documented in docs/reference/cli.md and never change.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitFindings    = 3
	exitUnreachable = 4
	exitDenied      = 5
	exitTimeout     = 6
	exitInterrupted = 130
)

// failure is an error in the four lines in which people get to see it.
type failure struct {
	exit int
	what string   // what failed; empty: the name of the verb
	why  string   // the cause, trimmed to its useful end
	try  string   // what to do, a command where there is one
	code api.Code // for mesh explain
	err  error    // what it was made from, if anything
}

func (f *failure) Error() string { return f.what + ": " + f.why }
func (f *failure) Unwrap() error { return f.err }

// errFindings ends a check that has printed its findings.
var errFindings = &failure{exit: exitFindings}

// errInterrupted is the cause of everything that ends by Ctrl-C.
var errInterrupted = errors.New("interrupted")

// print writes it for a terminal of that width, 0 for none. Remedies are not folded: they
// are there to be copied.
func (f *failure) print(w io.Writer, st style, width int) {
	fmt.Fprintf(w, "%s %s\n", st.paint(red, "mesh:"), f.what)
	indent := strings.NewReplacer("\n", "\n        ")
	if f.why != "" {
		var lines []string
		for line := range strings.SplitSeq(f.why, "\n") {
			lines = append(lines, fold(line, width, 8))
		}
		fmt.Fprintf(w, "  why   %s\n", strings.Join(lines, "\n        "))
	}
	if f.try != "" {
		fmt.Fprintf(w, "  try   %s\n", indent.Replace(f.try))
	}
	if f.code != "" {
		fmt.Fprintf(w, "  code  %s (mesh explain %s)\n", f.code, f.code)
	}
}

// failureOf turns any error that reaches the top into a failure.
func (s *session) failureOf(ctx context.Context, err error) *failure {
	var f *failure
	switch {
	case errors.As(err, &f):
		out := *f
		if ctx.Err() != nil && out.exit != exitUsage {
			out.exit = exitInterrupted
		}
		return &out
	case ctx.Err() != nil || errors.Is(err, errInterrupted):
		return &failure{exit: exitInterrupted, why: "interrupted", err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{exit: exitTimeout, why: err.Error(), code: api.TimedOut, try: "allow more by --timeout, or run the same command again", err: err}
	}
	return &failure{exit: exitFailed, why: err.Error(), err: err}
}

// rpcFailure explains an error of the admin API. what may be empty.
func (s *session) rpcFailure(what string, err error) error {
	p := api.ProblemOf(err)
	f := &failure{exit: exitFailed, what: what, why: p.Message, try: p.Try, code: p.Code, err: err}
	switch p.Status {
	case codes.InvalidArgument:
		f.exit, f.code = exitUsage, orCode(f.code, api.InvalidInput)
	case codes.PermissionDenied, codes.Unauthenticated:
		f.exit, f.code = exitDenied, orCode(f.code, api.NotAnAdministrator)
	case codes.DeadlineExceeded:
		f.exit, f.code = exitTimeout, orCode(f.code, api.TimedOut)
	case codes.NotFound:
		f.code = orCode(f.code, api.UnknownName)
	case codes.Canceled:
		f.exit, f.why = exitInterrupted, "interrupted"
	case codes.Unavailable:
		f.unavailable(s.target)
	}
	if f.try == "" {
		f.try = defaultRemedy(f.code)
	}
	return f
}

// unavailable words the ways in which a connection to meshd fails.
func (f *failure) unavailable(target string) {
	if f.code != "" { // meshd itself said so, for example because etcd is away
		return
	}
	f.exit, f.code = exitUnreachable, api.ServerUnreachable
	if i := strings.LastIndex(f.why, "Error while dialing: "); i >= 0 {
		f.why = strings.TrimSuffix(f.why[i+len("Error while dialing: "):], `"`)
	}
	if strings.Contains(f.why, "remote error: tls:") {
		f.exit, f.code = exitDenied, api.NotAnAdministrator
	}
	if i := strings.LastIndex(f.why, "authentication handshake failed: "); i >= 0 {
		f.why = strings.TrimSuffix(f.why[i+len("authentication handshake failed: "):], `"`)
	}
	f.why = "meshd at " + target + ": " + f.why
	f.try = ""
}

func defaultRemedy(c api.Code) string {
	e, ok := api.Explain(c)
	if !ok {
		return ""
	}
	return wrap(e.Remedy, 68)
}

func orCode(c, other api.Code) api.Code {
	if c != "" {
		return c
	}
	return other
}

// usageError is for flags and arguments that cannot be meant.
func usageError(cmd *cobra.Command, err error) error {
	f := &failure{exit: exitUsage, why: err.Error(), try: cmd.CommandPath() + " --help", err: err}
	if given, ok := strings.CutPrefix(f.why, "unknown flag: --"); ok {
		var flags []string
		cmd.Flags().VisitAll(func(flag *pflag.Flag) { flags = append(flags, flag.Name) })
		if near := nearest(given, flags); near != "" {
			f.try = "did you mean --" + near + "?"
		}
	}
	return f
}

func usagef(format string, args ...any) error {
	return &failure{exit: exitUsage, why: fmt.Sprintf(format, args...)}
}

// oneOf reports a value that is not among the allowed ones.
func oneOf(flag, value string, allowed []string) error {
	if slices.Contains(allowed, value) {
		return nil
	}
	shown := slices.DeleteFunc(slices.Clone(allowed), func(v string) bool { return v == "" })
	return usagef("%s is %q, want one of %s", flag, value, strings.Join(shown, ", "))
}

// subcommandOnly is for commands that do nothing by themselves.
func subcommandOnly(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	cmd.SuggestionsMinimumDistance = 2
	f := &failure{exit: exitUsage, why: fmt.Sprintf("%q is no command of %s", args[0], cmd.CommandPath()), try: cmd.CommandPath() + " --help"}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		f.try = "did you mean " + cmd.CommandPath() + " " + near[0] + "?"
	}
	f.what = "unknown command"
	return f
}

func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// arguments checks the number of arguments and names what is missing.
func arguments(minimum, maximum int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < minimum {
			return usageError(cmd, fmt.Errorf("%s is missing", what))
		}
		if len(args) > maximum {
			return usageError(cmd, fmt.Errorf("%q is one argument too many", args[maximum]))
		}
		return nil
	}
}
