// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/api"
)

// plainSession writes to buffers and has no terminal.
func plainSession() (s *session, out, talk *bytes.Buffer) {
	out, talk = new(bytes.Buffer), new(bytes.Buffer)
	return &session{
		stdin: strings.NewReader(""), stdout: out, stderr: talk, env: func(string) string { return "" },
		now: time.Now, width: 80, color: "auto", progress: "auto", output: "table", target: "meshd:8443",
	}, out, talk
}

func TestTheProgramLinksNoTypedClient(t *testing.T) {
	t.Parallel()
	list, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for pkg := range strings.FieldsSeq(string(list)) {
		for _, heavy := range []string{
			"k8s.io/client-go/kubernetes", "k8s.io/client-go/informers", "go.etcd.io/etcd", "github.com/envoyproxy/go-control-plane",
			"github.com/isthmus-mesh/isthmus/xds", "github.com/isthmus-mesh/isthmus/ca/etcd", "github.com/isthmus-mesh/isthmus/ca/attest",
			"github.com/isthmus-mesh/isthmus/ca/caserver",
		} {
			if pkg == heavy || strings.HasPrefix(pkg, heavy+"/") {
				t.Errorf("mesh links %s", pkg)
			}
		}
	}
}

func TestTheReferenceIsCurrent(t *testing.T) {
	t.Parallel()
	s, out, _ := plainSession()
	if code := s.run(t.Context(), []string{"docs"}); code != exitOK {
		t.Fatalf("exit code %d", code)
	}
	const path = "../../docs/reference/cli.md"
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != out.String() {
		t.Errorf("%s differs from what the program says; mend it by: go run ./cmd/mesh docs > docs/reference/cli.md", path)
	}
}

func TestEveryVerbHasHelp(t *testing.T) {
	t.Parallel()
	s, _, _ := plainSession()
	for _, c := range s.root().Commands() {
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: short help %q", c.Name(), c.Short)
		}
	}
}

// A wait shows that it is alive: on a terminal in place, elsewhere a line every
// ten seconds, with what it waits for.
func TestStepsShowThatTheyRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, out, talk := plainSession()
		st := s.newSteps().begin("sync", "reading the cluster")
		time.Sleep(heartbeatInterval + time.Second)
		synctest.Wait()
		st.waits("waiting for %s", "endpointslices")
		time.Sleep(heartbeatInterval)
		synctest.Wait()
		st.done("synced")
		if want := "  … reading the cluster  10s\n  … waiting for endpointslices  20s\n"; talk.String() != want {
			t.Errorf("talk\n%s\nwant\n%s", talk, want)
		}
		if want := "  ✓ synced  21s\n"; out.String() != want {
			t.Errorf("out %q, want %q", out, want)
		}
	})
}

func TestStepsOnATerminalLeaveOneLineEach(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, out, talk := plainSession()
		s.outTerminal, s.errTerminal = true, true
		st := s.newSteps().begin("sync", "reading")
		time.Sleep(250 * time.Millisecond)
		synctest.Wait()
		st.warn(api.NoGatewayAddress, "no address")
		if got := talk.String(); strings.Contains(got, "\n") || strings.Count(got, "\r\x1b[K") != 3 {
			t.Errorf("talk %q, want two states drawn in place and one erased", got)
		}
		if want := "  \x1b[33m!\x1b[0m no address  \x1b[2mMESH1019\x1b[0m\n"; out.String() != want {
			t.Errorf("out %q, want %q", out, want)
		}
	})
}

func TestAnInterruptedCommandSaysSo(t *testing.T) {
	t.Parallel()
	s, _, talk := plainSession()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f := s.failureOf(ctx, &failure{exit: exitFailed, what: "join of west stopped", why: "interrupted", try: "resume"})
	f.print(talk, s.style(talk), 0)
	if f.exit != exitInterrupted || !strings.Contains(talk.String(), "try   resume") {
		t.Errorf("exit %d\n%s", f.exit, talk)
	}
	if f := s.failureOf(ctx, context.Canceled); f.exit != exitInterrupted {
		t.Errorf("exit %d", f.exit)
	}
}

func TestErrorsOfMeshdBecomeExitCodes(t *testing.T) {
	t.Parallel()
	s, _, _ := plainSession()
	for _, c := range []struct {
		err  error
		exit int
		code api.Code
	}{
		{status.Error(codes.InvalidArgument, "x"), exitUsage, api.InvalidInput},
		{status.Error(codes.Unauthenticated, "x"), exitDenied, api.NotAnAdministrator},
		{status.Error(codes.DeadlineExceeded, "x"), exitTimeout, api.TimedOut},
		{status.Error(codes.NotFound, "x"), exitFailed, api.UnknownName},
		{status.Error(codes.Canceled, "x"), exitInterrupted, ""},
		{status.Error(codes.Internal, "x"), exitFailed, ""},
		{status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.1:8443: i/o timeout"`), exitUnreachable, api.ServerUnreachable},
		{status.Error(codes.Unavailable, `connection error: desc = "error reading server preface: remote error: tls: bad certificate"`), exitDenied, api.NotAnAdministrator},
		{api.Problem{Status: codes.Unavailable, Code: api.StoreUnreadable, Message: "etcd is away"}, exitFailed, api.StoreUnreadable},
	} {
		var f *failure
		if !errors.As(s.rpcFailure("cannot", c.err), &f) || f.exit != c.exit || f.code != c.code {
			t.Errorf("%v: exit %d code %q, want %d %q", c.err, f.exit, f.code, c.exit, c.code)
		}
	}
}

func TestDurationsAreShort(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 59 * time.Second: "59s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 9*time.Minute + 5*time.Second: "9m5s",
		100 * time.Minute: "100m", 5 * time.Hour: "5h", 47 * time.Hour: "47h", 49 * time.Hour: "2d", 41 * 24 * time.Hour: "41d",
	} {
		if got := short(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int32]string{0: "0", 999: "999", 1904: "1,904", 1234567: "1,234,567"} {
		if got := count(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

// Names come from clusters: none of them may move the cursor of who looks.
func TestTablesShowNoControlCharacters(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	table := table{columns: []column{{head: "A"}, {head: "N", right: true}}, rows: [][]cell{text("x\x1b[2Jy\u009b", "1"), text("", "22")}}
	if err := table.write(&out, style{}, false, true); err != nil {
		t.Fatal(err)
	}
	if want := "A         N\nx?[2Jy?   1\n-        22\n"; out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func FuzzParsePort(f *testing.F) {
	for _, s := range []string{"80", "80:8080", "80:8080/http", "0", "99999", ":", "/", "80:/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePort(s)
		if err == nil && (p.GetNumber() == 0 || p.GetNumber() > 65535 || p.GetTarget() == 0 || p.GetTarget() > 65535) {
			t.Errorf("%q became %v", s, p)
		}
	})
}

func FuzzGatewayAddress(f *testing.F) {
	for _, s := range []string{"gw", "gw:15443", "[::1]:1", "::1", "a b", ":1", "x:0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := gatewayAddress(s)
		if err != nil {
			return
		}
		if again, err := gatewayAddress(a); err != nil || again != a {
			t.Errorf("%q became %q, and that %q (%v)", s, a, again, err)
		}
	})
}

func FuzzWrap(f *testing.F) {
	f.Add("some words to wrap", 10)
	f.Fuzz(func(t *testing.T, s string, width int) {
		if width < 1 || width > 200 {
			return
		}
		if got, want := strings.Fields(wrap(s, width)), strings.Fields(s); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("words changed: %q", wrap(s, width))
		}
	})
}

// What does not fit a terminal is folded under its own beginning, and a code that does not
// fit behind it gets a line; without a terminal nothing is folded, so that grep finds it.
func TestLinesAreFoldedForATerminalOnly(t *testing.T) {
	t.Parallel()
	same := func(s string) string { return s }
	for _, c := range []struct {
		text     string
		width    int
		expected string
	}{
		{"short", 20, "short  MESH1001"},
		{"one two three four", 20, "one two three\n    four  MESH1001"},
		{"one two three", 20, "one two three\n    MESH1001"},
		{"one two three four five six seven", 0, "one two three four five six seven  MESH1001"},
	} {
		if got := behind(fold(c.text, c.width, 4), "MESH1001", c.width, 4, same); got != c.expected {
			t.Errorf("%q in %d columns is\n%s\nwant\n%s", c.text, c.width, got, c.expected)
		}
	}
}

// A table that is too wide for the terminal gives up what matters least, and says so.
func TestATableFitsTheTerminal(t *testing.T) {
	t.Parallel()
	wide := func() *table {
		return &table{
			columns: []column{{head: "NAME"}, {head: "AGE", spare: 1}, {head: "CREDENTIALS", spare: 2}, {head: "UID", wide: true}},
			rows:    [][]cell{text("east", "3d", "auto (19h)", "4f1c")},
		}
	}
	for columns, hidden := range map[int][]string{0: nil, 22: nil, 21: {"CREDENTIALS"}, 8: {"CREDENTIALS", "AGE"}, 2: {"CREDENTIALS", "AGE"}} {
		if got := wide().fit(columns); !slices.Equal(got, hidden) {
			t.Errorf("%d columns leave out %q, want %q", columns, got, hidden)
		}
	}
}

// No line is longer than the terminal, with colour or without, but those to be copied.
func TestWhatOnboardingWarnsOfFits(t *testing.T) {
	t.Parallel()
	for _, color := range []string{"always", "never"} {
		s, out, _ := plainSession()
		s.outTerminal, s.width, s.color = true, 80, color
		s.printOnboarding(&api.OnboardVMResponse{
			Vm: &api.VM{Metadata: &api.Metadata{Name: "web-1"}, Spec: &api.VMSpec{}, Status: &api.VMStatus{}},
			Findings: []*api.Finding{{Severity: "warning", Code: string(api.NetworkNoGateway),
				Message: "network n1 has no gateway: the machine can call out, but calls to it from other networks have no way in"}},
		}, onboardFlags{dryRun: true})
		plain := regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString(out.String(), "")
		for line := range strings.Lines(plain) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 {
				t.Errorf("%s: %d columns: %s", color, n, line)
			}
		}
		if !strings.Contains(plain, "calls to it from\n  other networks have no way in  MESH8001\n") {
			t.Errorf("%s: broken elsewhere than between words:\n%s", color, plain)
		}
	}
}

func TestActivityFits(t *testing.T) {
	t.Parallel()
	s, out, _ := plainSession()
	s.outTerminal, s.color = true, "never"
	s.printActivity(&api.Activity{Verb: "issued", Object: "pod shop/payments-64c6fb6bb7-zvgcm in west", Actor: "spiffe://cluster.local/ns/shop/sa/payments", Result: "ok", Message: "certificate 0123456789abcdef, by kubernetes-token"})
	for line := range strings.Lines(out.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	if !strings.Contains(out.String(), "issued  pod shop/payments-64c6fb6bb7-zvgcm in west\n      spiffe://") {
		t.Errorf("%s", out)
	}
}
