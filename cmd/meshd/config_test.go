// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// configured is what meshd would run with, given a file and flags.
func configured(t *testing.T, file string, args ...string) (Configuration, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "meshd.yaml")
	text := "apiVersion: " + configVersion + "\nkind: " + configKind + "\ndataDir: /x\nadvertise: [mesh.example:15012]\n" + file
	noErr(t, os.WriteFile(path, []byte(text), 0o600))
	f := &flagValues{}
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.add(fs)
	noErr(t, fs.Parse(append([]string{"--config", path}, args...)))
	return f.configuration(fs)
}

func TestLifetimesOfCertificates(t *testing.T) {
	t.Parallel()
	c, err := configured(t, "certificateLifetimes: {payments: 1h, batch: 168h}\n", "--certificate-lifetime-of", "payments=30m,shop=5m", "--certificate-lifetime-of=web=2h")
	noErr(t, err)
	if got, want := c.CertificateLifetimes.String(), "batch=168h0m0s,payments=30m0s,shop=5m0s,web=2h0m0s"; got != want {
		t.Errorf("lifetimes %s, want %s", got, want)
	}
	if c.lifetimes()["shop"] != 5*time.Minute {
		t.Errorf("the authority is told %v", c.lifetimes())
	}
	for _, bad := range []string{"payments=4m", "payments=169h", "payments=0s"} {
		if _, err := configured(t, "", "--certificate-lifetime-of", bad); err == nil || !strings.Contains(err.Error(), "payments") {
			t.Errorf("%s: %v; want the namespace named", bad, err)
		}
	}
	if _, err := configured(t, "certificateLifetimes: {payments: soon}\n"); err == nil {
		t.Error("a lifetime that is none is accepted")
	}
}
