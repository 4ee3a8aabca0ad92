// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAFolderGoesWithWhoMadeIt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	made := func() *Folder {
		t.Helper()
		f, err := NewFolder(dir, "programs-")
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	there := func(path string) bool {
		_, err := os.Stat(path)
		return err == nil
	}
	// Being made at this moment, another one's, and one whose process was killed.
	young, other := filepath.Join(dir, "programs-young"), filepath.Join(dir, "others")
	for _, path := range []string{young, other} {
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	abandoned := made()
	if abandonedFolder(abandoned.Path) || abandonedFolder(young) || abandonedFolder(other) {
		t.Error("nobody has died yet")
	}
	abandoned.lock.Close()
	if !abandonedFolder(abandoned.Path) {
		t.Error("that its process died is not seen")
	}

	mine := made()
	if there(abandoned.Path) || !there(young) || !there(other) || !there(mine.Path) {
		t.Error("the abandoned one goes, and no other")
	}
	if yours := made(); !there(mine.Path) || mine.Path == yours.Path {
		t.Error("a second one disturbed the first")
	}
	if err := mine.Remove(); err != nil || there(mine.Path) {
		t.Errorf("it is not removed: %v", err)
	}
}

func TestWhatOthersDoIsNotLeftByTheBed(t *testing.T) {
	t.Parallel()
	for target, own := range map[string]bool{
		"/": true, "/proc": true, "/run": true, "/etc": true, "/run/isthmus/w1/tmp": true, "/run/netns/w1-east": true, "/run/programs/w1/echo": true,
		"/srv/chroot/proc": false, "/run/user/0": false, "/run/netns/blue": false, "/mnt": false,
	} {
		if ownMount(target) != own {
			t.Errorf("mount %s: own is %t", target, !own)
		}
	}
	for name, own := range map[string]bool{
		portName("isthmus-eastwestgateway-1", "eth0"): true, portName("a", "eth0"): true, transitBridge: true, podBridge: true,
		"eth0": false, "docker0": false, "veth12ab34c": false, "br-0123456789ab": false,
	} {
		if ownInterface.MatchString(name) != own {
			t.Errorf("interface %s: own is %t", name, !own)
		}
	}
}
