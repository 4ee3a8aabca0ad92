// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/ca"
)

func openAudit(t testing.TB, path string) *ca.AuditLog {
	t.Helper()
	l, err := ca.OpenAudit(path, "meshd-0", nil)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A36: whoever edits, removes, inserts or exchanges a line is found out.
func TestAttackA36EditedAuditLog(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := openAudit(t, path)
	for _, name := range []string{"a", "b", "c"} {
		if err := l.Append(ca.AuditEntry{Event: ca.AuditIssued, Instance: name, Reason: `quotes " and , "hash":" inside`}); err != nil {
			t.Fatal(err)
		}
	}
	head := l.Head()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(strings.TrimSuffix(string(text), "\n"), "\n")
	lines[3] += "\n"
	got, err := ca.VerifyAudit(bytes.NewReader(text))
	if err != nil || got != head || head.Sequence != 4 {
		t.Fatalf("VerifyAudit = %+v, %v; want %+v", got, err, head)
	}
	otherPath := filepath.Join(t.TempDir(), "audit.jsonl")
	other := openAudit(t, otherPath)
	defer other.Close()
	for range 3 {
		if err := other.Append(ca.AuditEntry{Event: ca.AuditIssued}); err != nil {
			t.Fatal(err)
		}
	}
	foreign, err := os.ReadFile(otherPath)
	if err != nil {
		t.Fatal(err)
	}
	for name, forged := range map[string]string{
		"spliced":     lines[0] + lines[1] + strings.SplitAfter(string(foreign), "\n")[2] + lines[3],
		"edited":      strings.Replace(string(text), `"instance":"b"`, `"instance":"x"`, 1),
		"removed":     lines[0] + lines[1] + lines[3],
		"beheaded":    lines[1] + lines[2] + lines[3],
		"exchanged":   lines[0] + lines[2] + lines[1] + lines[3],
		"repeated":    lines[0] + lines[1] + lines[1] + lines[2] + lines[3],
		"half a line": string(text[:len(text)-10]),
		"no JSON":     lines[0] + "hello\n",
	} {
		if _, err := ca.VerifyAudit(strings.NewReader(forged)); err == nil || !strings.Contains(err.Error(), "audit line ") {
			t.Errorf("%s: VerifyAudit = %v, want the line named", name, err)
		}
	}
	if cut, err := ca.VerifyAudit(strings.NewReader(lines[0] + lines[1])); err != nil || cut == head {
		t.Errorf("cut short: %+v, %v; want another head", cut, err)
	}
}

// A crash in the middle of a line leaves a log that goes on.
func TestAuditLogResumes(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := openAudit(t, path)
	if _, err := ca.OpenAudit(path, "meshd-0", nil); err == nil {
		t.Error("two writers")
	}
	if err := l.Append(ca.AuditEntry{Event: ca.AuditIssued}); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(ca.AuditEntry{Event: ca.AuditIssued}); !errors.Is(err, ca.ErrAudit) {
		t.Errorf("Append to a closed log = %v, want ErrAudit", err)
	}
	file, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteString(`{"seq":3,"time":"20`); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	again := openAudit(t, path)
	defer again.Close()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var last ca.AuditEntry
	head, err := ca.ReadAudit(bytes.NewReader(text), func(e ca.AuditEntry) error { last = e; return nil })
	if err != nil || head.Sequence != 3 || last.Event != ca.AuditBegan || !strings.Contains(last.Reason, "19 bytes cut off") {
		t.Errorf("after the crash: %+v, last line %+v, %v", head, last, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestAuditTextIsBounded(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := openAudit(t, path)
	defer l.Close()
	long := strings.Repeat("\x00", 100_000)
	if err := l.Append(ca.AuditEntry{Event: ca.AuditRefused, Reason: long, Instance: long, Source: ca.Source(long), Peer: long}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.VerifyAudit(bytes.NewReader(text)); err != nil || len(text) > 64<<10 {
		t.Errorf("%d bytes, %v", len(text), err)
	}
}
