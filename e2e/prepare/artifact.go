// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// An artifact is one folder of the cache: its name carries the version of the
// programs in it, and it exists only when all of them were made and checked.
type artifact struct {
	folder   string
	what     string // for progress
	download bool   // needs the network rather than the processors
	programs []program
	// build fills the empty folder dir with the programs.
	build func(ctx context.Context, work *progress, dir string) error
}

// A program is a file of an artifact and how it says its version.
type program struct {
	name    string
	args    []string // what makes it print its version
	version string   // must occur in what it prints
}

// A stamp is what was known about a program when its version was last
// checked. A file that has not changed since need not be run again.
type stamp struct {
	Version string    `json:"version"`
	Size    int64     `json:"size"`
	Time    time.Time `json:"time"`
}

// stampFile lies beside the programs.
const stampFile = ".checked.json"

// prepare makes the artifact below dir unless it is there already.
func (a artifact) prepare(ctx context.Context, work *progress, dir string) (err error) {
	folder := filepath.Join(dir, a.folder)
	if a.unchanged(folder) {
		return nil
	}
	if _, err := os.Stat(folder); err == nil {
		if err := a.check(ctx, folder); err == nil {
			return nil
		}
		work.say("%s: what is in %s is not what it should be; making it again", a.what, folder)
	}
	done := work.phase(a.what)
	defer func() { done(err) }()
	temporary, err := os.MkdirTemp(dir, "."+a.folder+"-")
	if err != nil {
		return fmt.Errorf("make a folder to build in: %w", err)
	}
	defer os.RemoveAll(temporary)
	if err := os.Chmod(temporary, 0o755); err != nil {
		return err
	}
	if err := a.build(ctx, work, temporary); err != nil {
		return fmt.Errorf("%s: %w", a.what, err)
	}
	if err := a.check(ctx, temporary); err != nil {
		return fmt.Errorf("%s: %w", a.what, err)
	}
	return replace(temporary, folder)
}

// check runs every program for its version and leaves the stamps.
func (a artifact) check(ctx context.Context, folder string) error {
	stamps := make(map[string]stamp)
	for _, p := range a.programs {
		path := filepath.Join(folder, p.name)
		if err := p.check(ctx, path); err != nil {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		stamps[p.name] = stamp{Version: p.version, Size: info.Size(), Time: info.ModTime().UTC()}
	}
	text, err := json.MarshalIndent(stamps, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, stampFile), append(text, '\n'), 0o644)
}

// unchanged reports whether every program is the file whose version was
// checked.
func (a artifact) unchanged(folder string) bool {
	text, err := os.ReadFile(filepath.Join(folder, stampFile))
	if err != nil {
		return false
	}
	var stamps map[string]stamp
	if err := json.Unmarshal(text, &stamps); err != nil {
		return false
	}
	for _, p := range a.programs {
		info, err := os.Stat(filepath.Join(folder, p.name))
		if err != nil {
			return false
		}
		if want := (stamp{Version: p.version, Size: info.Size(), Time: info.ModTime().UTC()}); stamps[p.name] != want {
			return false
		}
	}
	return true
}

// check runs the program at path and looks for the version in what it says.
func (p program) check(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	output, err := exec.CommandContext(ctx, path, p.args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w%s", path, strings.Join(p.args, " "), err, said(output))
	}
	if !bytes.Contains(output, []byte(p.version)) {
		return errOtherVersion{path, string(bytes.TrimSpace(output)), p.version}
	}
	return nil
}

// errOtherVersion says that a program works but is not of the version that is wanted.
type errOtherVersion struct{ path, is, want string }

func (e errOtherVersion) Error() string {
	return fmt.Sprintf("program %s: version is %q, want one with %q", e.path, e.is, e.want)
}

// replace puts the finished folder in its place. An old one of the same name
// goes only when the new one is complete.
func replace(from, to string) error {
	old := to + ".old"
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	if err := os.Rename(to, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return os.RemoveAll(old)
}

// command runs a program in dir with additions to the environment and shows
// what it said only when it fails.
func command(ctx context.Context, dir string, env []string, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	output, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, tail(output))
	}
	return nil
}

// said is for the end of an error: nothing where the program said nothing.
func said(output []byte) string {
	if text := tail(output); text != "" {
		return ": " + text
	}
	return ""
}

// tail returns the end of what a program said.
func tail(output []byte) string {
	const most = 4000
	if len(output) > most {
		output = output[len(output)-most:]
	}
	return string(bytes.TrimSpace(output))
}
