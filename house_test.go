// SPDX-License-Identifier: Apache-2.0

package isthmus_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/isthmus-mesh/isthmus/"

// arrows is the house's plan: which rooms a room may import. What is not listed is
// forbidden. Before loosening a line to make a build pass, ask whether the code stands in
// the wrong room. A trailing "/*" stands for every folder directly below.
var arrows = map[string][]string{
	"federation": {},
	"config":     {"federation"},

	"registry":              {"federation", "config"},
	"registry/kube":         {"federation", "config", "registry"},
	"registry/vm":           {"federation", "config", "registry"},
	"registry/etcd":         {"federation", "config", "registry"},
	"registry/registrytest": {"federation", "config", "registry"},

	"ca":             {},
	"ca/etcd":        {"ca"},
	"ca/attest":      {"ca"},
	"ca/caserver":    {"api", "ca", "ca/attest"},
	"ca/workloadapi": {"ca"},
	"ca/catest":      {"ca"},

	// api holds wire types; the name table that xds builds is one of them.
	"api":           {},
	"xds":           {"federation", "config", "api"},
	"xds/xdsserver": {"federation", "config", "api", "xds"},
	"xds/xdstest":   {"federation", "xds"},
	"gateways":      {"federation", "config", "api", "xds"},

	// agent is the composition of its leaves; no leaf knows it.
	"agent":   {"api", "ca/workloadapi", "agent/*"},
	"agent/*": {"api", "ca/workloadapi", "agent/*"},
	"console": {"api"},

	"api/apiserver": {"api", "federation", "config", "registry", "registry/*", "ca", "ca/*", "xds", "xds/xdsserver", "agent/onboard", "deploy"},

	// mesh verifies copies of audit logs without asking anybody, hence ca.
	"cmd/mesh":       {"api", "ca", "registry/kube", "agent/inject", "agent/onboard", "deploy"},
	"cmd/mesh-agent": {"agent", "agent/*", "api"},
	"cmd/meshd":      {"*"},

	// Tests of a room may use the throwaway authority, the scripted sources and the like; see testOnly.
	"e2e":    {"*"},
	"e2e/*":  {"*"},
	"deploy": {},
}

// testOnly rooms may be imported by every room's tests.
var testOnly = []string{"ca/catest", "registry/registrytest", "ca", "ca/caserver", "ca/attest", "federation", "config", "api", "registry/etcd", "xds/xdsserver", "xds/xdstest", "e2e/ports"}

// owners names the only rooms that may import a library, and why.
var owners = []struct {
	library string
	rooms   []string
	why     string
}{
	{"k8s.io/client-go", []string{"registry/kube", "cmd/mesh", "e2e", "e2e/*"}, "members are talked to in one place"},
	{"go.etcd.io/etcd", []string{"registry/etcd", "ca/etcd", "cmd/meshd", "e2e", "e2e/*"}, "only meshd talks to etcd"},
	{"github.com/envoyproxy/go-control-plane/pkg", []string{"e2e/bench"}, "its caches rescan every subscription on every answer; tests use it as an oracle, and bench to compare with"},
	{"sigs.k8s.io/controller-runtime", []string{}, "we use client-go directly"},
	{"github.com/spf13/viper", []string{}, "configuration is a documented struct"},
	{"istio.io/istio", []string{}, "we are a peer, not a wrapper"},
}

type file struct {
	path    string // slash-separated, from the root
	room    string // folder
	test    bool
	doc     bool // has a package comment
	imports []string
	text    []byte
}

func TestArrowsPointOneWay(t *testing.T) {
	t.Parallel()
	for _, f := range house(t) {
		if f.room == "." {
			continue
		}
		allowed, planned := plan(f.room)
		if !planned {
			t.Errorf("%s: the room %q is not in the plan (house_test.go, arrows)", f.path, f.room)
			continue
		}
		for _, imp := range f.imports {
			room, ours := strings.CutPrefix(imp, module)
			if !ours || room == f.room || matches(allowed, room) || f.test && slices.Contains(testOnly, room) {
				continue
			}
			t.Errorf("%s: %s may not import %s", f.path, f.room, room)
		}
	}
}

func TestLibrariesHaveOwners(t *testing.T) {
	t.Parallel()
	for _, f := range house(t) {
		for _, imp := range f.imports {
			for _, o := range owners {
				if !strings.HasPrefix(imp, o.library) || f.test || matches(o.rooms, f.room) {
					continue
				}
				t.Errorf("%s: imports %s, which only %v may: %s", f.path, imp, o.rooms, o.why)
			}
		}
	}
}

func TestEveryPackageHasOneComment(t *testing.T) {
	t.Parallel()
	comments := map[string][]string{}
	for _, f := range house(t) {
		if f.test || f.room == "." {
			continue
		}
		if _, seen := comments[f.room]; !seen {
			comments[f.room] = nil
		}
		if f.doc {
			comments[f.room] = append(comments[f.room], f.path)
		}
	}
	for room, in := range comments {
		if len(in) != 1 {
			t.Errorf("%s: want one package comment, found %d %v", room, len(in), in)
		}
	}
}

func TestEveryFileNamesItsLicence(t *testing.T) {
	t.Parallel()
	for _, f := range house(t) {
		head := f.text[:min(len(f.text), 300)]
		if !strings.Contains(string(head), "SPDX-License-Identifier: Apache-2.0") && !strings.Contains(string(head), "Code generated") {
			t.Errorf("%s: the first lines lack the licence (SPDX-License-Identifier: Apache-2.0)", f.path)
		}
	}
}

func TestNamesSayWhatThingsAre(t *testing.T) {
	t.Parallel()
	vague := []string{"Manager", "Helper", "Util", "Utils", "Impl"}
	for _, f := range house(t) {
		if strings.HasSuffix(f.path, ".pb.go") {
			continue
		}
		if depth := strings.Count(f.room, "/"); depth > 1 {
			t.Errorf("%s: folders are at most two deep", f.path)
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), f.path, f.text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s: init functions hide what runs; wire it in cmd", f.path)
			}
			gen, ok := decl.(*ast.GenDecl)
			if !ok || gen.Tok != token.TYPE {
				continue
			}
			for _, spec := range gen.Specs {
				name := spec.(*ast.TypeSpec).Name.Name
				for _, v := range vague {
					if strings.HasSuffix(name, v) {
						t.Errorf("%s: type %s: a stranger cannot tell what a %s is", f.path, name, v)
					}
				}
			}
		}
	}
}

// house reads every Go file of this module; modules of their own are left out.
func house(t *testing.T) []file {
	t.Helper()
	var files []file
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			hidden := strings.HasPrefix(d.Name(), ".") && p != "."
			_, own := os.Stat(filepath.Join(p, "go.mod"))
			if hidden || d.Name() == "testdata" || p != "." && own == nil {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		f, err := read(filepath.ToSlash(p))
		files = append(files, f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Fatalf("found only %d files: the house was not read", len(files))
	}
	return files
}

func read(p string) (file, error) {
	text, err := os.ReadFile(p)
	if err != nil {
		return file{}, err
	}
	parsed, err := parser.ParseFile(token.NewFileSet(), p, text, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		return file{}, err
	}
	f := file{path: p, room: path.Dir(p), test: strings.HasSuffix(p, "_test.go"), doc: parsed.Doc != nil, text: text}
	for _, imp := range parsed.Imports {
		f.imports = append(f.imports, strings.Trim(imp.Path.Value, `"`))
	}
	return f, nil
}

// plan is the line of the table for a room, its own or its parent's "/*".
func plan(room string) ([]string, bool) {
	if allowed, ok := arrows[room]; ok {
		return allowed, true
	}
	allowed, ok := arrows[path.Dir(room)+"/*"]
	return allowed, ok
}

func matches(patterns []string, room string) bool {
	for _, p := range patterns {
		if p == "*" || p == room {
			return true
		}
		if parent, ok := strings.CutSuffix(p, "/*"); ok && path.Dir(room) == parent {
			return true
		}
	}
	return false
}
