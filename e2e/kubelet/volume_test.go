// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

func TestContent(t *testing.T) {
	t.Parallel()
	from := shelf{
		configs: map[string]map[string]string{"prices": {"apple": "3", "pear": "4"}},
		secrets: map[string]map[string][]byte{"vault": {"key": []byte("hush")}},
	}
	local := func(name string) corev1.LocalObjectReference { return corev1.LocalObjectReference{Name: name} }
	for _, c := range []struct {
		why     string
		source  corev1.VolumeSource
		want    string // path=content(mode), sorted
		wantErr string
	}{
		{why: "all keys of a ConfigMap", source: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: local("prices")}},
			want: "apple=3(0644) pear=4(0644)"},
		{why: "some keys at other paths, with modes", source: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: local("prices"), DefaultMode: ptr.To[int32](0o600),
			Items: []corev1.KeyToPath{{Key: "apple", Path: "fruit/red", Mode: ptr.To[int32](0o440)}, {Key: "pear", Path: "pear"}}}},
			want: "fruit/red=3(0440) pear=4(0600)"},
		{why: "a key that is missing", source: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{
			SecretName: "vault", Items: []corev1.KeyToPath{{Key: "door", Path: "door"}}}}, wantErr: `secret vault has no key "door"`},
		{why: "a Secret that is missing", source: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "none"}}, wantErr: "not found"},
		{why: "a Secret that may be missing", source: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "none", Optional: ptr.To(true)}}},
		{why: "a path that leaves the volume", source: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: local("prices"), Items: []corev1.KeyToPath{{Key: "apple", Path: "../apple"}}}}, wantErr: `path "../apple"`},
		{why: "the downward API", source: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "name", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}}}, want: "name=web-0(0644)"},
		{why: "several sources in one", source: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: local("prices")}},
			{Secret: &corev1.SecretProjection{LocalObjectReference: local("vault")}},
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", Audience: "isthmus-ca"}},
		}}}, want: "apple=3(0644) key=hush(0644) pear=4(0644) token=keeper/isthmus-ca/u-1(0644)"},
	} {
		t.Run(c.why, func(t *testing.T) {
			t.Parallel()
			v := &volumes{known: webFacts, objects: from, tokens: newTokens(sayRequest, time.Now)}
			content, err := v.content(t.Context(), webPod(), &corev1.Volume{Name: "v", VolumeSource: c.source})
			if c.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), c.wantErr) {
					t.Errorf("error is %v, want %q", err, c.wantErr)
				}
				return
			}
			var words []string
			for _, name := range sortedKeys(content) {
				words = append(words, fmt.Sprintf("%s=%s(%04o)", name, content[name].Data, content[name].Mode))
			}
			if got := strings.Join(words, " "); err != nil || got != c.want {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

// sayRequest issues tokens that say what was asked for.
func sayRequest(_ context.Context, _, account string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	r.Status.Token = fmt.Sprintf("%s/%s/%s", account, strings.Join(r.Spec.Audiences, ","), r.Spec.BoundObjectRef.UID)
	r.Status.ExpirationTimestamp = metav1.NewTime(time.Now().Add(time.Duration(*r.Spec.ExpirationSeconds) * time.Second))
	return r, nil
}

func TestPayloadWrite(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "volume")
	file := func(text string, mode fs.FileMode) payloadFile {
		return payloadFile{Data: []byte(text), Mode: mode, UID: os.Geteuid()}
	}
	first := payload{"a": file("1", 0o644), "deep/b": file("2", 0o400), "gone": file("3", 0o644)}
	if err := first.write(dir, -1); err != nil {
		t.Fatal(err)
	}
	before, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil {
		t.Fatal(err)
	}
	second := payload{"a": file("one", 0o644), "deep/b": file("2", 0o400), "new": file("4", 0o600)}
	if err := second.write(dir, os.Getegid()); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"a": "one(0644)", "deep/b": "2(0440)", "new": "4(0640)"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%s(%04o)", data, info.Mode().Perm()); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
	for _, name := range []string{"gone", before, newLink} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}

func TestSubPath(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	for sub, want := range map[string]string{"new/folder": "", "../x": "must stay inside", "out/passwd": "leads out", "/etc": "must stay inside"} {
		_, err := subPath(dir, sub)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: error is %v, want %q", sub, err, want)
		}
	}
}

func TestTokensAreRenewed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		issued, away := 0, false
		issue := func(ctx context.Context, namespace, account string, r *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
			if away {
				return nil, errors.New("API server is away")
			}
			issued++
			r, err := sayRequest(ctx, namespace, account, r)
			r.Status.Token = fmt.Sprint("token ", issued)
			return r, err
		}
		tokens := newTokens(issue, time.Now)
		want := &corev1.ServiceAccountTokenProjection{Audience: "isthmus-ca", ExpirationSeconds: ptr.To[int64](1000)}
		get := func(expected string) {
			t.Helper()
			got, err := tokens.get(t.Context(), webPod(), want)
			if err != nil || got != expected {
				t.Errorf("got %q, %v, want %q", got, err, expected)
			}
		}
		get("token 1")
		if in := time.Until(tokens.renewal()); in != 800*time.Second {
			t.Errorf("renewal in %s, want at 80 %% of 1000 s", in)
		}
		time.Sleep(799 * time.Second)
		get("token 1")
		time.Sleep(time.Second)
		get("token 2")
		away = true
		time.Sleep(900 * time.Second)
		get("token 2") // the old one is still good
		if in := time.Until(tokens.renewal()); in != time.Second {
			t.Errorf("next attempt in %s, want 1 s", in)
		}
		time.Sleep(100 * time.Second)
		if got, err := tokens.get(t.Context(), webPod(), want); err == nil {
			t.Errorf("got %q, which has expired", got)
		}
		away = false
		get("token 3")
	})
}
