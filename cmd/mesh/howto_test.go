// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var (
	codeBlock = regexp.MustCompile("(?ms)^ *```$(.*?)^ *```$")
	codeSpan  = regexp.MustCompile("`([^`]+)`")
	// invocation is one of mesh at the beginning of a line or behind a pipe.
	invocation = regexp.MustCompile(`(?m)(?:^ *(?:\$ )?|\| )(mesh [^|#;\n]*)`)
)

// TestDocumentedCommandsExist looks up every invocation of mesh in the pages that people
// follow: its verb, and each of its flags.
func TestDocumentedCommandsExist(t *testing.T) {
	t.Parallel()
	found := 0
	err := filepath.WalkDir("../../docs", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".md") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		found += checkCommands(t, path, string(text))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if found += checkCommands(t, "README.md", string(text)); found < 50 {
		t.Errorf("only %d commands were found: is the search still right?", found)
	}
}

func checkCommands(t *testing.T, page, text string) (found int) {
	t.Helper()
	code := ""
	for _, m := range codeBlock.FindAllStringSubmatch(text, -1) {
		code += strings.ReplaceAll(m[1], "\\\n", " ") + "\n"
	}
	for _, m := range codeSpan.FindAllStringSubmatch(codeBlock.ReplaceAllString(text, ""), -1) {
		code += m[1] + "\n"
	}
	for _, m := range invocation.FindAllStringSubmatch(code, -1) {
		if why := unknown(strings.Fields(m[1])[1:]); why != "" {
			t.Errorf("%s: %q: %s", page, strings.TrimSpace(m[1]), why)
		}
		found++
	}
	return found
}

// unknown says what of a command line does not exist, empty if all does.
func unknown(args []string) string {
	s, _, _ := plainSession()
	root := s.root()
	root.InitDefaultHelpCmd()
	cmd, rest, err := root.Find(args)
	if err != nil {
		return err.Error()
	}
	if (cmd == root || cmd.HasSubCommands()) && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") && rest[0] != "…" {
		return "there is no " + cmd.CommandPath() + " " + rest[0]
	}
	for _, arg := range rest {
		name, _, _ := strings.Cut(arg, "=")
		if strings.HasPrefix(name, "-") && name != "-" && lookup(cmd, name) == nil {
			return cmd.CommandPath() + " has no flag " + name
		}
	}
	return ""
}

func lookup(cmd *cobra.Command, name string) *pflag.Flag {
	cmd.InitDefaultHelpFlag()
	if long, ok := strings.CutPrefix(name, "--"); ok {
		if f := cmd.Flags().Lookup(long); f != nil {
			return f
		}
		return cmd.InheritedFlags().Lookup(long)
	}
	if f := cmd.Flags().ShorthandLookup(name[1:2]); f != nil {
		return f
	}
	return cmd.InheritedFlags().ShorthandLookup(name[1:2])
}
