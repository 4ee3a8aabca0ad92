// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// shortDir is a directory whose name leaves room for a socket's.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "b")
	noErr(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func noErr(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantErr checks that an error is the right one, and that its text names what it is about.
func wantErr(t testing.TB, err, want error, names ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
	for _, name := range names {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("error %q does not name %q", err, name)
		}
	}
}

// fillStore stores some of everything, 3,000 keys, and returns what a reader sees.
func fillStore(t *testing.T, db *etcd.Database) *federation.Snapshot {
	t.Helper()
	ctx := t.Context()
	store := newStore(t, etcd.StoreConfig{Client: db.Client(), Sole: true})
	member := registrytest.Member(t, "uid-east", "east")
	_, err := store.Join(ctx, member, registrytest.Token("of east"), false)
	noErr(t, err)
	session, err := store.Begin(ctx, member.Source())
	noErr(t, err)
	var records []*federation.Record
	for i := range 1500 {
		records = append(records, registrytest.Record(member.Source(), "shop", fmt.Sprintf("s%d", i), 3))
	}
	_, err = session.Apply(ctx, &registry.Level{Records: registrytest.Records(records...)})
	noErr(t, err)
	noErr(t, store.PutAddresses(ctx, []federation.VirtualAddress{{
		Host: "payments.shop.svc.cluster.local", V4: netip.MustParseAddr("240.240.0.7"), V6: netip.MustParseAddr("2001:2::7"),
	}}))
	vm := &registry.VM{Network: "n3", Name: "web-1", Service: federation.ServiceName{Namespace: "legacy", Name: "web"}, ServiceAccount: "web"}
	_, err = store.PutVM(ctx, vm)
	noErr(t, err)
	_, err = store.ReportVM(ctx, vm.Key(), registry.VMHealth{Healthy: true})
	noErr(t, err)
	lease, err := db.Client().Grant(ctx, 600)
	noErr(t, err)
	_, err = db.Client().Put(ctx, "/isthmus/ca/tokens/t1", "{}", clientv3.WithLease(lease.ID))
	noErr(t, err)
	return registrytest.Eventually(t, store, "all is stored", func(s *federation.Snapshot) bool {
		return len(s.Records) == 1500 && len(s.Addresses) == 1
	})
}

// backUp fills an etcd and backs it up; it gives the file and what a reader saw.
func backUp(t *testing.T) (string, *federation.Snapshot) {
	t.Helper()
	db := openDatabase(t, shortDir(t))
	want := fillStore(t, db)
	path := filepath.Join(t.TempDir(), "meshd.tar")
	_, err := etcd.Backup(t.Context(), etcd.BackupConfig{Client: db.Client(), Path: path, About: etcd.Manifest{TrustDomain: "cluster.local", SealingKey: "0a0b"}})
	noErr(t, err)
	return path, want
}

// sameState compares what is restored with what was there.
func sameState(t *testing.T, client *clientv3.Client, prefix string, want *federation.Snapshot) {
	t.Helper()
	store := newStore(t, etcd.StoreConfig{Client: client, Prefix: prefix})
	got, _ := store.Snapshot()
	if !reflect.DeepEqual(got.Records, want.Records) {
		t.Errorf("records differ: %d, want %d", len(got.Records), len(want.Records))
	}
	if !reflect.DeepEqual(got.Addresses, want.Addresses) {
		t.Errorf("addresses are %v, want %v", got.Addresses, want.Addresses)
	}
	credentials, err := store.Credentials(t.Context(), "uid-east")
	if err != nil || credentials.Reader.Token != "of east" {
		t.Errorf("credentials of east: %v, %v", credentials, err)
	}
	holders := store.Holders()
	delete(holders, "meshd:maintenance") // this very store may have begun to look after etcd
	if len(holders) > 0 {
		t.Errorf("sessions of dead processes came back: %v", holders)
	}
	vm := store.VMs()[registry.VMName{Network: "n3", Name: "web-1"}]
	if vm == nil || vm.Present || vm.Health == nil {
		t.Errorf("machine n3/web-1 is %+v, want it registered, and not present", vm)
	}
}

func TestRestoreEmbedded(t *testing.T) {
	t.Parallel()
	path, want := backUp(t)
	info, err := os.Stat(path)
	noErr(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the backup has mode %v", info.Mode())
	}
	dir := shortDir(t)
	noErr(t, os.Mkdir(filepath.Join(dir, ".restore-dead"), 0o700)) // of a restore that was killed
	noErr(t, os.WriteFile(filepath.Join(dir, "sealing.key"), nil, 0o600))
	restored, err := etcd.Restore(t.Context(), etcd.RestoreConfig{
		Path: path, Database: etcd.DatabaseConfig{DataDir: dir, Unsynced: true}, Keep: []string{"sealing.key"},
	})
	noErr(t, err)
	if restored.Sessions != 1 || restored.Presences != 1 || restored.Tokens != 1 || restored.Others != 0 {
		t.Errorf("left out: %+v, want one session, presence and token each", restored)
	}
	if restored.Keys != restored.Manifest.Keys-3 || restored.Manifest.SealingKey != "0a0b" {
		t.Errorf("restored %d keys of %+v", restored.Keys, restored.Manifest)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".restore-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	sameState(t, openDatabase(t, dir).Client(), "", want)
}

func TestRestoreExternal(t *testing.T) {
	t.Parallel()
	path, want := backUp(t)
	dir := shortDir(t)
	db := openDatabase(t, dir)
	config := etcd.RestoreConfig{
		Path: path, Prefix: "/other/", Database: etcd.DatabaseConfig{Endpoints: []string{"unix://" + filepath.Join(dir, etcd.SocketName)}},
	}
	t.Run("an interrupted restore is begun anew", func(t *testing.T) {
		for _, k := range []string{"/other/restoring", "/other/records/half"} {
			_, err := db.Client().Put(t.Context(), k, "{}")
			noErr(t, err)
		}
		_, err := etcd.Restore(t.Context(), config)
		noErr(t, err)
		sameState(t, db.Client(), "/other/", want)
		got, err := db.Client().Get(t.Context(), "/other/records/half")
		if err != nil || len(got.Kvs) > 0 {
			t.Errorf("half a record is still there: %v, %v", got, err)
		}
	})
	t.Run("a prefix in use is refused", func(t *testing.T) {
		_, err := etcd.Restore(t.Context(), config)
		wantErr(t, err, etcd.ErrNotEmpty, "/other/")
		sameState(t, db.Client(), "/other/", want)
	})
	t.Run("a restore that cannot be finished leaves nothing", func(t *testing.T) {
		failing, refused := config, errors.New("refused")
		failing.Prefix = "/third/"
		failing.Finish = func(context.Context, *clientv3.Client) error { return refused }
		_, err := etcd.Restore(t.Context(), failing)
		wantErr(t, err, refused)
		got, err := db.Client().Get(t.Context(), "/third/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil || got.Count > 0 {
			t.Errorf("%d keys are left: %v", got.Count, err)
		}
	})
}

func TestRestoreRefusesUsedDirectories(t *testing.T) {
	t.Parallel()
	path, _ := backUp(t)
	for _, name := range []string{"etcd", "admin.conf", "lost.txt"} {
		dir := shortDir(t)
		noErr(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
		_, err := etcd.Restore(t.Context(), etcd.RestoreConfig{Path: path, Database: etcd.DatabaseConfig{DataDir: dir}, Keep: []string{"sealing.key"}})
		wantErr(t, err, etcd.ErrNotEmpty, dir, name)
	}
}

func TestRestoreThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	path, _ := backUp(t)
	dir, refused := shortDir(t), errors.New("refused")
	_, err := etcd.Restore(t.Context(), etcd.RestoreConfig{
		Path: path, Database: etcd.DatabaseConfig{DataDir: dir, Unsynced: true},
		Finish: func(context.Context, *clientv3.Client) error { return refused },
	})
	wantErr(t, err, refused)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestDamagedBackups(t *testing.T) {
	t.Parallel()
	path, _ := backUp(t)
	whole, err := os.ReadFile(path)
	noErr(t, err)
	flip := func(at int) []byte {
		b := bytes.Clone(whole)
		b[at] ^= 1
		return b
	}
	value := bytes.Index(whole, []byte(`"value":"`)) + 12
	for _, c := range []struct {
		name    string
		content []byte
		want    error
	}{
		{"empty", nil, etcd.ErrNotBackup},
		{"something else", []byte(strings.Repeat("lines of text\n", 100)), etcd.ErrNotBackup},
		{"another tar", tarOf(t, "etc/passwd", "root"), etcd.ErrNotBackup},
		{"cut in a page", whole[:len(whole)/3], etcd.ErrDamaged},
		{"cut before the manifest", whole[:bytes.LastIndex(whole, []byte("manifest.json"))], etcd.ErrDamaged},
		{"one bit of a value", flip(value), etcd.ErrDamaged},
		{"one bit of the checksum", flip(bytes.Index(whole, []byte(`"sha256": "`)) + 15), etcd.ErrDamaged},
		{"a newer format", bytes.Replace(whole, []byte(`"format": 1`), []byte(`"format": 9`), 1), etcd.ErrNewerBackup},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bad := filepath.Join(t.TempDir(), "bad.tar")
			noErr(t, os.WriteFile(bad, c.content, 0o600))
			dir := shortDir(t)
			_, err := etcd.Restore(t.Context(), etcd.RestoreConfig{Path: bad, Database: etcd.DatabaseConfig{DataDir: filepath.Join(dir, "new")}})
			wantErr(t, err, c.want, bad)
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("something was written: %v, %v", entries, err)
			}
		})
	}
}

func tarOf(t *testing.T, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	noErr(t, w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content))}))
	_, err := io.WriteString(w, content)
	noErr(t, err)
	noErr(t, w.Close())
	return b.Bytes()
}

func TestBackupOverFiles(t *testing.T) {
	t.Parallel()
	db := openDatabase(t, shortDir(t))
	_, err := db.Client().Put(t.Context(), "/isthmus/names/east", "uid-east")
	noErr(t, err)
	path := filepath.Join(t.TempDir(), "meshd.tar")
	back := func() error {
		_, err := etcd.Backup(t.Context(), etcd.BackupConfig{Client: db.Client(), Path: path})
		return err
	}
	noErr(t, os.WriteFile(path, []byte("isthmus-sealing-key-1 …"), 0o600))
	wantErr(t, back(), etcd.ErrNotBackup, path)
	if text, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(text), "isthmus-sealing-key") {
		t.Fatalf("the file was written over: %q, %v", text, err)
	}
	noErr(t, os.Remove(path))
	noErr(t, back())
	noErr(t, back()) // over the backup of yesterday
	_, err = etcd.Backup(t.Context(), etcd.BackupConfig{Client: db.Client(), Prefix: "/wrong/", Path: path})
	wantErr(t, err, etcd.ErrNothing, "/wrong/")
	_, err = etcd.ReadBackup(path, nil)
	noErr(t, err)
}

// fullDisk is set in the process that has a small disk of its own.
const fullDisk = "BACKUP_TEST_FULL_DISK"

func TestBackupToFullDisk(t *testing.T) {
	t.Parallel()
	if os.Getenv(fullDisk) == "" {
		inMountNamespace(t, "^TestBackupToFullDisk$", fullDisk+"=1")
		return
	}
	disk := filepath.Join(t.TempDir(), "disk")
	noErr(t, os.Mkdir(disk, 0o700))
	noErr(t, syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"))
	defer syscall.Unmount(disk, 0)
	db := openDatabase(t, shortDir(t))
	fillStore(t, db)
	path := filepath.Join(disk, "meshd.tar")
	_, err := etcd.Backup(t.Context(), etcd.BackupConfig{Client: db.Client(), Path: path})
	wantErr(t, err, syscall.ENOSPC, path)
	entries, err := os.ReadDir(disk)
	if err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// inMountNamespace runs a test again in a process that can mount without anybody noticing.
func inMountNamespace(t *testing.T, test, env string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), os.Args[0], "-test.run", test)
	c.Env = append(os.Environ(), env)
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWNS | syscall.CLONE_NEWUSER, // no root is needed
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := c.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("this kernel allows no user namespaces: %v", err)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestOpenLocal(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := shortDir(t)
	_, err := etcd.OpenLocal(ctx, etcd.DatabaseConfig{DataDir: dir})
	wantErr(t, err, etcd.ErrNothing, dir)

	running, err := etcd.Open(ctx, etcd.DatabaseConfig{DataDir: dir, Unsynced: true})
	noErr(t, err)
	_, err = running.Client().Put(ctx, "/isthmus/names/east", "uid-east")
	noErr(t, err)
	read := func() {
		t.Helper()
		db, err := etcd.OpenLocal(ctx, etcd.DatabaseConfig{DataDir: dir, Unsynced: true})
		noErr(t, err)
		got, err := db.Client().Get(ctx, "/isthmus/names/east")
		if err != nil || len(got.Kvs) != 1 {
			t.Errorf("read %v, %v", got, err)
		}
		noErr(t, db.Close())
	}
	read() // through the one that runs

	socket := filepath.Join(dir, etcd.SocketName)
	noErr(t, os.Rename(socket, socket+".hidden"))
	_, err = etcd.OpenLocal(ctx, etcd.DatabaseConfig{DataDir: dir})
	wantErr(t, err, etcd.ErrInUse, dir)
	noErr(t, os.Rename(socket+".hidden", socket))

	noErr(t, running.Close())
	read() // directly

	_, err = etcd.OpenLocal(ctx, etcd.DatabaseConfig{Endpoints: []string{"unix://" + dir + "/nobody.sock"}})
	wantErr(t, err, context.DeadlineExceeded, "nobody.sock")
}

func TestReadBackupOfNothing(t *testing.T) {
	t.Parallel()
	_, err := etcd.ReadBackup(filepath.Join(t.TempDir(), "missing.tar"), nil)
	wantErr(t, err, fs.ErrNotExist, "missing.tar")
}

func FuzzReadBackup(f *testing.F) {
	f.Add(tarFuzz("keys/000000.jsonl", `{"key":"YQ==","value":"Yg=="}`+"\n", "manifest.json", `{"format":1,"keys":1}`))
	f.Add(tarFuzz("keys/000000.jsonl", "", "manifest.json", "{}"))
	f.Add([]byte("no tar"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Skip(err)
		}
		keys := 0
		m, err := etcd.ReadBackup(path, func(etcd.Entry) error { keys++; return nil })
		if (err == nil) != (m != nil) {
			t.Errorf("manifest %v with error %v", m, err)
		}
		if m != nil && m.Keys != keys {
			t.Errorf("%d keys were visited, the manifest says %d", keys, m.Keys)
		}
	})
}

func tarFuzz(nameAndContent ...string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(nameAndContent); i += 2 {
		w.WriteHeader(&tar.Header{Name: nameAndContent[i], Size: int64(len(nameAndContent[i+1]))})
		io.WriteString(w, nameAndContent[i+1])
	}
	w.Close()
	return b.Bytes()
}
