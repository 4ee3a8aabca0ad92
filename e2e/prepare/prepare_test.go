// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// scripted is an artifact whose program is a shell script that prints version.
func scripted(version, printed string, builds *int) artifact {
	return artifact{
		folder:   "tool-" + version,
		what:     "make tool " + version,
		programs: []program{{"tool", nil, "version " + version}},
		build: func(_ context.Context, _ *progress, dir string) error {
			*builds++
			return os.WriteFile(filepath.Join(dir, "tool"), []byte("#!/bin/sh\necho version "+printed+"\n"), 0o755)
		},
	}
}

func quiet() (*progress, *strings.Builder) {
	var said strings.Builder
	return &progress{out: &said, start: time.Now()}, &said
}

func TestArtifactIsMadeOnceAndAgainWhenItChanged(t *testing.T) {
	t.Parallel()
	dir, builds := t.TempDir(), 0
	a := scripted("1.2.3", "1.2.3", &builds)
	work, said := quiet()
	prepare := func(want int) {
		t.Helper()
		if err := a.prepare(t.Context(), work, dir); err != nil {
			t.Fatal(err)
		}
		if builds != want {
			t.Errorf("built %d times, want %d", builds, want)
		}
	}
	prepare(1)
	if !strings.Contains(said.String(), "make tool 1.2.3: done in") {
		t.Errorf("it says %q", said)
	}
	prepare(1)

	tool := filepath.Join(dir, "tool-1.2.3", "tool")
	touched := time.Now().Add(time.Hour)
	if err := os.Chtimes(tool, touched, touched); err != nil {
		t.Fatal(err)
	}
	prepare(1) // another file of the right version will do

	if err := os.WriteFile(tool, []byte("#!/bin/sh\necho version 0.9\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	prepare(2)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Errorf("the cache folder holds %v, want the artifact alone", entries)
	}
}

func TestArtifactOfAnotherVersionIsRefused(t *testing.T) {
	t.Parallel()
	dir, builds := t.TempDir(), 0
	work, _ := quiet()
	err := scripted("1.2.3", "1.2.4", &builds).prepare(t.Context(), work, dir)
	if err == nil || !strings.Contains(err.Error(), `version is "version 1.2.4", want one with "version 1.2.3"`) {
		t.Errorf("got %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left in the cache folder: %v", entries)
	}
}

func TestAnEnvoyThatSomebodyBrought(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, script := range map[string]string{
		"good": "echo envoy version: abc/1.40.0/Clean/RELEASE/BoringSSL", "new": "echo envoy version: abc/1.50.1/Clean", "bad": "exit 3",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ path, said, failure string }{
		{"", "", ""},
		{filepath.Join(dir, "good"), "", ""},
		{filepath.Join(dir, "new"), "not the one that this was made with", ""},
		{filepath.Join(dir, "bad"), "", "exit status 3; set it to the path of an Envoy 1.40.0"},
		{filepath.Join(dir, "none"), "", "no such file or directory"},
	} {
		work, said := quiet()
		err := ownEnvoy(t.Context(), work, c.path)
		if c.failure == "" && err != nil || c.failure != "" && (err == nil || !strings.Contains(err.Error(), c.failure)) {
			t.Errorf("%s: %v, want %q", c.path, err, c.failure)
		}
		if (c.said == "") != (said.String() == "") || !strings.Contains(said.String(), c.said) {
			t.Errorf("%s: it says %q, want %q", c.path, said, c.said)
		}
	}
}

func TestOneFailureEndsTheOthers(t *testing.T) {
	t.Parallel()
	broken := errors.New("no network")
	ended := false
	work, _ := quiet()
	err := artifacts(t.Context(), work, t.TempDir(), []artifact{
		{folder: "a", what: "a", download: true, build: func(context.Context, *progress, string) error { return broken }},
		{folder: "b", what: "b", build: func(ctx context.Context, _ *progress, _ string) error {
			<-ctx.Done()
			ended = true
			return ctx.Err()
		}},
	})
	if !errors.Is(err, broken) || !ended {
		t.Errorf("got %v, want the first failure; the other one ended: %v", err, ended)
	}
}

func TestTwoPreparationsWaitForEachOther(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), ".lock")
	inside, most := 0, 0
	var mu sync.Mutex
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			unlock, err := lock(path)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			inside++
			most = max(most, inside)
			mu.Unlock()
			mu.Lock()
			inside--
			mu.Unlock()
			unlock()
		})
	}
	group.Wait()
	if most != 1 {
		t.Errorf("%d held the lock at once", most)
	}
}

func TestMissingPackagesAreNamedOnce(t *testing.T) {
	t.Parallel()
	got := missing([]requirement{
		{"sh", "dash", "is there"},
		{"/etc/passwd", "base-passwd", "is there"},
		{"isthmus-no-such-program", "one", "is not"},
		{"/isthmus/no/such/file", "one", "is not"},
		{"isthmus-nor-this", "two", "is not"},
	})
	if want := []string{"one", "two"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestVersionFlags(t *testing.T) {
	t.Parallel()
	got := versionFlags("1.36.3")
	for _, want := range []string{".gitVersion=v1.36.3 ", ".gitMajor=1 ", ".gitMinor=36 ", ".gitTreeState=clean "} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
}

func TestProgressSpeaksUpDuringLongPhases(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		work, said := quiet()
		done := work.phase("compile")
		time.Sleep(65 * time.Second)
		synctest.Wait()
		done(nil)
		want := "prepare     0s  compile ...\n" +
			"prepare    30s  compile: still working after 30s\n" +
			"prepare   1m0s  compile: still working after 1m0s\n" +
			"prepare   1m5s  compile: done in 1m5s\n"
		if said.String() != want {
			t.Errorf("got\n%swant\n%s", said, want)
		}
	})
}
