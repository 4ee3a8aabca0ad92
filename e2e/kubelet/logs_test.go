// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"bytes"
	"context"
	"io"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// writtenLog has three lines, a minute apart, and an unfinished one.
func writtenLog(t *testing.T) *containerLog {
	t.Helper()
	at := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	log, err := createLog(filepath.Join(t.TempDir(), "0.log"), func() time.Time { return at })
	if err != nil {
		t.Fatal(err)
	}
	out := log.stream("stdout")
	for _, text := range []string{"one\n", "two\n", "thr", "ee\nfour"} {
		if _, err := io.WriteString(out, text); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(text, "\n") {
			at = at.Add(time.Minute)
		}
	}
	out.flush()
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	return log
}

func TestLogs(t *testing.T) {
	t.Parallel()
	log := writtenLog(t)
	for query, want := range map[string]string{
		"":                                 "one\ntwo\nthree\nfour",
		"tailLines=2":                      "three\nfour",
		"tailLines=0":                      "",
		"tailLines=99":                     "one\ntwo\nthree\nfour",
		"sinceTime=2026-05-01T12:01:30Z":   "three\nfour",
		"sinceSeconds=3600":                "",
		"limitBytes=5":                     "one\nt",
		"timestamps=true&tailLines=2":      "2026-05-01T12:02:00Z three\n2026-05-01T12:02:00Z four",
		"follow=true&tailLines=1":          "four",
		"previous=false&sinceSeconds=3600": "",
	} {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		options, err := parseLogOptions(values, time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC))
		if err != nil {
			t.Errorf("%s: %v", query, err)
		}
		var got bytes.Buffer
		if err := log.copyTo(t.Context(), &got, options); err != nil || got.String() != want {
			t.Errorf("%q: got %q, %v, want %q", query, got.String(), err, want)
		}
	}
	for _, query := range []string{"tailLines=x", "sinceTime=yesterday", "follow=maybe"} {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseLogOptions(values, time.Now()); err == nil {
			t.Errorf("%s is accepted", query)
		}
	}
}

func TestFollow(t *testing.T) {
	t.Parallel()
	log, err := createLog(filepath.Join(t.TempDir(), "0.log"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	reader, writer := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- log.copyTo(context.Background(), writer, logOptions{Tail: -1, Follow: true}) }()
	out := log.stream("stderr")
	buffer := make([]byte, 100)
	for _, text := range []string{"one\n", "two\n"} {
		if _, err := io.WriteString(out, text); err != nil {
			t.Fatal(err)
		}
		if n, err := reader.Read(buffer); err != nil || string(buffer[:n]) != text {
			t.Errorf("follower sees %q, %v, want %q", buffer[:n], err, text)
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("follower ends with %v", err)
	}
}

func TestLongLines(t *testing.T) {
	t.Parallel()
	log, err := createLog(filepath.Join(t.TempDir(), "0.log"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("0123456789", 5000) + "\nshort\n"
	if _, err := io.WriteString(log.stream("stdout"), text); err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := log.copyTo(t.Context(), &got, logOptions{Tail: -1}); err != nil || got.String() != text {
		t.Errorf("%d bytes come back, %v, want %d", got.Len(), err, len(text))
	}
}

func FuzzParseLogLine(f *testing.F) {
	f.Add("2026-05-01T12:02:00Z stdout F three")
	f.Add("2026-05-01T12:02:00Z stdout P")
	f.Add("")
	f.Fuzz(func(t *testing.T, line string) {
		parsed, err := parseLogLine(line)
		if err == nil && !strings.HasSuffix(line, strings.TrimSuffix(parsed.text, "\n")) {
			t.Errorf("text %q of line %q", parsed.text, line)
		}
	})
}

func FuzzParseDiskMounts(f *testing.F) {
	f.Add("36 35 98:0 / /home rw,noatime master:1 - ext4 /dev/sda1 rw\n")
	f.Add("36 35 98:0 / /a\\040b rw - xfs /dev/sda1 rw\n36 35 98:0 / / rw - ext4 x rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		dirs, err := parseDiskMounts(strings.NewReader(text))
		for _, dir := range dirs {
			if err == nil && (dir == "/" || strings.HasPrefix(dir, "/proc/")) {
				t.Errorf("%q is a disk", dir)
			}
		}
	})
}
