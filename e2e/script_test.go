// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/kubelet"
	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

var worlds = flag.Int("worlds", 2, "how many stories are played at once; each needs about a core and 2 GiB")

func TestMain(m *testing.M) {
	kubelet.Shim()
	remove := func() {}
	if bed.Outside() {
		var err error
		if remove, err = stage.BuildPrograms(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	code := bed.Inside(m).Run()
	remove()
	os.Exit(code)
}

// TestScripts plays every story, some at once.
func TestScripts(t *testing.T) {
	t.Parallel()
	places := make(chan struct{}, *worlds)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		Cmds:                words(),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			places <- struct{}{}
			env.Defer(func() { <-places })
			log := slog.New(slog.DiscardHandler)
			if testing.Verbose() {
				log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
			}
			s, err := stage.New(stage.Config{Log: log})
			if err != nil {
				return err
			}
			env.Values[stageKey] = &play{Stage: s}
			env.Defer(func() {
				if t, ok := env.T().(interface{ Failed() bool }); ok && t.Failed() {
					env.T().Log(s.Tails(40) + s.View(context.Background()))
				}
				if err := s.Close(); err != nil {
					env.T().Log("left on the stage: ", err)
					env.T().FailNow()
				}
			})
			return nil
		},
	})
}
