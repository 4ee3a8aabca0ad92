// SPDX-License-Identifier: Apache-2.0

package onboard_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/agent/onboard"
)

// script is tested here and not beside its file because this package makes the
// line that runs it.
const script = "../../deploy/vm/onboard.sh"

// fakeAgent stands for the program that the script installs: what the real one
// does has tests of its own. It leaves a certificate if it finds a token.
const fakeAgent = `#!/bin/sh
case $1 in
proxy)
	echo "$*" >>/var/log/calls
	[ "$(cat "$MESH_TOKEN_FILE" 2>/dev/null)" = "isthmus-vm.id.secret" ] && echo key >"$MESH_STATE_DIR/identity.pem"
	trap 'exit 0' TERM
	while :; do sleep 0.1; done
	;;
wait) n=0; while [ $n -lt 50 ]; do [ -f /var/lib/isthmus/identity.pem ] && exit 0; n=$((n + 1)); sleep 0.1; done; echo "not ready in time: certificate: token refused" >&2; exit 1 ;;
redirect) echo "$*" >>/var/log/calls ;;
certificate)
	[ "$2" = --help ] && exit 0
	if grep -q ended "$3/identity.pem"; then echo "the certificate of spiffe://x ended at 2026-01-02T03:04:05Z" >&2; exit 1; fi
	echo "spiffe://x until 2026-01-03T03:04:05Z"
	;;
esac
`

// meshd serves what a script fetches, with a certificate of a private root.
type meshd struct {
	*httptest.Server
	root []byte

	mu    sync.Mutex
	asked []string
}

func newMeshd(t *testing.T) *meshd {
	t.Helper()
	m := &meshd{}
	data, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	unit, err := os.ReadFile("../../deploy/vm/mesh-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	m.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		m.asked = append(m.asked, r.URL.String())
		m.mu.Unlock()
		file := func(text []byte) {
			http.ServeContent(w, r, "", time.Unix(1_700_000_000, 0), bytes.NewReader(text))
		}
		switch r.URL.Path {
		case "/onboard/onboard.sh":
			file(data)
		case "/onboard/root-cert.pem":
			file(m.root)
		case "/onboard/mesh-agent":
			file([]byte(fakeAgent))
		case "/onboard/envoy":
			file([]byte("#!/bin/sh\n"))
		case "/onboard/mesh-agent.service":
			file(unit)
		case "/onboard/web-1/config":
			json.NewEncoder(w).Encode(onboard.Config{V: onboard.Version, Name: "web-1", Server: m.Listener.Addr().String()})
		default:
			http.NotFound(w, r)
		}
	}))
	var certificate tls.Certificate
	m.root, certificate = authority(t)
	m.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	m.StartTLS()
	t.Cleanup(m.Close)
	return m
}

// authority makes a root and a certificate for 127.0.0.1.
func authority(t *testing.T) ([]byte, tls.Certificate) {
	t.Helper()
	make1 := func(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if signer == nil {
			signer = key
		}
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		return der, key
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	rootDER, rootKey := make1(root, root, nil)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	leafDER, leafKey := make1(leaf, root, rootKey)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rootDER}),
		tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: leafKey}
}

// line is what the machine's owner pastes.
func (m *meshd) line(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	line, err := onboard.Line(onboard.LineOptions{Address: m.Listener.Addr().String(), Name: "web-1", RootPEM: m.root, Script: data})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(line, "\n") {
		t.Errorf("the line has several: %q", line)
	}
	for _, forbidden := range []string{" -k", "--insecure", "isthmus-vm."} {
		if strings.Contains(line, forbidden) {
			t.Errorf("the line contains %q", forbidden)
		}
	}
	return line
}

// machine is a root file system and process table for one test: what the
// script writes goes to folders of the test, and dies with it.
type machine struct {
	shell string // what "sh" is there
	dir   string
}

func newMachine(t *testing.T, shell string) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mount namespaces")
	}
	for _, tool := range []string{"unshare", "curl", "nft", strings.Fields(shell)[0]} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	m := &machine{shell: shell, dir: t.TempDir()}
	if out, err := m.run(t, "true", ""); err != nil {
		t.Skipf("no private mounts here: %v: %s", err, out)
	}
	return m
}

// run runs a command line on the machine. /run is empty, so there is no
// systemd; changes to /etc, /usr/local, /var stay until the test ends.
func (m *machine) run(t *testing.T, line, stdin string) (string, error) {
	t.Helper()
	var setup strings.Builder
	for _, folder := range []string{"etc", "usr/local", "var"} {
		upper := filepath.Join(m.dir, folder)
		fmt.Fprintf(&setup, "mkdir -p %s/upper %s/work\nmount -t overlay overlay -o lowerdir=/%s,upperdir=%s/upper,workdir=%s/work /%s\n", upper, upper, folder, upper, upper, folder)
	}
	bin := filepath.Join(m.dir, "bin")
	home := filepath.Join(m.dir, "home")
	fmt.Fprintf(&setup, "mkdir -p %s %s\n", bin, home)
	fmt.Fprintf(&setup, "printf '#!/bin/sh\\nexec \"$@\"\\n' >%s/sudo\nprintf '#!/bin/sh\\nexec %s \"$@\"\\n' >%s/sh\nchmod 755 %s/*\n", bin, m.shell, bin, bin)
	fmt.Fprintf(&setup, "mount -t tmpfs tmpfs /run\nmkdir -p /var/log /var/lib\nexport PATH=%s:$PATH\ncd %s\n", bin, home)
	command := exec.Command("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-e", "-c", setup.String()+"\n"+line)
	command.Stdin = strings.NewReader(stdin)
	out, err := command.CombinedOutput()
	t.Logf("%s\n%s", line, out)
	return string(out), err
}

// path is where a file of the machine is seen from outside.
func (m *machine) path(file string) string {
	for _, folder := range []string{"etc", "usr/local", "var"} {
		if rest, ok := strings.CutPrefix(file, "/"+folder); ok {
			return filepath.Join(m.dir, folder, "upper", rest)
		}
	}
	return file
}

func (m *machine) exists(file string) bool {
	info, err := os.Lstat(m.path(file))
	return err == nil && info.Mode()&os.ModeCharDevice == 0 // a device is how an overlay says "deleted"
}

const token = "isthmus-vm.id.secret\n"

func TestTheLineJoinsAMachine(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"dash", "busybox ash"} {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			d := newMeshd(t)
			m := newMachine(t, shell)
			if err := os.MkdirAll(m.path("/usr/local/bin"), 0o755); err != nil {
				t.Fatal(err)
			}
			// Something of the owner's is in the way, and must be back in the end.
			if err := os.WriteFile(m.path("/usr/local/bin/envoy"), []byte("the owner's"), 0o700); err != nil {
				t.Fatal(err)
			}
			line := d.line(t) + " --envoy /bin/true"
			out, err := m.run(t, line, token)
			if err != nil || !strings.Contains(out, "joined: web-1 is ready") {
				t.Fatalf("%v", err)
			}
			for file, mode := range map[string]os.FileMode{
				"/etc/isthmus/agent.json": 0o600, "/etc/isthmus/agent.env": 0o600, "/var/lib/isthmus": 0o700 | os.ModeDir,
				"/usr/local/bin/mesh-agent": 0o755, "/usr/local/sbin/mesh-agent-service": 0o755,
			} {
				info, err := os.Stat(m.path(file))
				if err != nil || info.Mode() != mode {
					t.Errorf("%s: %v, %v; want %v", file, info, err, mode)
				}
			}
			if m.exists("/etc/isthmus/token") {
				t.Error("the spent token was left behind")
			}

			// A reboot, and the line once more: no token is asked for.
			out, err = m.run(t, "mesh-agent-service start\n"+line+"\nmesh-agent-service stop", "")
			if err != nil || !strings.HasSuffix(strings.TrimSpace(out), "unchanged") {
				t.Errorf("second run: %v", err)
			}

			out, err = m.run(t, "sh mesh-onboard.sh --uninstall\nsh mesh-onboard.sh --uninstall", "")
			if err != nil || !strings.Contains(out, "uninstalled") || !strings.Contains(out, "nothing to uninstall") {
				t.Errorf("uninstall: %v", err)
			}
			for _, gone := range []string{"/etc/isthmus", "/var/lib/isthmus", "/usr/local/bin/mesh-agent", "/usr/local/sbin/mesh-agent-service"} {
				if m.exists(gone) {
					t.Errorf("%s was left behind", gone)
				}
			}
			if data, _ := os.ReadFile(m.path("/usr/local/bin/envoy")); string(data) != "the owner's" {
				t.Errorf("the owner's file is now %q", data)
			}
		})
	}
}

func TestWhatWasThereIsRestored(t *testing.T) {
	t.Parallel()
	d := newMeshd(t)
	m := newMachine(t, "dash")
	if err := os.MkdirAll(m.path("/usr/local/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.path("/usr/local/bin/mesh-agent"), []byte("an older one"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := m.run(t, d.line(t), token); err != nil {
		t.Fatal(err)
	}
	if _, err := m.run(t, "sh mesh-onboard.sh --uninstall", ""); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(m.path("/usr/local/bin/mesh-agent"))
	if err != nil || string(data) != "an older one" {
		t.Errorf("%q, %v", data, err)
	}
}

func TestADryRunChangesNothing(t *testing.T) {
	t.Parallel()
	d := newMeshd(t)
	m := newMachine(t, "dash")
	out, err := m.run(t, d.line(t)+" --dry-run", "")
	if err != nil || !strings.Contains(out, "would install /usr/local/bin/mesh-agent") || !strings.Contains(out, "nothing was changed") {
		t.Errorf("%v", err)
	}
	for _, file := range []string{"/etc/isthmus", "/var/lib/isthmus", "/usr/local/bin/mesh-agent"} {
		if m.exists(file) {
			t.Errorf("%s was made", file)
		}
	}
}

func TestACheckTellsWhatIsMissing(t *testing.T) {
	t.Parallel()
	d := newMeshd(t)
	m := newMachine(t, "dash")
	out, err := m.run(t, d.line(t)+" --check", "")
	if err != nil || !strings.Contains(out, "this machine can join") || !strings.Contains(out, "clock:") {
		t.Errorf("%v", err)
	}
	nobody := strings.Replace(d.line(t), "--name web-1", "--name web-2", 1)
	out, err = m.run(t, nobody+" --check", "")
	if err == nil || !strings.Contains(out, "/onboard/web-2/config") || !strings.Contains(out, "404") {
		t.Errorf("a name that is not registered: %v", err)
	}
}

// A machine that was away until its certificate ended is told so, with the command, and
// the same line brings it back.
func TestAMachineThatWasAwayForTooLong(t *testing.T) {
	t.Parallel()
	d := newMeshd(t)
	m := newMachine(t, "dash")
	if _, err := m.run(t, d.line(t), token); err != nil {
		t.Fatal(err)
	}
	out, err := m.run(t, "mesh-agent-service start\n"+d.line(t)+" --check; mesh-agent-service stop", "")
	if !strings.Contains(out, "certificate: spiffe://x until 2026-01-03T03:04:05Z") {
		t.Errorf("while it is valid: %v", err)
	}
	const ended = "echo ended >/var/lib/isthmus/identity.pem\n"
	out, err = m.run(t, ended+d.line(t)+" --check", "")
	if err == nil || !strings.Contains(out, "FAIL  certificate: that of spiffe://x ended at 2026-01-02T03:04:05Z. It needs a new token: run 'mesh vm onboard web-1'") {
		t.Errorf("after it ended: %v", err)
	}
	if _, err = m.run(t, d.line(t), ""); err == nil {
		t.Error("it came back without a token")
	}
	out, err = m.run(t, d.line(t), token)
	if err != nil || !strings.Contains(out, "a new token is needed (mesh vm onboard web-1)") || !strings.Contains(out, "joined: web-1 is ready") {
		t.Errorf("with a new token: %v", err)
	}
}

func TestWhoIsNotBelieved(t *testing.T) {
	t.Parallel()
	d := newMeshd(t)
	stranger, _ := authority(t)
	fingerprint, err := onboard.Fingerprint(d.root)
	if err != nil {
		t.Fatal(err)
	}
	other, err := onboard.Fingerprint(stranger)
	if err != nil {
		t.Fatal(err)
	}
	server := d.Listener.Addr().String()
	for name, c := range map[string]struct{ line, want string }{
		"a script that was changed": {strings.Replace(d.line(t), `echo "`, `echo "0000`, 1), "sha256sum"},
		"a server with another root than the line's": {
			(&meshd{Server: d.Server, root: stranger}).line(t), "curl",
		},
		"a root whose fingerprint is another": {
			fmt.Sprintf("cp %s mesh-onboard.sh; sh mesh-onboard.sh --server %s --name web-1 --ca-sha256 %s", absolute(t, script), server, other),
			"no certificate in",
		},
		"a token that is none": {d.line(t), "not a join token"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, "dash")
			out, err := m.run(t, c.line, "hello\n")
			if err == nil || !strings.Contains(out, c.want) {
				t.Errorf("%v, want it to say %q", err, c.want)
			}
			if m.exists("/usr/local/bin/mesh-agent") {
				t.Error("installed all the same")
			}
		})
	}
	t.Run("a root fetched and compared is believed", func(t *testing.T) {
		t.Parallel()
		m := newMachine(t, "dash")
		_, err := m.run(t, fmt.Sprintf("sh %s --server %s --name web-1 --ca-sha256 %s --check", absolute(t, script), server, fingerprint), "")
		if err != nil {
			t.Error(err)
		}
	})
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// A download that was cut anywhere does nothing: either it is no program, or it
// only defines functions.
func TestACutScriptDoesNothing(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("dash"); err != nil {
		t.Skip("needs dash")
	}
	lines := slices.Collect(strings.Lines(string(data)))
	dir := t.TempDir()
	for cut := 0; cut < len(lines)-1; cut += 7 {
		path := filepath.Join(dir, "cut.sh")
		if err := os.WriteFile(path, []byte(strings.Join(lines[:cut], "")), 0o600); err != nil {
			t.Fatal(err)
		}
		command := exec.Command("dash", path, "--help")
		if out, _ := command.Output(); len(out) != 0 {
			t.Errorf("cut at line %d it says %q", cut, out)
		}
	}
}

func TestTheScriptIsClean(t *testing.T) {
	t.Parallel()
	for _, c := range [][]string{{"shellcheck", "-s", "sh", script}, {"systemd-analyze", "verify", "--recursive-errors=no"}} {
		t.Run(c[0], func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath(c[0]); err != nil {
				t.Skipf("needs %s", c[0])
			}
			if c[0] == "systemd-analyze" {
				c = append(c, verifiable(t))
			}
			if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%v: %v\n%s", c, err, out)
			}
		})
	}
}

// verifiable is the unit with a program that exists here: the check looks.
func verifiable(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("../../deploy/vm/mesh-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "mesh-agent.service")
	text := strings.ReplaceAll(string(data), "/usr/local/bin/mesh-agent", "/bin/true")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}
