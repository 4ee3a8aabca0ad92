// SPDX-License-Identifier: Apache-2.0

package bed_test

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

func TestVMIsAMachineOfItsOwn(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	w := newWorld(t)
	n1 := must(w.Network("n1", bed.NetworkConfig{}))(t)
	host := must(w.Host("host"))(t)
	serve(t, host, "meshd")
	start := time.Now()
	vm := must(w.VM("web-1", bed.VMConfig{Network: n1, Files: map[string]string{"/usr/local/bin/tool": "/bin/echo"}}))(t)
	t.Logf("booted in %s", time.Since(start).Round(time.Millisecond))
	run := func(script string) string { t.Helper(); return strings.TrimSpace(string(must(vm.Run(ctx, script))(t))) }

	for script, want := range map[string]string{
		"hostname":                        "web-1",
		"cat /etc/hostname":               "web-1",
		"echo $HOME $USER; pwd":           "/root root\n/root",
		"/usr/local/bin/tool hello":       "hello",
		"readlink /proc/self/ns/net":      must(os.Readlink("/proc/self/ns/net"))(t)[:5] + run("readlink /proc/1/ns/net")[5:],
		"test -d /run/systemd || echo no": "no",
		"test -e /run/isthmus || echo no": "no",
		"ls -A /root /tmp":                "/root:\n\n/tmp:",
	} {
		if got := run(script); got != want {
			t.Errorf("%s: got %q, want %q", script, got, want)
		}
	}

	// What it writes is its own, wherever that is.
	run("for d in /etc /var/lib /usr/local/bin /opt /root; do echo own >$d/isthmus-bed-test; done; echo gone >/tmp/a; echo gone >/run/a")
	for _, dir := range []string{"/etc", "/var/lib", "/usr/local/bin", "/opt", "/root"} {
		if _, err := os.Stat(dir + "/isthmus-bed-test"); err == nil {
			t.Errorf("%s of the machine was written to", dir)
		}
	}
	for _, path := range []string{"/usr/bin/isthmus-bed-test", "/isthmus-bed-test", "/usr/local/bin/tool"} {
		if _, err := vm.Run(ctx, "echo x >"+path); err == nil {
			t.Errorf("%s of the machine can be written to", path)
		}
	}
	// Its way out is its network's router.
	if body, err := reach(t, vm.Namespace, netip.AddrPortFrom(host.Addr(), 8080).String()); err != nil || body != "meshd" {
		t.Errorf("calling out: got %q, %v", body, err)
	}
}

func TestVMReboots(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	w := newWorld(t)
	vm := must(w.VM("web-1", bed.VMConfig{Network: must(w.Network("n1", bed.NetworkConfig{}))(t)}))(t)
	must(vm.Run(ctx, `
		setsid sleep 1000 </dev/null >/dev/null 2>&1 &
		printf '#!/bin/sh\necho "$1 by rc2.d" >>/var/log/booted\nsleep 2000 &\n' >/etc/init.d/agent
		chmod +x /etc/init.d/agent
		ln -s ../init.d/agent /etc/rc2.d/S99agent
		echo 192.0.2.1 elsewhere >>/etc/hosts`))(t)
	eventually(t, "the daemon is there", func() error {
		return unless(slices.Contains(vm.Processes(), "sleep 1000"), fmt.Sprint(vm.Processes()))
	})
	before := vm.Processes()
	start := time.Now()
	if err := vm.Reboot(); err != nil {
		t.Fatal(err)
	}
	t.Logf("rebooted in %s", time.Since(start).Round(time.Millisecond))
	eventually(t, "the start script's process is there", func() error {
		return unless(slices.Contains(vm.Processes(), "sleep 2000"), fmt.Sprint(vm.Processes()))
	})
	if after := vm.Processes(); slices.Contains(after, "sleep 1000") {
		t.Errorf("before the reboot: %q, after: %q; want the start script's process alone", before, after)
	}
	if got := string(must(vm.ReadFile(ctx, "/var/log/booted"))(t)); got != "start by rc2.d\n" {
		t.Errorf("start scripts wrote %q", got)
	}
	if got := string(must(vm.ReadFile(ctx, "/etc/hosts"))(t)); !strings.Contains(got, "elsewhere") {
		t.Errorf("/etc/hosts was made anew: %q", got)
	}
}
