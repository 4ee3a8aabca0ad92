// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/isthmus-mesh/isthmus/registry/kube"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"mesh": main})
}

// TestScripts runs the transcripts in testdata/script. Each has a meshd of its
// own that answers from testdata/fleet, and a member cluster to join.
//
//	answer METHOD FILE        what meshd answers from now on
//	refuse METHOD STATUS CODE MESSAGE [TRY]
//	slow METHOD               meshd never answers it
//	member KEY VALUE          changes the cluster (see memberAPI)
//	exits CODE mesh ARGS...   runs mesh and compares its exit code
//	asked METHOD TEXT         what meshd was asked, as JSON, has TEXT
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:           filepath.Join("testdata", "script"),
		Setup:         setup,
		UpdateScripts: os.Getenv("UPDATE") != "",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"answer": answer, "refuse": refuse, "slow": slow, "member": memberCommand, "exits": exits, "asked": asked,
		},
	})
}

type serverKey struct{}

func setup(env *testscript.Env) error {
	t, ok := env.T().(testing.TB)
	if !ok {
		panic("testscript runs without a testing.TB")
	}
	server := startServer(t)
	member := startMember(t)
	env.Values[serverKey{}] = &stage{server, member}
	config := filepath.Join(env.WorkDir, "admin.conf")
	if err := server.admin.Save(config); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(env.WorkDir, "kubeconfig"), member.kubeconfig(), 0o600); err != nil {
		return err
	}
	env.Setenv("MESH_CONFIG", config)
	env.Setenv("KUBECONFIG", filepath.Join(env.WorkDir, "kubeconfig"))
	env.Setenv("MESHD", server.address)
	env.Setenv("MEMBER", strings.TrimPrefix(member.URL, "https://"))
	env.Setenv("TERM", "xterm")
	env.Setenv("PERMISSIONS", strconv.Itoa(len(kube.RequiredAccess(kube.MemberOptions{Gateway: true}))))
	return nil
}

// stage is what one script plays on.
type stage struct {
	server *server
	member *memberAPI
}

func stageOf(ts *testscript.TestScript) *stage { return ts.Value(serverKey{}).(*stage) }

func need(ts *testscript.TestScript, neg bool, args []string, atLeast int, usage string) {
	if neg || len(args) < atLeast {
		ts.Fatalf("usage: %s", usage)
	}
}

func answer(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, args, 2, "answer METHOD FILE")
	stageOf(ts).server.answer(ts, args[0], ts.ReadFile(args[1]))
}

func refuse(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, args, 4, "refuse METHOD STATUS CODE MESSAGE [TRY]")
	stageOf(ts).server.refuse(ts, args[0], args[1], args[2], args[3], strings.Join(args[4:], " "))
}

func slow(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, args, 1, "slow METHOD")
	stageOf(ts).server.slow(args[0])
}

func memberCommand(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, args, 2, "member KEY VALUE")
	stageOf(ts).member.set(args[0], strings.Join(args[1:], " "))
}

// exits runs a command and wants this exit code of it.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	need(ts, neg, args, 2, "exits CODE COMMAND ARGS...")
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if err != nil {
		exit, ok := err.(interface{ ExitCode() int })
		if !ok {
			ts.Fatalf("%s: %v", strings.Join(args[1:], " "), err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func asked(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: asked METHOD TEXT")
	}
	requests := stageOf(ts).server.requests(args[0])
	if strings.Contains(requests, args[1]) == neg {
		ts.Fatalf("%s was asked:\n%s", args[0], requests)
	}
}
