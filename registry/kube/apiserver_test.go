// SPDX-License-Identifier: Apache-2.0

package kube_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/ports"
)

// cluster is a real kube-apiserver on loopback, with an etcd of its own and no
// controllers: tests write what controllers would.
type cluster struct {
	t        testing.TB
	dir      string
	port     int
	etcdPort int
	admin    *rest.Config
	client   *dynamic.DynamicClient
	keys     []string // of service account tokens, files; the first one signs
	mu       sync.Mutex
	server   *exec.Cmd
}

func binary(t testing.TB, path ...string) string {
	cache := os.Getenv("ISTHMUS_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Skip("no cache directory: ", err)
		}
		cache = filepath.Join(dir, "isthmus")
	}
	file := filepath.Join(append([]string{cache}, path...)...)
	if _, err := os.Stat(file); err != nil {
		t.Skipf("%s is not there: the test bed builds it (make test)", file)
	}
	return file
}

func startCluster(t testing.TB) *cluster {
	t.Helper()
	etcd := binary(t, "etcd-v3.7.3", "etcd")
	binary(t, "kubernetes-v1.36.3", "kube-apiserver")
	c := &cluster{t: t, dir: t.TempDir(), port: ports.Free(t), etcdPort: ports.Free(t)}
	c.writeKey("sa.key")
	if err := os.WriteFile(filepath.Join(c.dir, "tokens.csv"), []byte("admin-token,admin,admin,system:masters\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	peer := ports.Free(t)
	c.run(exec.Command(etcd, "--data-dir", filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level", "error",
		"--listen-client-urls", fmt.Sprintf("http://127.0.0.1:%d", c.etcdPort), "--advertise-client-urls", fmt.Sprintf("http://127.0.0.1:%d", c.etcdPort),
		"--listen-peer-urls", fmt.Sprintf("http://127.0.0.1:%d", peer), "--initial-advertise-peer-urls", fmt.Sprintf("http://127.0.0.1:%d", peer),
		"--initial-cluster", fmt.Sprintf("default=http://127.0.0.1:%d", peer)), "etcd")
	c.start()
	ca, err := os.ReadFile(filepath.Join(c.dir, "certs", "apiserver.crt"))
	if err != nil {
		t.Fatal(err)
	}
	c.admin = &rest.Config{Host: c.url(), BearerToken: "admin-token", TLSClientConfig: rest.TLSClientConfig{CAData: ca}, QPS: -1}
	if c.client, err = dynamic.NewForConfig(c.admin); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *cluster) url() string { return fmt.Sprintf("https://127.0.0.1:%d", c.port) }

// writeKey makes a key that signs tokens from the next start on; older ones go on being
// published. It returns the public half.
func (c *cluster) writeKey(name string) *ecdsa.PublicKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		c.t.Fatal(err)
	}
	file := filepath.Join(c.dir, name)
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.keys = append([]string{file}, c.keys...)
	return &key.PublicKey
}

// run starts a process that ends with the test.
func (c *cluster) run(cmd *exec.Cmd, name string) *exec.Cmd {
	c.t.Helper()
	log, err := os.Create(filepath.Join(c.dir, name+".log"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

// start runs the API server, also again after stop, and waits until it is ready.
func (c *cluster) start() {
	c.t.Helper()
	cmd := exec.Command(binary(c.t, "kubernetes-v1.36.3", "kube-apiserver"),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", c.port),
		"--cert-dir="+filepath.Join(c.dir, "certs"), fmt.Sprintf("--etcd-servers=http://127.0.0.1:%d", c.etcdPort),
		"--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=RBAC", "--token-auth-file="+filepath.Join(c.dir, "tokens.csv"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--api-audiences=https://kubernetes.default.svc.cluster.local",
		"--service-account-signing-key-file="+c.keys[0],
		"--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true",
		"--enable-priority-and-fairness=false",
		"--runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles=true", "--feature-gates=ClusterTrustBundle=true")
	for _, file := range c.keys {
		cmd.Args = append(cmd.Args, "--service-account-key-file="+file)
	}
	c.mu.Lock()
	c.server = c.run(cmd, "apiserver")
	c.mu.Unlock()
	client := &http.Client{Transport: insecure(), Timeout: time.Second}
	deadline := time.Now().Add(60 * time.Second)
	for {
		request, _ := http.NewRequest("GET", c.url()+"/readyz", nil)
		request.Header.Set("Authorization", "Bearer admin-token")
		response, err := client.Do(request)
		if err == nil {
			response.Body.Close()
			if response.StatusCode == 200 {
				return
			}
		}
		if time.Now().After(deadline) {
			log, _ := os.ReadFile(filepath.Join(c.dir, "apiserver.log"))
			c.t.Fatalf("kube-apiserver is not ready: %v\n%s", err, log[max(0, len(log)-2000):])
		}
		time.Sleep(50 * time.Millisecond) // a process of another program has no condition to wait on
	}
}

func (c *cluster) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server.Process.Kill()
	c.server.Wait()
}

var kinds = map[string]schema.GroupVersionResource{
	"Namespace": {Version: "v1", Resource: "namespaces"}, "Service": {Version: "v1", Resource: "services"},
	"Pod": {Version: "v1", Resource: "pods"}, "Node": {Version: "v1", Resource: "nodes"}, "ConfigMap": {Version: "v1", Resource: "configmaps"},
	"ServiceAccount": {Version: "v1", Resource: "serviceaccounts"}, "Deployment": {Group: "apps", Version: "v1", Resource: "deployments"},
	"EndpointSlice":            {Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
	"ClusterRole":              {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"},
	"ClusterRoleBinding":       {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"},
	"Role":                     {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles"},
	"RoleBinding":              {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"},
	"CustomResourceDefinition": {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
	"ClusterTrustBundle":       {Group: "certificates.k8s.io", Version: "v1beta1", Resource: "clustertrustbundles"},
	"VirtualService":           {Group: "networking.istio.io", Version: "v1", Resource: "virtualservices"},
}

// apply creates an object or replaces it, its status too.
func (c *cluster) apply(object any) {
	c.t.Helper()
	u, ok := object.(*unstructured.Unstructured)
	if !ok {
		content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
		if err != nil {
			c.t.Fatal(err)
		}
		u = &unstructured.Unstructured{Object: content}
		unstructured.RemoveNestedField(u.Object, "metadata", "creationTimestamp")
	}
	resource := c.resource(u.GetKind(), u.GetNamespace())
	force := metav1.ApplyOptions{FieldManager: "test", Force: true}
	applied, err := resource.Apply(context.Background(), u.GetName(), u, force)
	if err != nil {
		c.t.Fatalf("apply %s %s/%s: %v", u.GetKind(), u.GetNamespace(), u.GetName(), err)
	}
	if status, ok := u.Object["status"]; ok && len(status.(map[string]any)) > 0 {
		applied.Object["status"] = status
		if _, err := resource.UpdateStatus(context.Background(), applied, metav1.UpdateOptions{}); err != nil {
			c.t.Fatalf("status of %s %s: %v", u.GetKind(), u.GetName(), err)
		}
	}
}

func (c *cluster) resource(kind, namespace string) dynamic.ResourceInterface {
	gvr, ok := kinds[kind]
	if !ok {
		c.t.Fatalf("unknown kind %s", kind)
	}
	if namespace == "" {
		return c.client.Resource(gvr)
	}
	return c.client.Resource(gvr).Namespace(namespace)
}

func (c *cluster) delete(kind, namespace, name string) {
	c.t.Helper()
	zero := int64(0)
	if err := c.resource(kind, namespace).Delete(context.Background(), name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		c.t.Fatalf("delete %s %s/%s: %v", kind, namespace, name, err)
	}
}

func (c *cluster) uid(namespace string) string {
	c.t.Helper()
	u, err := c.resource("Namespace", "").Get(context.Background(), namespace, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return string(u.GetUID())
}

func meta(kind, apiVersion, namespace, name string, labels map[string]string) (metav1.TypeMeta, metav1.ObjectMeta) {
	return metav1.TypeMeta{Kind: kind, APIVersion: apiVersion}, metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels}
}

func (c *cluster) namespace(name string, labels map[string]string) {
	n := &corev1.Namespace{}
	n.TypeMeta, n.ObjectMeta = meta("Namespace", "v1", "", name, labels)
	c.apply(n)
}
