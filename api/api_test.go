// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/api"
)

func TestEveryCodeIsExplained(t *testing.T) {
	t.Parallel()
	all := api.Explanations()
	if !slices.IsSortedFunc(all, func(a, b api.Explanation) int { return strings.Compare(string(a.Code), string(b.Code)) }) {
		t.Error("the explanations are not in order")
	}
	for _, e := range all {
		if e.Title == "" || e.Meaning == "" || e.Remedy == "" || strings.HasSuffix(e.Title, ".") {
			t.Errorf("%s: %+v", e.Code, e)
		}
	}
	if _, ok := api.Explain("MESH0000"); ok {
		t.Error("a code that does not exist is explained")
	}
}

// Codes are spelled out in many rooms, which cannot import this one.
func TestEveryCodeInTheHouseIsExplained(t *testing.T) {
	t.Parallel()
	code := regexp.MustCompile(`"(MESH[1-8]\d{3})"`)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != ".." {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // somebody else's file of the moment
		}
		for _, m := range code.FindAllStringSubmatch(string(text), -1) {
			if _, ok := api.Explain(api.Code(m[1])); !ok {
				t.Errorf("%s: %s has no explanation", path, m[1])
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAProblemTravels(t *testing.T) {
	t.Parallel()
	want := api.Problem{Status: codes.AlreadyExists, Code: api.DuplicateKey, Message: "m", Try: "t"}
	if got := api.ProblemOf(status.ErrorProto(want.GRPCStatus().Proto())); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := api.ProblemOf(nil); got.Status != codes.OK {
		t.Errorf("no error is %+v", got)
	}
	if got := api.ProblemOf(errors.New("x")); got.Status != codes.Unknown || got.Code != "" {
		t.Errorf("an error from elsewhere is %+v", got)
	}
}

func TestAdminConfNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	const head = "apiVersion: isthmus-mesh.io/v1\nkind: AdminConfig\n"
	for says, text := range map[string]string{
		"apiVersion":      "kind: AdminConfig\n",
		"unknown field":   head + "passwort: x\n",
		"want https":      head + "server: http://x\n",
		"trustDomain":     head + "server: https://x:1\n",
		"certificate and": head + "server: https://x:1\ntrustDomain: t\n",
		"not a usable":    "\x00",
	} {
		if _, err := api.ParseAdminConfig([]byte(text)); !errors.Is(err, api.ErrAdminConfig) || !strings.Contains(err.Error(), says) {
			t.Errorf("want %q, got %v", says, err)
		}
	}
	if _, err := api.LoadAdminConfig(filepath.Join(t.TempDir(), "admin.conf")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func FuzzAdminConfig(f *testing.F) {
	f.Add([]byte("apiVersion: isthmus-mesh.io/v1\nkind: AdminConfig\nserver: https://x:1\n"))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := api.ParseAdminConfig(data)
		if (c == nil) == (err == nil) {
			t.Errorf("%q: %v, %v", data, c, err)
		}
	})
}
