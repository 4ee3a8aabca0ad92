// SPDX-License-Identifier: Apache-2.0

package inject_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/agent/health"
	"github.com/isthmus-mesh/isthmus/agent/inject"
)

var options = inject.Options{Image: "isthmus/proxy:dev", Server: "meshd.example:15012", Network: "n1", ClusterID: "kube:1234"}

const service = `# who reads this comment?
apiVersion: v1
kind: Service
metadata: {name: web}
`

const deployment = `---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata:
      labels: {app: web}
      annotations: {prometheus.io/scrape: "true", prometheus.io/port: "9090"}
    spec:
      futureField: 7
      initContainers:
      - {name: migrate, image: migrate}
      containers:
      - name: web
        image: echo
        futureContainerField: {a: 1}
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /ready, port: http, httpHeaders: [{name: X-A, value: b}]}, periodSeconds: 1, timeoutSeconds: 3}
        livenessProbe: {exec: {command: ["true"]}}
      - name: side
        image: side
        livenessProbe: {tcpSocket: {port: 7000}}
        startupProbe: {grpc: {port: 7001, service: ready}}
`

func run(t *testing.T, in string) (string, inject.Result) {
	t.Helper()
	var out bytes.Buffer
	result, err := inject.YAML(strings.NewReader(in), &out, options)
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), result
}

func template(t *testing.T, document string) corev1.PodTemplateSpec {
	t.Helper()
	var object struct {
		Spec struct {
			Template corev1.PodTemplateSpec `json:"template"`
		} `json:"spec"`
	}
	if err := yaml.Unmarshal([]byte(document), &object); err != nil {
		t.Fatal(err)
	}
	return object.Spec.Template
}

func TestADeploymentGetsAProxyAndTheRestStays(t *testing.T) {
	t.Parallel()
	out, result := run(t, service+deployment)
	rest, found := strings.CutPrefix(out, service)
	if !found {
		t.Fatalf("the service was touched:\n%s", out)
	}
	if diff := cmp.Diff([]string{"Deployment/web"}, result.Injected); diff != "" {
		t.Error(diff)
	}
	for _, unknown := range []string{"futureField: 7", "futureContainerField:"} {
		if !strings.Contains(rest, unknown) {
			t.Errorf("lost %q, which a newer Kubernetes may understand", unknown)
		}
	}
	for _, noise := range []string{"creationTimestamp", "status:"} {
		if strings.Contains(rest, noise) {
			t.Errorf("added %q", noise)
		}
	}
	pod := template(t, rest)
	var names []string
	for _, c := range pod.Spec.InitContainers {
		names = append(names, c.Name)
	}
	if diff := cmp.Diff([]string{"isthmus-init", "isthmus-proxy", "migrate"}, names); diff != "" {
		t.Errorf("init containers, in order: %s", diff)
	}
	if pod.Labels[inject.ProxyLabel] != "sidecar" {
		t.Errorf("labels %v", pod.Labels)
	}
	proxy := pod.Spec.InitContainers[1]
	if proxy.RestartPolicy == nil || *proxy.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Error("the proxy is no native sidecar")
	}
	if proxy.StartupProbe.HTTPGet.Port.IntValue() != 15021 {
		t.Error("the workload would not wait for the proxy")
	}
}

func TestProbesGoThroughTheAgent(t *testing.T) {
	t.Parallel()
	out, _ := run(t, deployment)
	pod := template(t, out)
	web, side := pod.Spec.Containers[0], pod.Spec.Containers[1]
	if got := web.ReadinessProbe.HTTPGet; got.Path != "/app-health/web/readyz" || got.Port.IntValue() != 15020 || len(got.HTTPHeaders) != 0 {
		t.Errorf("readiness %+v", got)
	}
	if web.ReadinessProbe.PeriodSeconds != 1 || web.LivenessProbe.Exec == nil {
		t.Error("what is not about where to ask must stay")
	}
	if side.LivenessProbe.TCPSocket != nil || side.StartupProbe.GRPC != nil {
		t.Error("TCP and gRPC probes would fail at a workload that insists on mutual TLS")
	}
	probes, err := health.ParseProbes(env(pod.Spec.InitContainers[1], "MESH_APP_PROBES"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]health.Probe{
		"web/readyz":    {HTTP: &health.HTTPProbe{Path: "/ready", Port: 8080, Headers: []health.Header{{Name: "X-A", Value: "b"}}}, TimeoutSeconds: 3},
		"side/livez":    {TCP: &health.TCPProbe{Port: 7000}},
		"side/startupz": {GRPC: &health.GRPCProbe{Port: 7001, Service: "ready"}},
	}
	if diff := cmp.Diff(want, probes); diff != "" {
		t.Error(diff)
	}
	if got := env(pod.Spec.InitContainers[1], "MESH_APP_METRICS"); got != "http://127.0.0.1:9090/metrics" {
		t.Errorf("workload metrics %q", got)
	}
	if got := pod.Annotations["prometheus.io/port"]; got != "15020" {
		t.Errorf("scraped at port %s", got)
	}
}

func env(c corev1.Container, name string) string {
	for _, e := range c.Env {
		if e.Name == name {
			return e.Value
		}
	}
	return ""
}

func TestTwiceIsOnce(t *testing.T) {
	t.Parallel()
	once, _ := run(t, service+deployment)
	twice, result := run(t, once)
	if diff := cmp.Diff(once, twice); diff != "" {
		t.Error(diff)
	}
	if len(result.Injected) != 0 || len(result.Unchanged) != 1 {
		t.Errorf("result %+v", result)
	}
}

func TestTheWorkloadAPIIsForWhoAsks(t *testing.T) {
	t.Parallel()
	const volume, folder, variable = "isthmus-workload", "/var/run/secrets/workload-spiffe-uds", "SPIFFE_ENDPOINT_SOCKET"
	mounts := func(c corev1.Container) (at string) {
		for _, m := range c.VolumeMounts {
			if m.Name == volume {
				at += fmt.Sprint(m.MountPath, m.ReadOnly)
			}
		}
		return at
	}
	wish := strings.Replace(deployment, "annotations: {", `annotations: {isthmus-mesh.io/workload-api: "true", `, 1)
	once, _ := run(t, wish)
	pod := template(t, once)
	if got := pod.Spec.InitContainers[1]; mounts(got) != folder+"false" || env(got, "MESH_WORKLOAD_SOCKET") != folder+"/socket" {
		t.Errorf("the proxy has it at %q, socket %q", mounts(got), env(got, "MESH_WORKLOAD_SOCKET"))
	}
	if got := mounts(pod.Spec.InitContainers[0]); got != "" {
		t.Errorf("what programs redirection has it at %q", got)
	}
	for _, c := range append(pod.Spec.Containers, pod.Spec.InitContainers[2]) {
		if mounts(c) != folder+"true" || env(c, variable) != "unix://"+folder+"/socket" {
			t.Errorf("%s has it at %q, variable %q", c.Name, mounts(c), env(c, variable))
		}
	}
	if twice, _ := run(t, once); twice != once {
		t.Error("the second injection changes something:", cmp.Diff(once, twice))
	}
	// Whoever takes the wish back loses the socket, and nobody has it who did not ask.
	back, _ := run(t, strings.Replace(once, `isthmus-mesh.io/workload-api: "true"`, `isthmus-mesh.io/workload-api: "false"`, 1))
	never, _ := run(t, deployment)
	for _, out := range []string{back, never} {
		if strings.Contains(out, volume) || strings.Contains(out, variable) || strings.Contains(out, "MESH_WORKLOAD_SOCKET") {
			t.Errorf("a socket that nobody asks for:\n%s", out)
		}
	}
}

func TestNewOptionsReplaceTheOldProxy(t *testing.T) {
	t.Parallel()
	once, _ := run(t, deployment)
	newer := options
	newer.Image = "isthmus/proxy:next"
	var out bytes.Buffer
	if _, err := inject.YAML(strings.NewReader(once), &out, newer); err != nil {
		t.Fatal(err)
	}
	pod := template(t, out.String())
	if len(pod.Spec.InitContainers) != 3 || len(pod.Spec.Volumes) != 4 {
		t.Errorf("%d init containers, %d volumes", len(pod.Spec.InitContainers), len(pod.Spec.Volumes))
	}
	if proxy := pod.Spec.InitContainers[1]; proxy.Image != newer.Image || env(proxy, "MESH_APP_PROBES") == "" {
		t.Errorf("image %s, probes %q", proxy.Image, env(proxy, "MESH_APP_PROBES"))
	}
}

func TestEveryKindThatRunsPods(t *testing.T) {
	t.Parallel()
	const pod = `metadata: {name: x}
spec: {containers: [{name: c, image: i}]}`
	indent := func(text, by string) string { return by + strings.ReplaceAll(text, "\n", "\n"+by) }
	for name, in := range map[string]string{
		"Pod/x":         "kind: Pod\n" + pod,
		"StatefulSet/x": "kind: StatefulSet\nmetadata: {name: x}\nspec:\n  template:\n" + indent(pod, "    "),
		"DaemonSet/x":   "kind: DaemonSet\nmetadata: {name: x}\nspec:\n  template:\n" + indent(pod, "    "),
		"Job/x":         "kind: Job\nmetadata: {generateName: x}\nspec:\n  template:\n" + indent(pod, "    "),
		"CronJob/x":     "kind: CronJob\nmetadata: {name: x}\nspec:\n  jobTemplate:\n    spec:\n      template:\n" + indent(pod, "        "),
		"ReplicaSet/x":  "kind: List\nitems:\n- kind: ReplicaSet\n  metadata: {name: x}\n  spec:\n    template:\n" + indent(pod, "      "),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, result := run(t, in)
			if len(result.Injected) != 1 || result.Injected[0] != name || !strings.Contains(out, inject.ProxyContainer) {
				t.Errorf("result %+v\n%s", result, out)
			}
		})
	}
}

func TestWhatStaysOutsideAndWhy(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ in, why string }{
		"by label":      {"kind: Pod\nmetadata: {name: a, labels: {isthmus-mesh.io/inject: \"false\"}}\nspec: {containers: [{name: c}]}\n", "isthmus-mesh.io/inject is false"},
		"by annotation": {"kind: Pod\nmetadata: {name: a, annotations: {sidecar.istio.io/inject: \"false\"}}\nspec: {containers: [{name: c}]}\n", "sidecar.istio.io/inject is false"},
		"host network":  {"kind: Pod\nmetadata: {name: a}\nspec: {hostNetwork: true, containers: [{name: c}]}\n", "it uses the node's network"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, result := run(t, c.in)
			if out != c.in {
				t.Errorf("changed:\n%s", out)
			}
			if got := result.Skipped["Pod/a"]; got != c.why {
				t.Errorf("reason %q, want %q", got, c.why)
			}
		})
	}
}

func TestWhatCannotBeInjectedIsNamed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ in, want string }{
		"no template":        {"kind: Deployment\nmetadata: {name: a}\nspec: {}\n", "Deployment/a has no spec.template"},
		"wrong type":         {"kind: Pod\nmetadata: {name: a}\nspec: {containers: 7}\n", "Pod/a"},
		"unknown named port": {"kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, readinessProbe: {tcpSocket: {port: nope}}}]}\n", `port "nope"`},
		"name taken":         {"kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: isthmus-proxy}]}\n", "isthmus-proxy already"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := inject.YAML(strings.NewReader(c.in), &bytes.Buffer{}, options)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want it to name %q", err, c.want)
			}
		})
	}
}

// Whatever comes in, injection does not crash, and what it makes it recognises.
func FuzzYAML(f *testing.F) {
	f.Add(service + deployment)
	f.Add("kind: List\nitems: [{kind: Pod, spec: {containers: [{}]}}]")
	f.Add("- a\n--- b\n...\n")
	f.Fuzz(func(t *testing.T, in string) {
		var once, twice bytes.Buffer
		if _, err := inject.YAML(strings.NewReader(in), &once, options); err != nil {
			return
		}
		if _, err := inject.YAML(bytes.NewReader(once.Bytes()), &twice, options); err != nil {
			t.Fatalf("refuses its own output: %v", err)
		}
		if once.String() != twice.String() {
			t.Fatalf("twice is not once:\n%s\n%s", once.String(), twice.String())
		}
	})
}

func TestAnAnnotationTurnsAccessLogsOn(t *testing.T) {
	t.Parallel()
	for annotation, want := range map[string]bool{`isthmus-mesh.io/access-log: "true", `: true, `isthmus-mesh.io/access-log: "false", `: false, "": false} {
		out, _ := run(t, strings.Replace(deployment, "annotations: {", "annotations: {"+annotation, 1))
		if got := strings.Contains(out, "MESH_ACCESS_LOG"); got != want {
			t.Errorf("with the annotations {%s}: access logs %v, want %v\n%s", annotation, got, want, out)
		}
	}
}
