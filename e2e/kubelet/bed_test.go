// SPDX-License-Identifier: Apache-2.0

package kubelet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/kubelet"
)

// A town is a cluster with two nodes.
type town struct {
	*bed.Cluster
	*kubelet.Kubelet
	router *bed.Namespace
}

func newTown(t *testing.T) town {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces and mounts")
	}
	w, err := bed.NewWorld(bed.WorldConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("close world: %v", err)
		}
	})
	network, err := w.Network("n1", bed.NetworkConfig{})
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := w.Cluster("east", bed.ClusterConfig{Network: network})
	if err != nil {
		t.Fatal(err)
	}
	return town{cluster, startKubelet(t, w, cluster), network.Router()}
}

func startKubelet(t *testing.T, w *bed.World, cluster *bed.Cluster) *kubelet.Kubelet {
	t.Helper()
	var nodes []kubelet.Node
	for _, zone := range []string{"a", "b"} {
		pods, err := cluster.Network().NodeRange()
		if err != nil {
			t.Fatal(err)
		}
		listener, err := cluster.Namespace().Listen("tcp", netip.AddrPortFrom(cluster.Addr(), 0).String())
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, kubelet.Node{
			Name: "node-" + zone, Address: cluster.Addr(), Pods: []netip.Prefix{pods}, Listener: listener,
			Labels: map[string]string{corev1.LabelTopologyZone: zone},
		})
	}
	client, err := kubelet.NewClient(cluster.Config())
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := w.Dir("kubelet")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	k, err := kubelet.New(kubelet.Config{
		Client: client, Nodes: nodes, Network: kubelet.InBed(cluster.Network()), Dir: dir,
		Images: map[string]kubelet.Image{
			"web": {Path: self, Env: []string{programVar + "=web"}}, "busybox": {Path: "sh"},
		},
		ProbeFrom: cluster.Network().Router(), APIServer: netip.AddrPortFrom(cluster.Addr(), 6443),
		DNS: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, Env: []string{"CLUSTER=east"},
		Backoff: kubelet.Backoff{First: 200 * time.Millisecond},
		Log:     slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- k.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("kubelet ended: %v", err)
		}
	})
	select {
	case <-k.Ready():
	case <-time.After(20 * time.Second):
		t.Fatal("kubelet is not ready after 20 s")
	}
	return k
}

// eventually asks until the condition holds, for at most 20 seconds, and prints how long it took.
func eventually(t *testing.T, what string, condition func() error) {
	t.Helper()
	start := time.Now()
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := condition()
		if err == nil {
			t.Logf("%s: %s", what, time.Since(start).Round(time.Millisecond))
			return
		}
		if time.Since(start) > 20*time.Second {
			t.Fatalf("%s: not within 20 s: %v", what, err)
		}
		<-ticker.C
	}
}

func (c town) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	return string(out)
}

func (c town) apply(t *testing.T, manifests string) {
	t.Helper()
	if err := c.Apply(t.Context(), manifests); err != nil {
		t.Fatal(err)
	}
}

// pods lists the pods of an app that are not being deleted.
func (c town) pods(t *testing.T, app string) []corev1.Pod {
	t.Helper()
	list, err := c.Client().CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
}

func isReady(p corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// await waits until exactly n pods of an app exist and are ready.
func (c town) await(t *testing.T, app string, n int) []corev1.Pod {
	t.Helper()
	var pods []corev1.Pod
	eventually(t, fmt.Sprintf("%d pods of %s are ready", n, app), func() error {
		pods = c.pods(t, app)
		ready := 0
		for _, p := range pods {
			if isReady(p) {
				ready++
			}
		}
		if ready != n || len(pods) != n {
			return fmt.Errorf("%d of %d ready: %s", ready, len(pods), describe(pods))
		}
		return nil
	})
	return pods
}

func describe(pods []corev1.Pod) string {
	var all []string
	for _, p := range pods {
		all = append(all, fmt.Sprintf("%s %s %+v %+v", p.Name, p.Status.Phase, p.Status.InitContainerStatuses, p.Status.ContainerStatuses))
	}
	return strings.Join(all, "\n")
}

// get asks a pod from the router.
func (c town) get(t *testing.T, p corev1.Pod, path string) string {
	t.Helper()
	_, body, err := c.router.Get(t.Context(), "http://"+p.Status.PodIP+":8080"+path)
	if err != nil {
		t.Fatalf("GET %s of %s: %v", path, p.Name, err)
	}
	return body
}

const shop = `
apiVersion: v1
kind: ConfigMap
metadata: {name: prices}
data: {apple: "3", pear: "4"}
---
apiVersion: v1
kind: Secret
metadata: {name: vault}
stringData: {key: hush}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: keeper}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop, version: v1}, annotations: {colour: green}}
    spec:
      serviceAccountName: keeper
      terminationGracePeriodSeconds: 5
      initContainers:
      - name: stock
        image: docker.io/library/busybox:1.36
        command: ["sh", "-c", "echo apples > /shelf/stock; echo stocked $(POD)"]
        env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
        volumeMounts: [{name: shelf, mountPath: /shelf}]
      - name: guard
        image: busybox
        restartPolicy: Always
        command: ["sh", "-c", "trap 'echo guard leaves; exit 0' TERM; touch /shelf/guarded; while :; do sleep 0.1; done"]
        startupProbe: {exec: {command: [test, -e, /shelf/guarded]}, periodSeconds: 1}
        volumeMounts: [{name: shelf, mountPath: /shelf}]
      containers:
      - name: web
        image: registry.example/team/web:v1
        args: ["$(NODE)", "$$(NODE)", "$(NOBODY)"]
        ports: [{name: http, containerPort: 8080}]
        env:
        - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: COLOUR, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['colour']"}}}
        - {name: KEY, valueFrom: {secretKeyRef: {name: vault, key: key}}}
        envFrom: [{configMapRef: {name: prices}, prefix: PRICE_}]
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, failureThreshold: 1}
        volumeMounts:
        - {name: shelf, mountPath: /shelf}
        - {name: prices, mountPath: /etc/prices}
        - {name: bound, mountPath: /var/run/secrets/tokens}
      volumes:
      - {name: shelf, emptyDir: {}}
      - {name: prices, configMap: {name: prices, items: [{key: apple, path: fruit/apple, mode: 0440}]}}
      - name: bound
        projected:
          sources:
          - serviceAccountToken: {path: isthmus-token, audience: isthmus-ca, expirationSeconds: 3600}
          - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
`

func TestDeployment(t *testing.T) {
	t.Parallel()
	c := newTown(t)
	c.apply(t, shop)
	pods := c.await(t, "shop", 2)
	if pods[0].Spec.NodeName == pods[1].Spec.NodeName {
		t.Errorf("both pods are on %s", pods[0].Spec.NodeName)
	}
	t.Run("containers find what they asked for", func(t *testing.T) { checkContent(t, c, pods[0]) })
	t.Run("exec", func(t *testing.T) { checkExec(t, c, pods[0]) })
	t.Run("logs", func(t *testing.T) { checkLogs(t, c, pods[0]) })
	t.Run("readiness follows the probe", func(t *testing.T) { checkReadiness(t, c, pods[0]) })
	t.Run("volumes follow the API", func(t *testing.T) { checkRefresh(t, c, pods[0]) })
	t.Run("the slice has both", func(t *testing.T) { checkSlice(t, c) })
	t.Run("a killed container comes back", func(t *testing.T) { checkRestart(t, c) })
	t.Run("a rollout replaces the pods", func(t *testing.T) { checkRollout(t, c, pods) })
	t.Run("pods outlive their API server", func(t *testing.T) { checkOutage(t, c) })
}

func checkContent(t *testing.T, c town, p corev1.Pod) {
	for path, want := range map[string]string{
		"/":                                  p.Name,
		"/file?name=/etc/hostname":           p.Name + "\n",
		"/file?name=/shelf/stock":            "apples\n",
		"/file?name=/etc/prices/fruit/apple": "3",
		"/file?name=/etc/resolv.conf":        "nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n",
		"/env?name=IP":                       p.Status.PodIP,
		"/env?name=COLOUR":                   "green",
		"/env?name=KEY":                      "hush",
		"/env?name=PRICE_pear":               "4",
		"/env?name=CLUSTER":                  "east",
		"/env?name=KUBERNETES_SERVICE_HOST":  c.Addr().String(),
	} {
		if got := c.get(t, p, path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	if labels := c.get(t, p, "/file?name=/var/run/secrets/tokens/labels"); !strings.Contains(labels, "app=\"shop\"\n") {
		t.Errorf("labels: %q", labels)
	}
	if token := c.get(t, p, "/file?name=/var/run/secrets/tokens/isthmus-token"); strings.Count(token, ".") != 2 {
		t.Errorf("bound token is no JWT: %q", token)
	}
	if root := c.get(t, p, "/file?name=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"); !strings.Contains(root, "BEGIN CERTIFICATE") {
		t.Errorf("root certificate of the API server: %q", root)
	}
}

func checkExec(t *testing.T, c town, p corev1.Pod) {
	if got := c.kubectl(t, "exec", p.Name, "-c", "web", "--", "sh", "-c", "hostname; echo $IP; echo $$ > /tmp/mark; cat /proc/1/cmdline | tr '\\0' ' '"); got != p.Name+"\n"+p.Status.PodIP+"\n"+procline(t, p) {
		t.Errorf("exec: got %q", got)
	}
	if _, err := os.Stat("/tmp/mark"); err == nil {
		t.Error("a container's /tmp is the machine's")
	}
	_, err := c.Kubectl(t.Context(), "exec", p.Name, "-c", "web", "--", "sh", "-c", "echo oops >&2; exit 7")
	if err == nil || !strings.Contains(err.Error(), "oops") || !strings.Contains(err.Error(), "code 7") {
		t.Errorf("exec that fails: %v", err)
	}
	script := "script -qec 'kubectl --kubeconfig=" + c.Namespace().World().Kubeconfig() + " --context=east exec -it " + p.Name + " -c guard -- sh -c \"tty; stty size\"' /dev/null"
	laptop, err := c.Namespace().World().Laptop("laptop")
	if err != nil {
		t.Fatal(err)
	}
	out, err := laptop.Shell(t.Context(), script)
	if err != nil || !bytes.Contains(out, []byte("/dev/pts/")) {
		t.Errorf("exec with a terminal: %q, %v", out, err)
	}
	var direct bytes.Buffer
	err = c.Exec(t.Context(), "default", p.Name, "web", []string{"sh", "-c", "cat; exit 3"}, strings.NewReader("hello"), &direct, nil)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || direct.String() != "hello" {
		t.Errorf("direct exec: %q, %v", direct.String(), err)
	}
}

// procline is what the web container's first process is called with.
func procline(t *testing.T, p corev1.Pod) string {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s %s $(NODE) $(NOBODY) ", self, p.Spec.NodeName)
}

func checkLogs(t *testing.T, c town, p corev1.Pod) {
	if got, want := c.kubectl(t, "logs", p.Name, "-c", "stock"), "stocked "+p.Name+"\n"; got != want {
		t.Errorf("logs of the init container: got %q, want %q", got, want)
	}
	if got := c.kubectl(t, "logs", p.Name, "-c", "web"); !strings.HasPrefix(got, "serving as 1 "+p.Spec.NodeName) {
		t.Errorf("logs of the main container: %q", got)
	}
	if got := c.kubectl(t, "logs", p.Name, "-c", "web", "--tail=1", "--timestamps", "--since=1h"); !strings.Contains(got, "Z serving as 1") {
		t.Errorf("logs with timestamps: %q", got)
	}
	if got := c.kubectl(t, "logs", p.Name, "-c", "web", "--since-time=2090-01-01T00:00:00Z"); got != "" {
		t.Errorf("logs of the far future: %q", got)
	}
}

func checkReadiness(t *testing.T, c town, p corev1.Pod) {
	ready := func(want bool) func() error {
		return func() error {
			now, err := c.Client().CoreV1().Pods("default").Get(t.Context(), p.Name, metav1.GetOptions{})
			if err == nil && isReady(*now) != want {
				err = fmt.Errorf("ready is %t", !want)
			}
			return err
		}
	}
	c.get(t, p, "/set?ready=false")
	eventually(t, "pod is unready while it still answers", ready(false))
	c.get(t, p, "/set?ready=true")
	eventually(t, "pod is ready again", ready(true))
}

func checkRefresh(t *testing.T, c town, p corev1.Pod) {
	c.kubectl(t, "patch", "configmap", "prices", "-p", `{"data":{"apple":"5"}}`)
	eventually(t, "the new price is on the shelf", func() error {
		if got := c.get(t, p, "/file?name=/etc/prices/fruit/apple"); got != "5" {
			return fmt.Errorf("price is %q", got)
		}
		return nil
	})
	c.kubectl(t, "label", "pod", p.Name, "tier=front")
	eventually(t, "the new label is in the volume", func() error {
		if got := c.get(t, p, "/file?name=/var/run/secrets/tokens/labels"); !strings.Contains(got, `tier="front"`) {
			return fmt.Errorf("labels are %q", got)
		}
		return nil
	})
}

func checkSlice(t *testing.T, c town) {
	c.kubectl(t, "expose", "deployment", "shop", "--port=80", "--target-port=http")
	eventually(t, "both pods are ready endpoints", func() error {
		list, err := c.Client().DiscoveryV1().EndpointSlices("default").List(t.Context(), metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=shop"})
		if err != nil {
			return err
		}
		zones := map[string]bool{}
		for _, slice := range list.Items {
			for _, e := range slice.Endpoints {
				if *e.Conditions.Ready {
					zones[*e.Zone] = true
				}
			}
		}
		if len(zones) != 2 {
			return fmt.Errorf("ready endpoints in zones %v", zones)
		}
		return nil
	})
}

func checkRestart(t *testing.T, c town) {
	p := c.pods(t, "shop")[0]
	if err := c.Signal("default", p.Name, "web", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the container runs again", func() error {
		now, err := c.Client().CoreV1().Pods("default").Get(t.Context(), p.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		status := now.Status.ContainerStatuses[0]
		if !isReady(*now) || status.RestartCount != 1 || status.LastTerminationState.Terminated == nil {
			return fmt.Errorf("status is %+v", status)
		}
		if code := status.LastTerminationState.Terminated.ExitCode; code != 137 {
			t.Errorf("exit code is %d, want 137", code)
		}
		return nil
	})
	if got := c.kubectl(t, "logs", "--previous", p.Name, "-c", "web"); !strings.HasPrefix(got, "serving as 1") {
		t.Errorf("logs of the previous run: %q", got)
	}
}

func checkRollout(t *testing.T, c town, old []corev1.Pod) {
	c.kubectl(t, "set", "env", "deployment/shop", "-c", "web", "LINGER=1500ms")
	c.kubectl(t, "rollout", "status", "deployment/shop", "--timeout=20s")
	for _, p := range c.await(t, "shop", 2) {
		if p.Name == old[0].Name || p.Name == old[1].Name {
			t.Errorf("pod %s is still there", p.Name)
		}
		if got := c.get(t, p, "/env?name=LINGER"); got != "1500ms" {
			t.Errorf("pod %s has the old variable %q", p.Name, got)
		}
	}
	victim := c.pods(t, "shop")[0]
	start := time.Now()
	c.kubectl(t, "delete", "pod", victim.Name) // waits
	if took := time.Since(start); took < 1500*time.Millisecond || took > 4*time.Second {
		t.Errorf("deletion took %s, want a little more than 1.5 s", took)
	}
	c.await(t, "shop", 2)
}

func checkOutage(t *testing.T, c town) {
	pods := c.pods(t, "shop")
	if err := c.APIServer.Kill(); err != nil {
		t.Fatal(err)
	}
	c.get(t, pods[0], "/set?ready=false")
	if got := c.get(t, pods[1], "/"); got != pods[1].Name {
		t.Errorf("pod answers %q during the outage", got)
	}
	if err := c.Exec(t.Context(), "default", pods[1].Name, "web", []string{"true"}, nil, nil, nil); err != nil {
		t.Errorf("exec during the outage: %v", err)
	}
	if err := c.APIServer.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the API learns what happened meanwhile", func() error {
		now, err := c.Client().CoreV1().Pods("default").Get(t.Context(), pods[0].Name, metav1.GetOptions{})
		if err == nil && isReady(*now) {
			err = errors.New("pod is ready")
		}
		return err
	})
	c.remove(t, pods[0].Name)
}
