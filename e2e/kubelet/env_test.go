// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/utils/ptr"
)

func TestExpand(t *testing.T) {
	t.Parallel()
	known := map[string]string{"HOST": "web-0", "EMPTY": "", "NEST": "$(HOST)"}
	lookup := func(name string) (string, bool) { value, ok := known[name]; return value, ok }
	for _, c := range []struct{ why, in, want string }{
		{"no reference", "plain", "plain"},
		{"a reference", "$(HOST).db", "web-0.db"},
		{"two references", "$(HOST)$(HOST)", "web-0web-0"},
		{"an empty value", "[$(EMPTY)]", "[]"},
		{"an unknown name stays", "$(NOBODY)", "$(NOBODY)"},
		{"a doubled dollar is one", "$$(HOST)", "$(HOST)"},
		{"three dollars", "$$$(HOST)", "$web-0"},
		{"values are not expanded again", "$(NEST)", "$(HOST)"},
		{"a dollar alone", "cost: 5$", "cost: 5$"},
		{"a shell's variable", "$HOST ${HOST}", "$HOST ${HOST}"},
		{"no end", "$(HOST", "$(HOST"},
	} {
		t.Run(c.why, func(t *testing.T) {
			t.Parallel()
			if got := expand(c.in, lookup); got != c.want {
				t.Errorf("expand(%q) = %q, want %q", c.in, got, c.want)
			}
		})
	}
}

func FuzzExpand(f *testing.F) {
	for _, seed := range []string{"$(A)", "$$(A)", "$(", "$", "a$(B)c$$d"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		none := expand(in, func(string) (string, bool) { return "", false })
		if want := strings.ReplaceAll(in, "$$", "$"); len(none) < len(want)-strings.Count(in, "$") || len(none) > len(in) {
			t.Errorf("expand(%q) = %q without any variable", in, none)
		}
	})
}

// shelf holds ConfigMaps and Secrets by name.
type shelf struct {
	configs map[string]map[string]string
	secrets map[string]map[string][]byte
}

func (s shelf) configMap(_ context.Context, _, name string) (*corev1.ConfigMap, error) {
	data, ok := s.configs[name]
	if !ok {
		return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "configmaps"}, name)
	}
	return &corev1.ConfigMap{Data: data}, nil
}

func (s shelf) secret(_ context.Context, _, name string) (*corev1.Secret, error) {
	data, ok := s.secrets[name]
	if !ok {
		return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "secrets"}, name)
	}
	return &corev1.Secret{Data: data}, nil
}

func webPod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web-0", UID: "u-1",
			Labels: map[string]string{"app": "web", "tier": `a"b`}, Annotations: map[string]string{"team": "fruit"},
		},
		Spec: corev1.PodSpec{NodeName: "node-a", ServiceAccountName: "keeper"},
	}
}

var webFacts = facts{
	PodIPs:  []netip.Addr{netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00::2")},
	HostIPs: []netip.Addr{netip.MustParseAddr("198.18.0.2")},
}

func TestFieldValue(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"metadata.name": "web-0", "metadata.namespace": "shop", "metadata.uid": "u-1",
		"metadata.labels['app']": "web", "metadata.labels['none']": "", "metadata.annotations['team']": "fruit",
		"metadata.labels": "app=\"web\"\ntier=\"a\\\"b\"",
		"spec.nodeName":   "node-a", "spec.serviceAccountName": "keeper",
		"status.podIP": "10.244.1.2", "status.podIPs": "10.244.1.2,fd00::2", "status.hostIP": "198.18.0.2",
	} {
		if got, err := fieldValue(webPod(), path, webFacts); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", path, got, err, want)
		}
	}
	if _, err := fieldValue(webPod(), "status.phase", webFacts); err == nil || !strings.Contains(err.Error(), `"status.phase"`) {
		t.Errorf("a field that is not served: %v", err)
	}
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	from := shelf{
		configs: map[string]map[string]string{"prices": {"apple": "3", "pear": "4"}},
		secrets: map[string]map[string][]byte{"vault": {"key": []byte("hush")}},
	}
	configMap := func(name string, optional *bool) corev1.EnvFromSource {
		return corev1.EnvFromSource{Prefix: "P_", ConfigMapRef: &corev1.ConfigMapEnvSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: name}, Optional: optional}}
	}
	key := func(name, key string, optional *bool) corev1.EnvVar {
		return corev1.EnvVar{Name: "KEY", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
			LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: key, Optional: optional}}}
	}
	for _, c := range []struct {
		why     string
		c       corev1.Container
		want    []string
		wantErr string
	}{
		{why: "values refer to what came before", c: corev1.Container{Env: []corev1.EnvVar{
			{Name: "A", Value: "1$(B)"}, {Name: "B", Value: "2"}, {Name: "C", Value: "$(A)$(B)"}}}, want: []string{"A=1$(B)", "B=2", "C=1$(B)2"}},
		{why: "a later value wins", c: corev1.Container{Env: []corev1.EnvVar{{Name: "A", Value: "1"}, {Name: "A", Value: "$(A)2"}}}, want: []string{"A=12"}},
		{why: "all of a ConfigMap, then own values", c: corev1.Container{
			EnvFrom: []corev1.EnvFromSource{configMap("prices", nil)}, Env: []corev1.EnvVar{{Name: "P_apple", Value: "9"}}}, want: []string{"P_apple=9", "P_pear=4"}},
		{why: "a key of a Secret", c: corev1.Container{Env: []corev1.EnvVar{key("vault", "key", nil)}}, want: []string{"KEY=hush"}},
		{why: "a missing ConfigMap is an error", c: corev1.Container{EnvFrom: []corev1.EnvFromSource{configMap("none", nil)}}, wantErr: `"none" not found`},
		{why: "unless it is optional", c: corev1.Container{EnvFrom: []corev1.EnvFromSource{configMap("none", ptr.To(true))}}},
		{why: "so is a missing key", c: corev1.Container{Env: []corev1.EnvVar{key("vault", "door", nil)}}, wantErr: `secret "vault" has no key "door"`},
		{why: "unless it is optional too", c: corev1.Container{Env: []corev1.EnvVar{key("vault", "door", ptr.To(true))}}},
		{why: "resources are refused", c: corev1.Container{Env: []corev1.EnvVar{{Name: "CPU", ValueFrom: &corev1.EnvVarSource{
			ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.cpu"}}}}}, wantErr: "resourceFieldRef is not supported"},
	} {
		t.Run(c.why, func(t *testing.T) {
			t.Parallel()
			var env environment
			err := env.addEnv(t.Context(), webPod(), &c.c, webFacts, from)
			if c.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), c.wantErr) {
					t.Errorf("error is %v, want %q", err, c.wantErr)
				}
				return
			}
			if err != nil || !slices.Equal(env.list(), c.want) {
				t.Errorf("got %q, %v, want %q", env.list(), err, c.want)
			}
		})
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	var env environment
	env.set("WHO", "web")
	image := Image{Path: "/bin/serve", Args: []string{"$(WHO)"}}
	for _, c := range []struct {
		why  string
		c    corev1.Container
		want []string
	}{
		{"the image's own, as it is", corev1.Container{}, []string{"/bin/serve", "$(WHO)"}},
		{"args replace the image's", corev1.Container{Args: []string{"as", "$(WHO)"}}, []string{"/bin/serve", "as", "web"}},
		{"command replaces both", corev1.Container{Command: []string{"sh"}}, []string{"sh"}},
		{"command and args", corev1.Container{Command: []string{"sh"}, Args: []string{"-c", "true"}}, []string{"sh", "-c", "true"}},
	} {
		if got := commandLine(&c.c, image, env); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.why, got, c.want)
		}
	}
}

func TestImage(t *testing.T) {
	t.Parallel()
	k := &Kubelet{Config: Config{Images: map[string]Image{
		"isthmus/echo": {Path: "echo"}, "isthmus/echo:old": {Path: "old"}, "busybox": {Path: "sh"},
	}}}
	for name, want := range map[string]string{
		"isthmus/echo": "echo", "isthmus/echo:dev": "echo", "isthmus/echo:old": "old", "isthmus/echo:dev@sha256:12": "echo",
		"docker.io/library/busybox": "sh", "localhost:5000/busybox:1": "sh", "localhost:5000/busybox": "sh",
	} {
		if got, err := k.image(name); err != nil || got.Path != want {
			t.Errorf("%s: got %q, %v, want %q", name, got.Path, err, want)
		}
	}
	if _, err := k.image("nginx"); err == nil || !strings.Contains(err.Error(), "busybox, isthmus/echo") {
		t.Errorf("an image that nobody knows: %v", err)
	}
}
