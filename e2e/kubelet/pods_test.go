// SPDX-License-Identifier: Apache-2.0

package kubelet_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// TestPods runs pods with one peculiarity each, side by side in one cluster.
func TestPods(t *testing.T) {
	t.Parallel()
	c := newTown(t)
	for name, check := range map[string]func(*testing.T, town){
		"sidecars end after the main containers, the last one first":   checkOrder,
		"a job ends although it has a sidecar":                         checkJob,
		"what ignores SIGTERM is killed after its grace":               checkStubborn,
		"preStop runs before SIGTERM":                                  checkPreStop,
		"a forced deletion kills at once":                              checkForced,
		"a container that keeps failing waits longer and longer":       checkCrashLoop,
		"a failing init container of a pod that never restarts is it":  checkFailedInit,
		"a container that fails its liveness probe is restarted":       checkLiveness,
		"probes by TCP, exec and a named port":                         checkProbes,
		"a pod waits for its ConfigMap":                                checkMissing,
		"what is not supported is named in the status":                 checkRefused,
		"users, groups, capabilities":                                  checkIdentity,
		"emptyDir in memory with a limit, shared, with sub-paths":      checkEmptyDir,
		"a pod may ask for its address":                                checkAddress,
		"a StatefulSet's pods keep their names and have them in hosts": checkStateful,
		"port-forward reaches the pod's loopback":                      checkForward,
		"a node selector is respected":                                 checkSelector,
		"nothing is left of a pod that is gone":                        checkLeftovers,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			check(t, c)
		})
	}
}

// podYAML completes a pod of the given name.
func podYAML(name, spec string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: %s}}\nspec:\n%s", name, name, spec)
}

func (c town) pod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	p, err := c.Client().CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// phase waits until a pod has a phase.
func (c town) phase(t *testing.T, name string, want corev1.PodPhase) *corev1.Pod {
	t.Helper()
	eventually(t, name+" is "+string(want), func() error {
		p, err := c.Client().CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && p.Status.Phase != want {
			err = fmt.Errorf("phase is %s: %s", p.Status.Phase, describe([]corev1.Pod{*p}))
		}
		return err
	})
	return c.pod(t, name)
}

// remove deletes a pod, waits until it is gone and tells how long that took.
func (c town) remove(t *testing.T, name string, args ...string) time.Duration {
	t.Helper()
	start := time.Now()
	c.kubectl(t, append([]string{"delete", "pod", name}, args...)...)
	return time.Since(start)
}

func checkOrder(t *testing.T, c town) {
	// Each container writes when it leaves; the log is on the node, seen by a pod that stays.
	trap := func(name string) string {
		return fmt.Sprintf(`["sh", "-c", "trap 'sleep 0.2; date +%%s.%%N > /out/%s; exit 0' TERM; while :; do sleep 0.05; done"]`, name)
	}
	dir := c.Namespace().World().Dir("order")
	c.apply(t, podYAML("order", `
  terminationGracePeriodSeconds: 10
  volumes: [{name: out, hostPath: {path: `+dir+`, type: DirectoryOrCreate}}]
  initContainers:
  - {name: first, image: busybox, restartPolicy: Always, command: `+trap("first")+`, volumeMounts: [{name: out, mountPath: /out}]}
  - {name: second, image: busybox, restartPolicy: Always, command: `+trap("second")+`, volumeMounts: [{name: out, mountPath: /out}]}
  containers:
  - {name: main, image: busybox, command: `+trap("main")+`, volumeMounts: [{name: out, mountPath: /out}]}
`))
	c.await(t, "order", 1)
	if took := c.remove(t, "order"); took < 600*time.Millisecond || took > 5*time.Second {
		t.Errorf("deletion took %s, want three times 0.2 s and a little", took)
	}
	times := readAll(t, dir, "main", "second", "first")
	if times[0] >= times[1] || times[1] >= times[2] {
		t.Errorf("main, second, first ended at %v", times)
	}
}

func checkJob(t *testing.T, c town) {
	c.apply(t, `
apiVersion: batch/v1
kind: Job
metadata: {name: once}
spec:
  template:
    metadata: {labels: {app: once}}
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 1
      initContainers: [{name: proxy, image: busybox, restartPolicy: Always, command: [sleep, "1000"]}]
      containers: [{name: work, image: busybox, command: [sh, -c, "echo done"]}]
`)
	c.kubectl(t, "wait", "--for=condition=complete", "job/once", "--timeout=20s")
	if got := c.kubectl(t, "logs", "job/once", "-c", "work"); got != "done\n" {
		t.Errorf("logs: %q", got)
	}
}

func checkStubborn(t *testing.T, c town) {
	c.apply(t, podYAML("stubborn", `
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: busybox, command: [sh, -c, "trap '' TERM; while :; do sleep 0.1; done"]}]
`))
	c.await(t, "stubborn", 1)
	if took := c.remove(t, "stubborn"); took < time.Second || took > 3*time.Second {
		t.Errorf("deletion took %s, want a little more than 1 s", took)
	}
}

func checkPreStop(t *testing.T, c town) {
	dir := c.Namespace().World().Dir("prestop")
	c.apply(t, podYAML("prestop", `
  volumes: [{name: out, hostPath: {path: `+dir+`, type: DirectoryOrCreate}}]
  containers:
  - name: main
    image: web
    env: [{name: LINGER, value: 0s}]
    volumeMounts: [{name: out, mountPath: /out}]
    readinessProbe: {httpGet: {path: /ready, port: 8080}}
    lifecycle:
      postStart: {exec: {command: [sh, -c, "echo $HOSTNAME > /out/start"]}}
      preStop: {exec: {command: [sh, -c, "sleep 0.5; cat /proc/1/comm > /out/stop"]}}
`))
	c.await(t, "prestop", 1)
	if took := c.remove(t, "prestop"); took < 500*time.Millisecond || took > 4*time.Second {
		t.Errorf("deletion took %s, want a little more than 0.5 s", took)
	}
	if got := readAll(t, dir, "start", "stop"); got[0] != "prestop\n" || got[1] == "" {
		t.Errorf("hooks wrote %q", got)
	}
}

func checkForced(t *testing.T, c town) {
	c.apply(t, podYAML("forced", `
  terminationGracePeriodSeconds: 60
  containers: [{name: main, image: busybox, command: [sleep, "1000"]}]
`))
	p := c.await(t, "forced", 1)[0]
	c.remove(t, "forced", "--grace-period=0", "--force")
	eventually(t, "its address answers no more", func() error {
		if _, err := c.NetNS("default", p.Name); err == nil {
			return fmt.Errorf("the pod is still there")
		}
		return nil
	})
}

func checkCrashLoop(t *testing.T, c town) {
	c.apply(t, podYAML("crash", `
  containers: [{name: main, image: busybox, command: [sh, -c, "echo attempt; exit 3"]}]
`))
	eventually(t, "three restarts and a wait", func() error {
		status := c.pod(t, "crash").Status
		if len(status.ContainerStatuses) == 0 {
			return fmt.Errorf("no status")
		}
		s := status.ContainerStatuses[0]
		if s.RestartCount < 3 || s.State.Waiting == nil || s.State.Waiting.Reason != "CrashLoopBackOff" ||
			s.LastTerminationState.Terminated == nil || s.LastTerminationState.Terminated.ExitCode != 3 {
			return fmt.Errorf("status is %+v", s)
		}
		if status.Phase != corev1.PodRunning {
			t.Errorf("phase is %s, want Running", status.Phase)
		}
		return nil
	})
	if got := c.kubectl(t, "logs", "crash", "--previous"); got != "attempt\n" {
		t.Errorf("previous log: %q", got)
	}
	c.remove(t, "crash")
}

func checkFailedInit(t *testing.T, c town) {
	c.apply(t, podYAML("initfail", `
  restartPolicy: Never
  initContainers: [{name: check, image: busybox, command: [sh, -c, "exit 2"]}]
  containers: [{name: main, image: busybox, command: [sleep, "1000"]}]
`))
	p := c.phase(t, "initfail", corev1.PodFailed)
	if s := p.Status.InitContainerStatuses[0]; s.State.Terminated == nil || s.State.Terminated.ExitCode != 2 {
		t.Errorf("init container: %+v", s)
	}
	c.remove(t, "initfail")
}

func checkLiveness(t *testing.T, c town) {
	c.apply(t, podYAML("weak", `
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    command: [sh, -c, "touch /tmp/healthy; sleep 1000 & wait"]
    livenessProbe: {exec: {command: [test, -e, /tmp/healthy]}, initialDelaySeconds: 1, periodSeconds: 1, failureThreshold: 1}
`))
	c.await(t, "weak", 1)
	c.kubectl(t, "exec", "weak", "--", "rm", "/tmp/healthy")
	eventually(t, "it is restarted, with a fresh file system", func() error {
		p := c.pod(t, "weak")
		if s := p.Status.ContainerStatuses[0]; s.RestartCount < 1 || !isReady(*p) {
			return fmt.Errorf("status is %+v", s)
		}
		return nil
	})
	c.remove(t, "weak")
}

func checkProbes(t *testing.T, c town) {
	c.apply(t, podYAML("probed", `
  containers:
  - name: main
    image: web
    ports: [{name: page, containerPort: 8080}]
    startupProbe: {tcpSocket: {port: page}, periodSeconds: 1}
    livenessProbe: {exec: {command: [sh, -c, "[ $(hostname) = probed ]"]}, periodSeconds: 1}
    readinessProbe: {httpGet: {path: /ready, port: page, httpHeaders: [{name: X-Why, value: probe}]}, periodSeconds: 1}
  - name: deaf
    image: busybox
    command: [sleep, "1000"]
    startupProbe: {tcpSocket: {port: 9}, periodSeconds: 1, failureThreshold: 1000}
`))
	eventually(t, "one is ready, the other not yet started", func() error {
		statuses := c.pod(t, "probed").Status.ContainerStatuses
		if len(statuses) != 2 || !statuses[0].Ready || statuses[1].Ready || statuses[1].Started == nil || *statuses[1].Started || statuses[1].State.Running == nil {
			return fmt.Errorf("statuses are %+v", statuses)
		}
		return nil
	})
	c.remove(t, "probed", "--grace-period=1")
}

func checkMissing(t *testing.T, c town) {
	c.apply(t, podYAML("patient", `
  volumes: [{name: later, configMap: {name: later}}]
  containers: [{name: main, image: web, volumeMounts: [{name: later, mountPath: /later}]}]
`))
	eventually(t, "the status names what is missing", func() error {
		statuses := c.pod(t, "patient").Status.ContainerStatuses
		if len(statuses) == 0 || statuses[0].State.Waiting == nil || !strings.Contains(statuses[0].State.Waiting.Message, `"later" not found`) {
			return fmt.Errorf("statuses are %+v", statuses)
		}
		return nil
	})
	c.kubectl(t, "create", "configmap", "later", "--from-literal=a=b")
	c.await(t, "patient", 1)
	c.remove(t, "patient")
}

func checkRefused(t *testing.T, c town) {
	c.apply(t, podYAML("foreign", `
  containers: [{name: main, image: nobody/knows:1}]
`))
	c.apply(t, podYAML("hosted", `
  hostNetwork: true
  containers: [{name: main, image: web}]
`))
	for name, want := range map[string]string{"foreign": `image "nobody/knows:1"`, "hosted": "hostNetwork is not supported"} {
		eventually(t, name+" is refused", func() error {
			statuses := c.pod(t, name).Status.ContainerStatuses
			if len(statuses) == 0 || statuses[0].State.Waiting == nil || !strings.Contains(statuses[0].State.Waiting.Message, want) {
				return fmt.Errorf("statuses are %+v", statuses)
			}
			return nil
		})
		c.remove(t, name)
	}
}

func checkIdentity(t *testing.T, c town) {
	c.apply(t, podYAML("people", `
  securityContext: {fsGroup: 4000}
  volumes: [{name: shared, emptyDir: {}}]
  containers:
  - {name: root, image: web}
  - name: admin
    image: busybox
    command: [sleep, "1000"]
    securityContext: {capabilities: {add: [NET_ADMIN], drop: [CHOWN]}}
  - name: proxy
    image: busybox
    command: [sleep, "1000"]
    securityContext: {runAsUser: 1337, runAsGroup: 1338, allowPrivilegeEscalation: false}
    volumeMounts: [{name: shared, mountPath: /shared}]
`))
	c.await(t, "people", 1)
	for _, q := range []struct{ container, command, want string }{
		{"root", "id -u; ip link add v0 type veth peer name v1 2>&1 | grep -c 'not permitted'", "0\n1\n"},
		{"admin", "ip link add v0 type veth peer name v1 && ip link show v0 | grep -c v0@; touch /tmp/x; chown 5 /tmp/x 2>&1 | grep -c 'not permitted'", "1\n1\n"},
		{"proxy", "id -u; id -g; id -G; grep CapEff /proc/1/status; touch /shared/x; stat -c %g /shared/x; grep NoNewPrivs /proc/1/status",
			"1337\n1338\n1338 4000\nCapEff:\t0000000000000000\n4000\nNoNewPrivs:\t1\n"},
	} {
		if got := c.kubectl(t, "exec", "people", "-c", q.container, "--", "sh", "-c", q.command+"; true"); got != q.want {
			t.Errorf("%s: got %q, want %q", q.container, got, q.want)
		}
	}
	c.remove(t, "people", "--grace-period=1")
}

func checkEmptyDir(t *testing.T, c town) {
	c.apply(t, podYAML("small", `
  volumes: [{name: disk, emptyDir: {medium: Memory, sizeLimit: 1Mi}}]
  containers:
  - {name: writer, image: busybox, command: [sleep, "1000"], volumeMounts: [{name: disk, mountPath: /disk}]}
  - {name: reader, image: busybox, command: [sleep, "1000"], volumeMounts: [{name: disk, mountPath: /part, subPath: part, readOnly: true}]}
`))
	c.await(t, "small", 1)
	got := c.kubectl(t, "exec", "small", "-c", "writer", "--", "sh", "-c", "echo one > /disk/part/file; head -c 2000000 /dev/zero > /disk/big 2>&1 || echo full")
	if !strings.Contains(got, "full") {
		t.Errorf("2 MB fit into 1 MiB: %q", got)
	}
	got = c.kubectl(t, "exec", "small", "-c", "reader", "--", "sh", "-c", "cat /part/file; ls /part; touch /part/x 2>/dev/null || echo read-only")
	if got != "one\nfile\nread-only\n" {
		t.Errorf("reader sees %q", got)
	}
	c.remove(t, "small", "--grace-period=1")
}

func checkAddress(t *testing.T, c town) {
	c.apply(t, strings.Replace(podYAML("fixed", `
  containers: [{name: main, image: web, readinessProbe: {httpGet: {path: /ready, port: 8080}}}]
`), "labels:", "annotations: {e2e.isthmus-mesh.io/address: 10.244.77.7}, labels:", 1))
	p := c.await(t, "fixed", 1)[0]
	if p.Status.PodIP != "10.244.77.7" {
		t.Errorf("address is %s", p.Status.PodIP)
	}
	if got := c.get(t, p, "/"); got != "fixed" {
		t.Errorf("it answers %q", got)
	}
	c.remove(t, "fixed")
}

func checkStateful(t *testing.T, c town) {
	c.apply(t, `
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: web, port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec: {containers: [{name: main, image: web, readinessProbe: {httpGet: {path: /ready, port: 8080}}}]}
`)
	pods := c.await(t, "db", 2)
	if got := c.get(t, pods[1], "/file?name=/etc/hosts"); !strings.Contains(got, pods[1].Status.PodIP+"\tdb-1.db.default.svc.cluster.local\tdb-1\n") {
		t.Errorf("hosts file: %q", got)
	}
	c.remove(t, "db-0")
	pods = c.await(t, "db", 2)
	if pods[0].Name != "db-0" {
		t.Errorf("pod is %s", pods[0].Name)
	}
}

func checkForward(t *testing.T, c town) {
	c.apply(t, podYAML("inner", "  containers: [{name: main, image: web, readinessProbe: {httpGet: {path: /ready, port: 8080}}}]\n"))
	c.await(t, "inner", 1)
	w := c.Namespace().World()
	forward, err := c.Namespace().Start(bed.Command{Name: "forward", Path: w.Binaries().Kubectl, Args: []string{
		"--kubeconfig=" + w.Kubeconfig(), "--context=east", "port-forward", "pod/inner", "18080:8080",
	}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the forwarded port answers", func() error {
		status, body, err := c.Namespace().Get(t.Context(), "http://127.0.0.1:18080/")
		if err == nil && (status != http.StatusOK || body != "inner") {
			err = fmt.Errorf("status %d: %q", status, body)
		}
		return err
	})
	if err := forward.Kill(); err != nil {
		t.Error(err)
	}
	c.remove(t, "inner")
}

func checkSelector(t *testing.T, c town) {
	for _, name := range []string{"choosy-1", "choosy-2", "choosy-3"} {
		c.apply(t, podYAML(name, `
  nodeSelector: {topology.kubernetes.io/zone: b}
  containers: [{name: main, image: web}]
`))
		if p := c.await(t, name, 1)[0]; p.Spec.NodeName != "node-b" {
			t.Errorf("%s is on %s", name, p.Spec.NodeName)
		}
		c.remove(t, name)
	}
	c.apply(t, podYAML("nowhere", `
  nodeSelector: {moon: full}
  containers: [{name: main, image: web}]
`))
	eventually(t, "a pod that fits nowhere says so", func() error {
		for _, condition := range c.pod(t, "nowhere").Status.Conditions {
			if condition.Type == corev1.PodScheduled && condition.Reason == corev1.PodReasonUnschedulable {
				return nil
			}
		}
		return fmt.Errorf("no such condition")
	})
	c.remove(t, "nowhere")
}

func checkLeftovers(t *testing.T, c town) {
	c.apply(t, podYAML("brief", `
  terminationGracePeriodSeconds: 1
  volumes: [{name: disk, emptyDir: {medium: Memory}}]
  containers: [{name: main, image: busybox, command: [sh, -c, "sleep 1000 & sleep 1000"], volumeMounts: [{name: disk, mountPath: /disk}]}]
`))
	p := c.await(t, "brief", 1)[0]
	path, err := c.NetNS("default", "brief")
	if err != nil {
		t.Fatal(err)
	}
	c.remove(t, "brief")
	if _, err := c.Client().CoreV1().Pods("default").Get(t.Context(), "brief", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("pod after its deletion: %v", err)
	}
	mustBeGone(t, path, c.Namespace().World().Dir("kubelet", string(p.UID)))
}

// readAll reads files of a folder.
func readAll(t *testing.T, dir string, names ...string) []string {
	t.Helper()
	var all []string
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(data))
	}
	return all
}

// mustBeGone fails for each path that exists or is mounted.
func mustBeGone(t *testing.T, paths ...string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if _, err := os.Lstat(path); err == nil || strings.Contains(string(mounts), path) {
			t.Errorf("%s is left", path)
		}
	}
}
